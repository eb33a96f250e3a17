import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { addressText, type Protocol } from "../../agent/iptables/trace/packet.ts";
import { openTrace, type Question, type Trace, ways } from "../../agent/iptables/trace/trace.ts";
import { isBalanced, isCut, type Way } from "../../agent/iptables/trace/walk.ts";
import type { CommandResult, Host } from "../../agent/platform/host.ts";
import { Cgroup } from "../netns/cgroup.ts";
import { Lab, MACHINE, REMOTE } from "../netns/lab.ts";
import { CLOSED, KINDS, watched } from "../netns/met.ts";
import { CAST, Dice, type Generated, generate, HOOKS, LISTENING, PORTS, UIDS } from "../netns/rulesets.ts";
import type { Scale } from "../suite.ts";
import { type Proof, type ProofRow, row } from "./proof.ts";

interface Sent {
  readonly at: "machine" | "world";
  readonly uid: number;
  readonly inCgroup: boolean;
  readonly protocol: Protocol;
  readonly to: string;
  readonly port: number;
  readonly fromPort: number;
  readonly from?: string;
}

/** `each`: of every feature that a firewall may have, so many packets have met a rule that was true of them. */
const SCALE: Readonly<Record<Scale, { rulesets: number; packets: number; each: number }>> = {
  quick: { rulesets: 20, packets: 50, each: 1 },
  full: { rulesets: 100, packets: 100, each: 50 },
};

/** The simulator against the kernel: random packets through random firewalls, seen by raw sockets and on the wire. */
export const proof: Proof = {
  name: "trace",
  about: "what `vmmesh iptables trace` says against what the kernel does with the same packet",
  run: async (scale) => await prove(scale),
};

/**
 * Of the dice: every run meets the same firewalls, so that a disagreement can be met again.
 * Others: VMMESH_DICE=5 npm run prove:capture -- --only trace
 */
const SEED = Number(process.env["VMMESH_DICE"] ?? 4);

async function prove(scale: Scale): Promise<ProofRow[]> {
  const { rulesets, packets, each: enough } = SCALE[scale];
  await using lab = await Lab.make();
  using cgroup = new Cgroup(`vmmesh-proof-${lab.machine}`);
  await prepare(lab);
  using observer = observe(lab, cgroup);
  await observer.next();
  const host = observed(lab.host);
  const count = { packets: 0, agreed: 0, one: 0, oneRight: 0, may: 0, mayRight: 0, mayWhy: 0 };
  const disagreements: string[] = [];
  const kinds = new Counts();
  const met = new Counts();
  // Past every port that somebody listens on.
  let fromPort = 20_000;
  for (let index = 0; index < rulesets; index++) {
    const dice = new Dice(SEED * 100_000 + index);
    const firewall = generate(dice, cgroup.path);
    await load(lab, firewall);
    const sent = Array.from({ length: packets }, () => packet(dice, fromPort++));
    const traces = { 4: await openTrace(host, 4), 6: await openTrace(host, 6) };
    const said: Way[][][] = [];
    for (const each of sent) {
      const { groups, features } = await walked(
        traces[each.to.includes(":") ? 6 : 4],
        question(each, cgroup.path),
      );
      said.push(groups);
      for (const feature of features) met.add(feature);
      met.add(each.protocol.toUpperCase());
      met.add(each.to.includes(":") ? "IPv6" : "IPv4");
    }
    const seen = await observer.send(sent);
    for (const [at, each] of sent.entries()) {
      const groups = said[at] ?? [];
      const expected = groups.map(([way]) => (way === undefined ? "" : expectation(way)));
      const became = seen[at]?.met ?? "";
      count.packets++;
      kinds.add(became.split(" ")[0] ?? "");
      if (isBalanced(groups) && !groups.some(isCut)) {
        count.one++;
        if (expected.includes(became)) count.oneRight++;
      } else if (new Set(expected).size > 1 || groups.some(isCut)) {
        count.may++;
        if (expected.includes(became)) count.mayRight++;
        if (groups.flat().some(({ because }) => because.length > 0)) count.mayWhy++;
      } else if (expected[0] === became) count.agreed++;
      if (!expected.includes(became))
        disagreements.push(describe(index, firewall, each, groups, became, seen[at]?.errno ?? ""));
    }
  }
  for (const line of disagreements.slice(0, 20)) process.stderr.write(`${line}\n`);
  const certain = count.packets - count.may - count.one;
  const share = (part: number, whole: number): number => (whole === 0 ? 100 : (100 * part) / whole);
  const say = (what: string, value: number, unit: string, bound: string): ProofRow =>
    row("trace", what, value, unit, bound);
  return [
    say(
      `random packets over ${rulesets} generated firewalls (${kinds})`,
      count.packets,
      "packets",
      `>= ${rulesets * packets}`,
    ),
    say(
      `certain answers that the kernel agreed with (dice ${SEED})`,
      share(count.agreed, certain),
      "%",
      "= 100",
    ),
    say("answers with all targets that a balancer chooses from", count.one, "packets", `>= ${enough}`),
    say(
      "answers with a balancer's targets that name the kernel's choice",
      share(count.oneRight, count.one),
      "%",
      "= 100",
    ),
    say("answers of the kind may", share(count.may, count.packets), "%", "< 2"),
    say(
      "answers of the kind may that name what the kernel did",
      share(count.mayRight, count.may),
      "%",
      "= 100",
    ),
    say("answers of the kind may that say what is not known", share(count.mayWhy, count.may), "%", "= 100"),
    ...["IPv4", "IPv6", "TCP", "UDP", "ICMP"].map((kind) =>
      say(`packets of ${kind}`, met.of(kind), "packets", `>= ${enough}`),
    ),
    ...KINDS.map((kind) =>
      say(`packets for which a rule held with ${kind}`, met.of(kind), "packets", `>= ${enough}`),
    ),
  ];
}

