import fc from "fast-check";
import { ADDRESSES, CALLERS, PeerMachine, PILOT_AGENT } from "../compat/peer.ts";
import { difference, type OptionSet, optionSet, printed } from "../compat/random.ts";
import type { Scale } from "../suite.ts";
import { type Proof, row } from "./proof.ts";

const SEED = 20_261_123;
const SIZES: Readonly<Record<Scale, { readonly texts: number; readonly packets: number }>> = {
  quick: { texts: 60, packets: 4 },
  full: { texts: 2000, packets: 60 },
};
const PACKETS = new URL("../compat/packets.py", import.meta.url).pathname;
const PYTHON = "/usr/bin/python3";

const own = (family: 4 | 6): string => ADDRESSES[family].split("/")[0] ?? "";
/** An address on the wire that nobody has: only a redirect makes it answer. */
const STRANGER = { 4: "10.9.0.77", 6: "fd00:9::77" } as const;

/** From whom to where: Envoy's user and group, root, an ordinary user; this machine, the wire, resolvers. */
function dialled(families: readonly (4 | 6)[]): [number, "tcp" | "udp", string, number][] {
  return [0, 1000, 1337].flatMap((uid) =>
    families.flatMap((family) => {
      const loopback = family === 4 ? "127.0.0.1" : "::1";
      return [
        [uid, "tcp", loopback, 8080],
        [uid, "tcp", own(family), 8080],
        [uid, "tcp", STRANGER[family], 80],
        [uid, "tcp", STRANGER[family], 15008],
        [uid, "tcp", STRANGER[family], 53],
        [uid, "udp", STRANGER[family], 53],
        [uid, "udp", loopback, 53],
      ] satisfies [number, "tcp" | "udp", string, number][];
    }),
  );
}

/** From outside: the application, a port that nobody listens at, Envoy's own doors. */
function inbound(families: readonly (4 | 6)[]): ["tcp" | "udp", string, number][] {
  return families.flatMap((family) => [
    ...[8080, 9000, 15006, 15008].map((port): ["tcp", string, number] => ["tcp", own(family), port]),
    ["udp", own(family), 8080],
  ]);
}

async function outcomes(machine: PeerMachine, families: readonly (4 | 6)[]): Promise<string[]> {
  const everywhere = families.map((family) => (family === 4 ? "0.0.0.0" : "::"));
  const plan = {
    listen: everywhere.flatMap((address) =>
      [8080, 15001, 15006, 15008, 15053].map((port) => [address, port]),
    ),
    dial: dialled(families),
    outside: machine.outside,
    inbound: inbound(families),
  };
  const { stdout, stderr } = await machine.exec([PYTHON, PACKETS, JSON.stringify(plan)]);
  try {
    return JSON.parse(stdout) as string[];
  } catch {
    throw new Error(`no outcomes: ${stderr}`);
  }
}

interface Compared {
  /** Where each packet ended with the peer's rules. */
  readonly want: readonly string[];
  readonly different: readonly string[];
}

/** The peer's rules in one namespace, ours in another, the same packets through both. @returns undefined: it is refused */
async function comparePackets(set: OptionSet): Promise<Compared | undefined> {
  await using theirs = await PeerMachine.make("theirs", set.families);
  await using ours = await PeerMachine.make("ours", set.families);
  for (const machine of [theirs, ours]) machine.resolve(set.nameservers);
  const documents = printed(set, ours);
  const applied = await theirs.exec([PILOT_AGENT, "istio-iptables", ...set.argv], set.env);
  if (documents === undefined || applied.code !== 0) return undefined;
  for (const [program, family] of [["iptables", 4] as const, ["ip6tables", 6] as const]) {
    if (documents[family] === "") continue;
    const { code, stderr } = await ours.exec([`${program}-nft-restore`, "--noflush"], {}, documents[family]);
    // A port such as "=5" is no rule for the kernel; then the peer must have failed, too, whatever it says.
    if (code !== 0 && (await theirs.rules()) === "") return undefined;
    if (code !== 0) throw new Error(`our rules of ${JSON.stringify(set)} were refused: ${stderr}`);
  }
  // The routes to Envoy are no rules of iptables: what is compared are the marks that choose them.
  await ours.routeLike(theirs);
  const [want, got] = await Promise.all([outcomes(theirs, set.families), outcomes(ours, set.families)]);
  const packets = [
    ...dialled(set.families),
    ...inbound(set.families).map((packet) => ["from outside", ...packet]),
  ];
  const different = packets.flatMap((packet, index) =>
    want[index] === got[index] ? [] : [`${packet.join(" ")}: peer ${want[index]}, ours ${got[index]}`],
  );
  return { want, different };
}

