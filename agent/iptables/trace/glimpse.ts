import { PORTS } from "../../core/paths.ts";
import type { Reads } from "../read.ts";
import type { Family } from "../rules.ts";
import type { Socket, World } from "./model.ts";
import { addressNumber, endpointText } from "./packet.ts";
import { openWorld, type Question, ways } from "./trace.ts";

/** CAP_NET_ADMIN, bit 12 (capability.h): without it nobody may read the rules, or change them. */
export async function mayReadRules(files: Pick<Reads["files"], "readText">): Promise<boolean> {
  const status = (await files.readText("/proc/self/status")) ?? "";
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? "0"}`);
  return (effective & (1n << 12n)) !== 0n;
}

/**
 * What /proc, /sys and the routes tell of a packet to somebody who may not read the rules: one sentence each. None of them
 * says what a rule does with it. Nothing is written.
 */
export async function glimpse(host: Reads, question: Question): Promise<string[]> {
  const family: Family = question.to.address.includes(":") ? 6 : 4;
  const open = await openWorld(host, family, { recentLists: [], ipSets: false });
  const [[way] = []] = await ways({ ...open, rules: { bases: [], chains: new Map() } }, question);
  const { world } = open.machine;
  const outbound = "sender" in question.by;
  return [
    ...(way === undefined ? [] : [byRoutes(way.packet.family, question, way.end, world)]),
    ...(question.protocol === "tcp"
      ? [envoyAt(world, family, outbound ? PORTS.outbound : PORTS.inbound)]
      : []),
    ...(await namedTables(host, family)),
    ...(await modules(host)),
    ...(await tracking(host)),
    ...(outbound && "sender" in question.by ? [senderOf(question.by)] : []),
  ];
}

function byRoutes(
  family: Family,
  { to, protocol }: Question,
  end: Awaited<ReturnType<typeof ways>>[number][number]["end"],
  world: World,
): string {
  const address = addressNumber(to.address) ?? 0n;
  const target = endpointText({ address, port: { low: BigInt(to.port), high: BigInt(to.port) } }, family);
  switch (end.kind) {
    case "leaves":
      return `by the routes alone it would leave by ${end.device} to ${target}`;
    case "unroutable":
      return `by the routes alone it would go nowhere: ${end.why}`;
    default: {
      if (protocol === "icmp") return `by the routes alone this machine would answer as ${target}`;
      const socket = world.socket(protocol, family, address, BigInt(to.port));
      return `by the routes alone it would stay on this machine, where ${listens(socket)} on ${target}`;
    }
  }
}

const listens = (socket: Socket | undefined): string =>
  socket === undefined
    ? "nobody listens"
    : `${socket.name || "a program of another user"} listens${socket.wildcard ? " on every address" : ""}`;

function envoyAt(world: World, family: Family, port: number): string {
  const socket = world.socket("tcp", family, family === 4 ? 0x7f000001n : 1n, BigInt(port));
  const way = port === PORTS.outbound ? "outbound" : "inbound";
  return socket === undefined
    ? `nobody listens on ${port}, Envoy's ${way} port: what is redirected there is refused`
    : `${socket.name || "a program of another user"} listens on ${port}, Envoy's ${way} port`;
}

async function namedTables(host: Reads, family: Family): Promise<string[]> {
  const file = `/proc/net/ip${family === 6 ? "6" : ""}_tables_names`;
  const names = await peek(host, file);
  if (names === "") return [`the kernel has no table of iptables-legacy (${file})`];
  if (names !== undefined)
    return [`tables of iptables-legacy: ${names.trim().split("\n").sort().join(", ")} (${file})`];
  return [`whether there are tables of iptables-legacy cannot be seen (${file})`];
}

/** Of a kernel that has netfilter in modules; what is built in is not told. */
const MODULES =
  /^(nf_tables|nft_(chain_nat|redir|tproxy|compat)|ip6?_tables|ip6?table_\w+|nf_nat|xt_(REDIRECT|TPROXY|nat|owner|cgroup)) /gm;

async function modules(host: Reads): Promise<string[]> {
  const text = await peek(host, "/proc/modules");
  const loaded = [...(text ?? "").matchAll(MODULES)].map(([, name = ""]) => name).sort();
  if (loaded.length > 0)
    return [`modules of netfilter that are loaded: ${loaded.join(", ")} (/proc/modules)`];
  const netfilter = await host.files.list("/proc/net/netfilter").catch(() => undefined);
  return [
    netfilter === undefined
      ? "this network namespace has no netfilter (/proc/net/netfilter)"
      : "netfilter is there, and none of it is in a module (/proc/net/netfilter, /proc/modules)",
  ];
}

async function tracking(host: Reads): Promise<string[]> {
  const count = (await peek(host, "/proc/sys/net/netfilter/nf_conntrack_count"))?.trim();
  if (count === undefined || count === "") return [];
  return [
    count === "0"
      ? "conntrack has no entry: nothing is translated at this moment"
      : `conntrack has ${count} entries: something asks it (/proc/sys/net/netfilter/nf_conntrack_count)`,
  ];
}

function senderOf({ sender, label }: Extract<Question["by"], { sender: unknown }>): string {
  const cgroup = sender.cgroup === undefined ? "its cgroup is not known" : `its cgroup is /${sender.cgroup}`;
  return `${label} is uid ${sender.uid}; ${cgroup}`;
}

/** @returns undefined where there is no such file, or none that may be read */
async function peek({ files }: Reads, path: string): Promise<string | undefined> {
  return await files.readText(path).catch(() => undefined);
}