class Counts {
  readonly #by = new Map<string, number>();
  add(name: string): void {
    this.#by.set(name, this.of(name) + 1);
  }
  of(name: string): number {
    return this.#by.get(name) ?? 0;
  }
  toString(): string {
    return [...this.#by].map(([name, number]) => `${number} ${name}`).join(", ");
  }
}

/** Walked twice: only when every answer of the kernel is there does a packet meet just what it will meet. */
async function walked(trace: Trace, asked: Question): Promise<{ groups: Way[][]; features: Set<string> }> {
  const groups = await ways(trace, asked);
  const features = new Set<string>();
  await ways(
    watched(trace, (feature) => features.add(feature)),
    asked,
  );
  const closed = groups.flat().some(({ hops }) => hops.some(({ rule }) => rule === undefined));
  return { groups, features: closed ? features.add(CLOSED) : features };
}

/**
 * `ip netns exec` leaves /sys/fs/cgroup empty, where nft looks up the names of groups; and the routes, which no firewall
 * changes, are asked for once.
 */
function observed(host: Host): Host {
  const routes = new Map<string, Promise<CommandResult>>();
  return {
    ...host,
    run: async (command, signal) => {
      const { argv } = command;
      if (argv[0] === "nft") return await host.run({ ...command, argv: [...WITH_CGROUPS, ...argv] }, signal);
      if (argv[0] !== "ip" || !argv.includes("get")) return await host.run(command, signal);
      const answer = routes.get(argv.join(" ")) ?? host.run(command, signal);
      routes.set(argv.join(" "), answer);
      return await answer;
    },
  };
}
const WITH_CGROUPS = ["sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh"] as const;

async function prepare(lab: Lab): Promise<void> {
  const table = "10 lookup 100";
  await lab.insideShell(
    [
      "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
      "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0",
      // The kernel says "unreachable" only so often.
      "sysctl -qw net.ipv4.ping_group_range='0 2147483647'",
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
    "net.ipv4.ping_group_range=0 2147483647",
  ]);
  await introduce(lab, lab.machine, lab.world, REMOTE);
  await introduce(lab, lab.world, lab.machine, MACHINE);
}

/** For good: no rule can be in the way of who has which address. */
async function introduce(
  lab: Lab,
  to: string,
  who: string,
  { ip, ip6 }: { readonly ip: string; readonly ip6: string },
): Promise<void> {
  const [link] = JSON.parse(await lab.outside(["ip", "-j", "-n", who, "link", "show", "eth0"])) as {
    address: string;
  }[];
  for (const address of [ip, ip6])
    await lab.outside([
      ...(["ip", "-n", to, "neigh", "replace", address, "lladdr", link?.address ?? ""] as const),
      ...["dev", "eth0", "nud", "permanent"],
    ]);
}

async function load(lab: Lab, { iptables, backend, ipsets, nft }: Generated): Promise<void> {
  // A table that is only flushed keeps its policies.
  const empty = Object.entries(HOOKS)
    .map(([table, hooks]) =>
      [`*${table}`, ...hooks.map((hook) => `:${hook} ACCEPT [0:0]`), "COMMIT", ""].join("\n"),
    )
    .join("");
  const must = async (argv: readonly [string, ...string[]], input: string): Promise<void> => {
    const result = await lab.inside(argv, input);
    if (result.code !== 0) throw new Error(`${argv.join(" ")}: ${result.stderr}\n${input}`);
  };
  for (const six of ["", "6"]) await must([`ip${six}tables-legacy-restore`], empty);
  await must(["nft", "-f", "-"], "flush ruleset\n");
  await must(["ipset", "restore", "-exist"], ipsets);
  for (const family of [4, 6] as const)
    await must([`ip${family === 6 ? "6" : ""}tables-${backend}-restore`], iptables[family]);
  await must([...WITH_CGROUPS, "nft", "-f", "-"], nft);
}

function packet(dice: Dice, fromPort: number): Sent {
  const cast = CAST[dice.chance(0.35) ? 6 : 4];
  const inbound = dice.chance(0.35);
  const protocol = dice.chance(0.65) ? "tcp" : dice.chance(0.7) ? "udp" : "icmp";
  return {
    at: inbound ? "world" : "machine",
    uid: inbound ? 0 : Number(dice.of(UIDS)),
    inCgroup: !inbound && dice.chance(0.3),
    protocol,
    to: inbound && dice.chance(0.7) ? cast.here : dice.of(inbound ? cast.beyond : cast.to),
    port: protocol === "icmp" ? 0 : Number(dice.of(PORTS)),
    fromPort,
    ...(inbound ? { from: dice.of(cast.from) } : {}),
  };
}

const question = (
  { at, to, port, protocol, uid, from, fromPort, inCgroup }: Sent,
  cgroup: string,
): Question => ({
  to: { address: to, port },
  protocol,
  fromPort,
  by:
    at === "world"
      ? { from: from ?? "" }
      : { sender: { uid, gid: 0, cgroup: inCgroup ? cgroup : "" }, label: String(uid) },
});

/** In the observer's words. */
function expectation({ packet: { to, family, protocol }, end }: Way): string {
  const host = addressText(to.address, family);
  const at = `${family === 6 ? `[${host}]` : host}:${protocol === "icmp" ? 0 : to.port.low}`;
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

interface Observer extends Disposable {
  next(): Promise<string>;
  send(sent: readonly Sent[]): Promise<{ met: string; errno: string }[]>;
}

function observe(lab: Lab, cgroup: Cgroup): Observer {
  const script = new URL("../netns/packets.py", import.meta.url).pathname;
  const { proxy, everywhere, one } = LISTENING;
  const words = [lab.machine, lab.world, cgroup.directory, proxy, everywhere, one, MACHINE.ip, MACHINE.ip6];
  const child = spawn("/usr/bin/python3", [script, ...words.map(String)], {
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
    [Symbol.dispose]: () => child.kill(),
  };
}