/** Few random sets capture what comes in: of six, two capture by TPROXY and two by REDIRECT, whatever else they say. */
const CAPTURING: readonly (readonly string[])[] = [
  [],
  ["-m", "TPROXY", "-b", "*"],
  ["-m", "TPROXY", "-b", "8080,15008"],
  [],
  ["-m", "REDIRECT", "-b", "*"],
  ["-m", "REDIRECT", "-b", "8080,15008"],
];

/** The application saw who called, although Envoy took the call: only TPROXY can do this. */
const KEPT = new Set(
  Object.values(CALLERS).map((address) => {
    const client = address.split("/")[0] ?? "";
    return `15006 from ${client}, 8080 from ${client}`;
  }),
);

export const proof: Proof = {
  name: "parity",
  about: "random option sets of istio-iptables, as text and by packets, beside the real pilot-agent",
  async run(scale) {
    const { texts, packets } = SIZES[scale];
    await using v4 = await PeerMachine.make("v4", [4]);
    await using v6 = await PeerMachine.make("v6", [6]);
    await using both = await PeerMachine.make("both", [4, 6]);
    let same = 0;
    for (const set of fc.sample(optionSet, { numRuns: texts, seed: SEED })) {
      const machine = set.families.length === 2 ? both : set.families[0] === 4 ? v4 : v6;
      machine.resolve(set.nameservers);
      const [ours, theirs] = [printed(set, machine), await machine.dryRun(set.argv, set.env)];
      if (ours?.[4] === theirs?.[4] && ours?.[6] === theirs?.[6]) same += 1;
      else process.stderr.write(`${difference(set, ours, theirs)}\n`);
    }
    let applied = 0;
    const ends: string[] = [];
    const different: string[] = [];
    for (const random of fc.sample(optionSet, { numRuns: packets * 3, seed: SEED + 1 })) {
      if (applied === packets) break;
      // `-n` in a cluster of short flags: the peer only prints.
      if (random.argv.some((word) => /^-n./.test(word))) continue;
      const set = { ...random, argv: [...random.argv, ...(CAPTURING[applied % CAPTURING.length] ?? [])] };
      const compared = await comparePackets(set);
      if (compared === undefined) continue;
      applied += 1;
      ends.push(...compared.want);
      different.push(...compared.different.map((line) => `${JSON.stringify(set)} ${line}`));
    }
    for (const line of different) process.stderr.write(`${line}\n`);
    return [
      row(
        "parity",
        `of ${texts} random option sets differ from the peer's text (or are refused by one only)`,
        texts - same,
        "sets",
        "= 0",
      ),
      row(
        "parity",
        `of ${ends.length} connections and datagrams through ${applied} random sets in force end elsewhere than with the peer`,
        different.length,
        "packets",
        "= 0",
      ),
      row(
        "parity",
        "of these, captured by the peer's rules",
        ends.filter((end) => /^(15001|15006|15053) /.test(end)).length,
        "packets",
        "> 0",
      ),
      row(
        "parity",
        "of these, from outside through Envoy by TPROXY, and the application sees who called",
        ends.filter((end) => KEPT.has(end)).length,
        "connections",
        "> 0",
      ),
      row("parity", "random sets compared by packets", applied, "sets", `>= ${packets}`),
    ];
  },
};
