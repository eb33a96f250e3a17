import { existsSync, readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { CASES, golden } from "../compat/cases.ts";
import { PeerMachine, PILOT_AGENT } from "../compat/peer.ts";
import { requireRoot } from "../lab/acceptance.ts";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/parity.ts";

/** Whether `iptables plan --compat istio` prints what the real istio-iptables applies; `npm run prove:capture -- --only parity` for more sets. */
const VMMESH = [process.execPath, new URL("../../agent/main.ts", import.meta.url).pathname];

const machines: PeerMachine[] = [];
const machineWith = (...families: (4 | 6)[]): PeerMachine => {
  const found = machines.find((machine) => machine.families.join() === families.join());
  if (found === undefined) throw new Error(`no machine with families ${families.join()}`);
  return found;
};

beforeAll(async () => {
  requireRoot();
  if (!existsSync(PILOT_AGENT))
    throw new Error(`${PILOT_AGENT} is missing: \`node test/lab/main.ts up\` builds it`);
  for (const families of [[4], [6], [4, 6]] as const)
    machines.push(await PeerMachine.make(families.join(""), families));
});

afterAll(async () => {
  for (const machine of machines) await machine[Symbol.asyncDispose]();
});

describe("the peer's own cases", () => {
  test.for(CASES)("$name: the golden text is the peer's, and the command prints it", async (row) => {
    const { name, argv, env = {}, ipv6 = false, nameservers = [] } = row;
    const machine = machineWith(ipv6 ? 6 : 4);
    machine.resolve(nameservers);
    const fixed = { ...env, ENVOY_USER: "nosuch" };
    const peer = await machine.dryRun(argv, fixed);
    for (const family of [4, 6] as const) {
      const kept = family === 6 && !ipv6 ? "" : readFileSync(golden(name, family), "utf8");
      expect(kept).toBe(peer?.[family]);
      const command = [...VMMESH, "iptables", "plan", "--compat", "istio", "--family", `ipv${family}`];
      const printed = await machine.exec([...command, ...argv], fixed);
      expect(printed).toMatchObject({ code: 0, stdout: kept.trimEnd() });
    }
  });

  test.for(CASES)("$name: the kernel gets the same rules from both", async (row) => {
    const { name, argv, env = {}, ipv6 = false, nameservers = [] } = row;
    const families = ipv6 ? ([6] as const) : ([4] as const);
    await using theirs = await PeerMachine.make("theirs", families);
    await using ours = await PeerMachine.make("ours", families);
    theirs.resolve(nameservers);
    const applied = await theirs.exec([PILOT_AGENT, "istio-iptables", ...argv], {
      ...env,
      ENVOY_USER: "nosuch",
      FORCE_IPTABLES_BINARY: "nft",
    });
    expect(applied.code, applied.stdout).toBe(0);
    for (const [program, family] of [["iptables", 4] as const, ["ip6tables", 6] as const]) {
      if (family === 6 && !ipv6) continue;
      const text = readFileSync(golden(name, family), "utf8");
      const restored = await ours.exec([`${program}-nft-restore`, "--noflush"], {}, text);
      expect(restored).toMatchObject({ code: 0 });
    }
    const rules = await theirs.rules();
    expect(rules).toContain("ISTIO_OUTPUT");
    expect(await ours.rules()).toBe(rules);
  });
});

test("random option sets give the peer's text and send packets where the peer's rules send them", {
  timeout: 300_000,
}, async () => {
  await quick(proof);
});
