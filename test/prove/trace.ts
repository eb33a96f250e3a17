import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { addressText } from "../../agent/iptables/trace/packet.ts";
import { isCut, openTrace, type Question, ways } from "../../agent/iptables/trace/trace.ts";
import type { Way } from "../../agent/iptables/trace/walk.ts";
import { Lab, MACHINE } from "../netns/lab.ts";
import { CAST, Dice, type Generated, generate, PORTS, UIDS } from "../netns/rulesets.ts";
import { type Proof, type ProofRow, row, type Scale } from "./proof.ts";

interface Sent {
  readonly at: "machine" | "world";
  readonly uid: number;
  readonly protocol: "tcp" | "udp";
  readonly to: string;
  readonly port: number;
  readonly fromPort: number;
  readonly from?: string;
}

const SCALE: Readonly<Record<Scale, { rulesets: number; packets: number }>> = {
  quick: { rulesets: 6, packets: 50 },
  full: { rulesets: 100, packets: 100 },
};

/** The simulator against the kernel: random packets through random firewalls, seen by raw sockets and on the wire. */
export const proof: Proof = {
  name: "trace",
  about: "what `vmmesh iptables trace` says against what the kernel does with the same packet",
  run: async (scale) => await prove(scale),
};

/**
 * Of the dice: every run meets the same firewalls, so that a disagreement can be met again. The walk was put right against
 * those of 1 and 2; with 3, which it had never met, it agreed on all of 10,000.
 */
const SEED = 3;

async function prove(scale: Scale): Promise<ProofRow[]> {
  const { rulesets, packets } = SCALE[scale];
  await using lab = await Lab.make();
  await prepare(lab);
  const observer = observe(lab);
  await observer.next();
  const count = { packets: 0, agreed: 0, may: 0, mayRight: 0 };
  const disagreements: string[] = [];
  const kinds = new Map<string, number>();
  let fromPort = 2000;
  try {
    for (let index = 0; index < rulesets; index++) {
      const dice = new Dice(SEED * 100_000 + index);
      const family = dice.chance(0.25) ? 6 : 4;
      const firewall = generate(dice, family);
      await load(lab, firewall, family);
      const trace = await openTrace(lab.host, family);
      const sent = Array.from({ length: packets }, () => packet(dice, family, fromPort++));
      if (fromPort > 60_000) fromPort = 2000;
      const said = [];
      for (const each of sent) said.push(await ways(trace, question(each)));
      const seen = await observer.send(sent);
      for (const [at, each] of sent.entries()) {
        const groups = said[at] ?? [];
        const expected = groups.map(([way]) => (way === undefined ? "" : expectation(way)));
        const met = seen[at]?.met ?? "";
        count.packets++;
        kinds.set(met.split(" ")[0] ?? "", (kinds.get(met.split(" ")[0] ?? "") ?? 0) + 1);
        if (new Set(expected).size > 1 || groups.some(isCut)) {
          count.may++;
          if (expected.includes(met)) count.mayRight++;
        } else if (expected[0] === met) count.agreed++;
        if (!expected.includes(met))
          disagreements.push(describe(index, firewall, each, groups, met, seen[at]?.errno ?? ""));
      }
    }
  } finally {
    observer.end();
  }
  for (const line of disagreements.slice(0, 20)) process.stderr.write(`${line}\n`);
  const certain = count.packets - count.may;
  const shares = [...kinds].map(([kind, number]) => `${number} ${kind}`).join(", ");
  return [
    row(
      "trace",
      `random packets over ${rulesets} generated firewalls (${shares})`,
      count.packets,
      "packets",
      `>= ${rulesets * packets}`,
    ),
    row(
      "trace",
      `certain answers that the kernel agreed with (dice ${SEED}, which it was never put right against)`,
      (100 * count.agreed) / certain,
      "%",
      "= 100",
    ),
    row("trace", "answers of the kind may", (100 * count.may) / count.packets, "%", "< 2"),
    row(
      "trace",
      "answers of the kind may that name what the kernel did",
      count.may === 0 ? 100 : (100 * count.mayRight) / count.may,
      "%",
      "= 100",
    ),
  ];
}

