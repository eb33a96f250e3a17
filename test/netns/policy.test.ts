import { type ChildProcess, spawn } from "node:child_process";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { type FenceCounts, readFenceCounts } from "../../agent/iptables/counts.ts";
import type { CaptureWish, MachineFacts } from "../../agent/iptables/plan/wish.ts";
import { parsePolicyRule } from "../../agent/iptables/policy.ts";
import { eventually, Lab, MACHINE, REMOTE, SERVICE, UID, WISH } from "./lab.ts";

/** The failure policy by packets: what is refused and what goes direct when Envoy has gone, and what the fence counts. */
let lab: Lab;
let envoy: ChildProcess;

beforeEach(async () => {
  lab = await Lab.make();
  ({ envoy } = await lab.populate());
});
afterEach(() => lab[Symbol.asyncDispose]());

const install = async (wish: CaptureWish, facts: Partial<MachineFacts> = {}): Promise<void> => {
  await lab.install(wish, facts);
};
const policy = (...rules: string[]) => ({ failurePolicy: rules.map(parsePolicyRule) });
const meets = (want: string, address: string, port: number, from?: string) => async () =>
  (await lab.dial(UID.app, address, port, from)) === want;
const counted = async (): Promise<FenceCounts> =>
  (await readFenceCounts(lab.host)) ?? { refused: NONE, bypassed: NONE };
const NONE = { inbound: -1, outbound: -1 };

const BACKENDS: { name: string; facts: Partial<MachineFacts> }[] = [
  { name: "with guard and fence", facts: {} },
  { name: "by iptables alone", facts: { nft: false } },
];

describe.for(BACKENDS)("Envoy killed, $name", ({ facts }) => {
  test("a declared port that is open is reached directly, one that is closed is refused", async () => {
    await install(
      { ...WISH, inbound: { kind: "ports", ports: [9000, 9001] }, ...policy("inbound:9001=open") },
      facts,
    );
    await eventually(meets("ENVOY-IN", MACHINE.ip, 9001, lab.world), 5000);
    envoy.kill("SIGKILL");
    await eventually(meets("OTHER", MACHINE.ip, 9001, lab.world), 5000);
    expect(await lab.dial(UID.app, MACHINE.ip6, 9001, lab.world)).toBe("OTHER");
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("refused");
  });

  test("with every port captured and closed, only what is declared open is reached; sshd always", async () => {
    await install(
      {
        ...WISH,
        inbound: { kind: "all", excludePorts: [] },
        ...policy("inbound:*=closed", "inbound:9001=open"),
      },
      facts,
    );
    await eventually(meets("ENVOY-IN", MACHINE.ip, 9001, lab.world), 5000);
    envoy.kill("SIGKILL");
    await eventually(meets("OTHER", MACHINE.ip, 9001, lab.world), 5000);
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("refused");
    expect(await lab.dial(UID.app, MACHINE.ip, 22, lab.world)).toBe("SSHD");
  });

  test("a destination outside the mesh that is closed is refused, a port of it that is open goes direct", async () => {
    await install({ ...WISH, ...policy("outbound:*=closed", `outbound:${REMOTE.ip}:80=open`) }, facts);
    await eventually(meets("ENVOY-OUT", REMOTE.ip, 80), 5000);
    expect(await lab.dial(UID.app, REMOTE.ip, 8080)).toBe("ENVOY-OUT");
    envoy.kill("SIGKILL");
    await eventually(meets("DIRECT", REMOTE.ip, 80), 5000);
    expect(await lab.dial(UID.app, REMOTE.ip, 8080)).toBe("refused");
    expect(await lab.dial(UID.app, REMOTE.ip6, 80)).toBe("refused");
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
  });

  test("a service of the mesh that is open goes direct, the others are refused", async () => {
    await install({ ...WISH, ...policy(`outbound:[${SERVICE.ip6}]=open`) }, facts);
    await eventually(meets("ENVOY-OUT", SERVICE.ip6, 80), 5000);
    envoy.kill("SIGKILL");
    await eventually(meets("DIRECT", SERVICE.ip6, 80), 5000);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
  });
});

