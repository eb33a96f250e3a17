import { afterEach, beforeEach, expect, test } from "vitest";
import type { CaptureWish, MachineFacts } from "../../agent/iptables/plan/wish.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { eventually, Lab, REMOTE, SERVICE, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const NOBODY = { uids: [], gids: [] };
const OTHER = 20_011;
const GROUP = 20_012;
/** Answers as the machine's resolver. */
const RESOLVER = REMOTE.ip;

async function install(wish: Partial<CaptureWish>, facts: Partial<MachineFacts>): Promise<void> {
  await lab.install({ ...WISH, ...wish }, facts);
}

type Row = readonly [uid: number | `${number}:${number}`, address: string, port: number, want: string];

async function meets(rows: readonly Row[]): Promise<void> {
  for (const [who, address, port, want] of rows)
    expect.soft(await lab.dial(who, address, port), `${who} to ${address}:${port}`).toBe(want);
}

/** iptables and the guard have to agree, so each is asked alone. */
const ALONE = [
  { by: "iptables", facts: { nft: false } },
  { by: "the guard", facts: { backend: undefined } },
] as const;

test.for(ALONE)("$by: only a user and a group are captured, also their questions", async ({ facts }) => {
  await lab.populate();
  await lab.serve(lab.world, UID.app, { udp: [[RESOLVER, 53, "RESOLVER"]] });
  await lab.serve(lab.machine, UID.agent, {
    udp: [["127.0.0.1", 15053, "AGENT"]],
    question: [["127.0.0.1", 15053]],
  });
  await install(
    {
      dns: { servers: [RESOLVER] },
      senders: { only: { uids: [UID.app], gids: [GROUP] }, never: { uids: [], gids: [OTHER] } },
    },
    facts,
  );
  await meets([
    [UID.app, SERVICE.ip, 80, "ENVOY-OUT"],
    [UID.app, SERVICE.ip6, 80, "ENVOY-OUT"],
    [`${OTHER}:${GROUP}`, SERVICE.ip, 80, "ENVOY-OUT"],
    [`${OTHER}:${GROUP}`, SERVICE.ip6, 80, "ENVOY-OUT"],
    [30_000, SERVICE.ip, 80, "DIRECT"],
    [30_000, SERVICE.ip6, 80, "DIRECT"],
    [0, SERVICE.ip, 80, "DIRECT"],
    [`${UID.app}:${OTHER}`, SERVICE.ip, 80, "DIRECT"],
    [UID.envoy, SERVICE.ip, 80, "DIRECT"],
  ]);
  await eventually(async () => (await lab.ask(UID.app, RESOLVER, 53)) === "AGENT", 5000);
  expect(await lab.ask(30_000, RESOLVER, 53)).toBe("RESOLVER");
  expect(await lab.ask(`${UID.app}:${OTHER}`, RESOLVER, 53)).toBe("RESOLVER");
});

test.for(ALONE)("$by: a user and a group are never captured", async ({ facts }) => {
  await lab.populate();
  await install({ senders: { only: NOBODY, never: { uids: [OTHER], gids: [GROUP] } } }, facts);
  await meets([
    [OTHER, SERVICE.ip, 80, "DIRECT"],
    [OTHER, SERVICE.ip6, 80, "DIRECT"],
    [`${UID.app}:${GROUP}`, SERVICE.ip, 80, "DIRECT"],
    [UID.app, SERVICE.ip, 80, "ENVOY-OUT"],
    [UID.app, SERVICE.ip6, 80, "ENVOY-OUT"],
  ]);
});

test.for(ALONE)("$by: a port is captured wherever it leads, and nothing else", async ({ facts }) => {
  await lab.populate();
  await install(
    {
      meshCidrs: [],
      outbound: { cidrs: [], excludeCidrs: [`${SERVICE.ip}/32`], excludePorts: [], includePorts: [80] },
    },
    facts,
  );
  // Each family has a lease of its own.
  for (const address of [REMOTE.ip, REMOTE.ip6])
    await eventually(async () => (await lab.dial(UID.app, address, 80)) === "ENVOY-OUT", 5000);
  await meets([
    [UID.app, REMOTE.ip, 8080, "POD"],
    [UID.app, SERVICE.ip, 80, "DIRECT"],
    [UID.app, SERVICE.ip6, 80, "ENVOY-OUT"],
  ]);
});

test("the fence refuses the chosen and lets the others go; clean takes all of it out", async () => {
  await lab.populate();
  const before = await lab.firewall();
  await install({ senders: { only: { uids: [UID.app], gids: [] }, never: NOBODY } }, {});
  await lab.insideShell("iptables-nft -t nat -F ISTIO_OUTPUT; nft delete table ip vmmesh");
  await meets([
    [UID.app, SERVICE.ip, 80, "refused"],
    [OTHER, SERVICE.ip, 80, "DIRECT"],
  ]);
  await removeCapture(lab.host, lab.rulesDir);
  expect(await lab.firewall()).toEqual(before);
});