async function prepare(lab: Lab): Promise<void> {
  const table = "10 lookup 100";
  await lab.insideShell(
    [
      "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
      "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0",
      // The kernel says "unreachable" only so often.
      "sysctl -qw net.ipv4.icmp_msgs_per_sec=1000000 net.ipv4.icmp_msgs_burst=100000",
      // What TPROXY setups do: a mark that turns everything into local traffic.
      `ip rule add fwmark 0x10/0x${table}`,
      `ip -6 rule add fwmark 0x10/0x${table}`,
      "ip route add local default dev lo table 100",
      "ip -6 route add local default dev lo table 100",
    ].join("\n"),
  );
  // The world answers for every address.
  for (const family of ["-4", "-6"])
    await lab.outside([
      "ip",
      family,
      "-n",
      lab.world,
      "route",
      "replace",
      "local",
      "default",
      "dev",
      "lo",
      "table",
      "main",
    ]);
  await lab.outside(["ip", "-n", lab.world, "route", "add", "default", "via", MACHINE.ip, "metric", "100"]);
  await lab.outside([
    "ip",
    "-6",
    "-n",
    lab.world,
    "route",
    "add",
    "default",
    "via",
    MACHINE.ip6,
    "metric",
    "2000",
  ]);
  await lab.outside([
    "ip",
    "netns",
    "exec",
    lab.world,
    "sysctl",
    "-qw",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.eth0.rp_filter=0",
    // Answers come from addresses that this side calls its own.
    "net.ipv4.conf.eth0.accept_local=1",
  ]);
}

async function load(lab: Lab, { iptables, backend, nft }: Generated, family: 4 | 6): Promise<void> {
  const empty = ["raw", "mangle", "nat", "filter"].map((table) => `*${table}\nCOMMIT\n`).join("");
  const must = async (argv: readonly [string, ...string[]], input: string): Promise<void> => {
    const result = await lab.inside(argv, input);
    if (result.code !== 0) throw new Error(`${argv.join(" ")}: ${result.stderr}\n${input}`);
  };
  for (const six of ["", "6"]) await must([`ip${six}tables-legacy-restore`], empty);
  await must(["nft", "-f", "-"], `flush ruleset\n`);
  await must([`ip${family === 6 ? "6" : ""}tables-${backend}-restore`], iptables);
  await must(["nft", "-f", "-"], nft);
}

function packet(dice: Dice, family: 4 | 6, fromPort: number): Sent {
  const cast = CAST[family];
  const inbound = dice.chance(0.3);
  return {
    at: inbound ? "world" : "machine",
    uid: inbound ? 0 : Number(dice.of(UIDS)),
    protocol: dice.chance(0.75) ? "tcp" : "udp",
    to: inbound && dice.chance(0.7) ? cast.here : dice.of(inbound ? cast.beyond : cast.to),
    port: Number(dice.of(PORTS)),
    fromPort,
    ...(inbound ? { from: dice.of(cast.from) } : {}),
  };
}

const question = ({ at, to, port, protocol, uid, from, fromPort }: Sent): Question => ({
  to: { address: to, port },
  protocol,
  fromPort,
  by:
    at === "world"
      ? { from: from ?? "" }
      : { sender: { uid, gid: 0, cgroup: undefined }, label: String(uid) },
});

/** In the observer's words. */
function expectation({ packet: { to, family }, end }: Way): string {
  const host = addressText(to.address, family);
  const at = `${family === 6 ? `[${host}]` : host}:${to.port.low}`;
  switch (end.kind) {
    case "delivered":
      return `machine ${at}`;
    case "leaves":
      return `world ${at}`;
    case "rejected":
      return "refused";
    default:
      return "nothing";
  }
}

function describe(
  index: number,
  firewall: Generated,
  sent: Sent,
  groups: Way[][],
  met: string,
  errno: string,
): string {
  const told = groups.map(([way]) =>
    way === undefined
      ? ""
      : `${expectation(way)}\n${way.hops.map(({ hook, chain, rule }) => `      ${hook} ${chain.table} ${chain.name}: ${rule?.text ?? "policy"}`).join("\n")}`,
  );
  return `firewall ${index} (${firewall.backend}): ${JSON.stringify(sent)}\n  kernel: ${met} ${errno}\n  said: ${told.join("\n   or ")}`;
}

function observe(lab: Lab): {
  next(): Promise<string>;
  send(sent: readonly Sent[]): Promise<{ met: string; errno: string }[]>;
  end(): void;
} {
  const script = new URL("../netns/packets.py", import.meta.url).pathname;
  const child = spawn("/usr/bin/python3", [script, lab.machine, lab.world], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const next = async (): Promise<string> => {
    const { value, done } = await lines.next();
    if (done) throw new Error("the observer has ended");
    return value;
  };
  return {
    next,
    async send(sent) {
      child.stdin.write(`${JSON.stringify(sent)}\n`);
      return JSON.parse(await next());
    },
    end: () => child.kill(),
  };
}