describe("rules that change", () => {
  /** Dials as fast as it can until the work is done. @returns what was met, each with how often */
  const during = async (work: () => Promise<void>): Promise<Map<string, number>> => {
    const met = new Map<string, number>();
    let done = false;
    const note = async (address: string, port: number, from?: string): Promise<void> => {
      while (!done) {
        const answer = await lab.dial(UID.app, address, port, from);
        met.set(answer, (met.get(answer) ?? 0) + 1);
      }
    };
    const dialers = [note(SERVICE.ip, 80), note(SERVICE.ip, 80), note(MACHINE.ip, 9000, lab.world)];
    await work();
    done = true;
    await Promise.all(dialers);
    return met;
  };
  const WIDE: CaptureWish = { ...WISH, dns: { servers: ["10.200.0.2"] } };

  test("fewer chains than before: no moment in which something reaches the mesh or a declared port past Envoy", async () => {
    await install(WIDE);
    const met = await during(async () => {
      for (let round = 0; round < 3; round += 1) {
        await install({ ...WISH, ipv6: false });
        await install(WIDE);
      }
    });
    expect(met.get("ENVOY-OUT")).toBeGreaterThan(10);
    expect([...met.keys()].filter((answer) => answer === "DIRECT" || answer === "APP")).toEqual([]);
  });

  test("nor when a trial is taken back to the rules before it", async () => {
    await install(WISH);
    const met = await during(async () => {
      for (let round = 0; round < 3; round += 1) {
        const trial = await lab.apply(WIDE);
        await trial.rollBack();
      }
    });
    expect(met.get("ENVOY-OUT")).toBeGreaterThan(10);
    expect([...met.keys()].filter((answer) => answer === "DIRECT" || answer === "APP")).toEqual([]);
  });
});

describe("the fence that a process holds", () => {
  test("everything flushed: what is closed stays refused, what is open flows, an open connection goes on; it ends with its process", async () => {
    const { held } = await lab.rendered(WISH);
    await install(WISH);
    const connection = await lab.hold(lab.machine, UID.app, SERVICE.ip, 80);
    expect(connection.met).toBe("ENVOY-OUT");
    const holder = spawn("ip", ["netns", "exec", lab.machine, "nft", "-i"], {
      stdio: ["pipe", "ignore", "inherit"],
    });
    try {
      holder.stdin.write(held ?? "");
      const rules = (text: string): number => text.split('comment "vmmesh:').length;
      await eventually(
        async () =>
          rules(await lab.insideShell("nft list table inet vmmesh-hold || true")) === rules(held ?? ""),
        5000,
      );
      await lab.insideShell("nft flush ruleset");
      expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
      expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("refused");
      expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("refused");
      expect(await lab.dial(UID.app, REMOTE.ip, 80)).toBe("DIRECT");
      expect(await connection.alive()).toBe("still there");
    } finally {
      holder.kill("SIGKILL");
    }
    await eventually(meets("DIRECT", SERVICE.ip, 80), 2000);
  });
});

describe("what the fence counts", () => {
  test("every connection that went past Envoy where that is allowed, and every one that it refused", async () => {
    await install({
      ...WISH,
      inbound: { kind: "ports", ports: [9000, 9001] },
      ...policy("inbound:9001=open", `outbound:${REMOTE.ip}:8080=closed`),
    });
    await eventually(meets("ENVOY-OUT", REMOTE.ip, 80), 5000);
    await eventually(meets("ENVOY-IN", MACHINE.ip, 9001, lab.world), 5000);
    const { bypassed: before } = await counted();
    // Through Envoy is not past it.
    for (let round = 0; round < 5; round += 1)
      expect(await lab.dial(UID.app, REMOTE.ip, 80)).toBe("ENVOY-OUT");
    expect((await counted()).bypassed).toEqual(before);
    // Everything that redirects is gone; the fence is not.
    await lab.insideShell(
      "iptables -t nat -F; ip6tables -t nat -F; nft delete table ip vmmesh; nft delete table ip6 vmmesh",
    );
    for (let round = 0; round < 7; round += 1) expect(await lab.dial(UID.app, REMOTE.ip, 80)).toBe("DIRECT");
    for (let round = 0; round < 3; round += 1)
      expect(await lab.dial(UID.app, MACHINE.ip, 9001, lab.world)).toBe("OTHER");
    for (let round = 0; round < 4; round += 1)
      expect(await lab.dial(UID.app, REMOTE.ip, 8080)).toBe("refused");
    for (let round = 0; round < 2; round += 1)
      expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("refused");
    expect(await counted()).toEqual({
      refused: { inbound: 2, outbound: 4 },
      bypassed: { inbound: before.inbound + 3, outbound: before.outbound + 7 },
    });
  });
});
