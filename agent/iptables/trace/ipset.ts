import { splitWords } from "../parse.ts";
import { type Reads, tryRun } from "../read.ts";
import type { Family } from "../rules.ts";
import {
  addressesOf,
  addressNumber,
  allTri,
  anyTri,
  isUnknown,
  type Packet,
  PROTOCOL_NUMBER,
  parseSpan,
  protocolNumber,
  span,
  type Tri,
  within,
} from "./packet.ts";

/** A set of ipset(8), as `ipset save` prints it. */
interface IpSet {
  /** `ip`, `net`, `port` …; `set` of a list of sets. */
  readonly parts: readonly string[];
  /** undefined: of either. */
  readonly family: Family | undefined;
  /** What is taken of an address before it is looked up. */
  readonly mask: bigint;
  readonly elements: readonly { readonly parts: readonly string[]; readonly nomatch: boolean }[];
}

/** By name; undefined: this machine's ipset cannot be asked. */
export type IpSets = ReadonlyMap<string, IpSet>;

export async function readIpSets(host: Reads): Promise<IpSets> {
  return parseIpSets((await tryRun(host, { argv: ["ipset", "save"] }))?.stdout ?? "");
}

/** Output of `ipset save`. */
export function parseIpSets(text: string): IpSets {
  const sets = new Map<string, Omit<IpSet, "elements"> & { elements: IpSet["elements"][number][] }>();
  for (const line of text.split("\n")) {
    const [what, name = "", kind = "", ...options] = splitWords(line);
    const after = (option: string): string | undefined => {
      const at = options.indexOf(option);
      return at < 0 ? undefined : options[at + 1];
    };
    if (what === "create") {
      const [, parts = ""] = kind.split(":");
      const family = after("family");
      const bits = after("netmask");
      const mask = after("bitmask");
      sets.set(name, {
        parts: parts.split(","),
        family: family === "inet" ? 4 : family === "inet6" ? 6 : undefined,
        mask:
          mask !== undefined ? (addressNumber(mask) ?? -1n) : netmask(bits, family === "inet6" ? 128 : 32),
        elements: [],
      });
    } else if (what === "add")
      sets.get(name)?.elements.push({ parts: kind.split(","), nomatch: options.includes("nomatch") });
  }
  return sets;
}

const netmask = (bits: string | undefined, width: number): bigint =>
  bits === undefined ? -1n : -1n << BigInt(width - Number(bits));

/**
 * `--match-set NAME src,dst`: each direction is for one part of the set's type.
 *
 * @see ipset(8); of the networks that hold an address the most specific one decides (ip_set_hash_gen.h)
 */
export function inIpSet(sets: IpSets, name: string, packet: Packet, directions: readonly string[]): Tri {
  const set = sets.get(name);
  if (set === undefined) return { unknown: `what the ipset ${name} holds` };
  if (set.parts[0] === "set")
    return anyTri(set.elements.map(({ parts: [member = ""] }) => inIpSet(sets, member, packet, directions)));
  if (directions.length < set.parts.length || (set.family ?? packet.family) !== packet.family) return false;
  let best: { size: bigint; nomatch: boolean } | undefined;
  const unsure: Tri[] = [];
  for (const { parts, nomatch } of set.elements) {
    const hit = allTri(
      set.parts.map((part, index) =>
        holds(part, parts[index] ?? "", packet, directions[index] === "src", set.mask),
      ),
    );
    if (isUnknown(hit)) unsure.push(hit);
    if (hit !== true) continue;
    const size = sizeOf(parts);
    if (best === undefined || size < best.size) best = { size, nomatch };
  }
  if (best !== undefined) return !best.nomatch;
  const all = anyTri(unsure);
  // With exceptions it is another question than that of its networks.
  return isUnknown(all) && set.elements.some(({ nomatch }) => nomatch)
    ? { unknown: all.unknown.replace(": ", ` by the set ${name}: `) }
    : all;
}

function sizeOf(parts: readonly string[]): bigint {
  return parts.reduce((size, part) => {
    const range =
      part.includes(":") && !part.includes("::") && !part.includes("/") ? undefined : parseSpan(part);
    return range === undefined ? size : size * (range.high - range.low + 1n);
  }, 1n);
}

function holds(part: string, element: string, packet: Packet, source: boolean, mask: bigint): Tri {
  const side = source ? "from" : "to";
  switch (part) {
    case "ip":
    case "net": {
      const wanted = parseSpan(element);
      const addresses =
        source && packet.fromAnywhere ? addressesOf(packet, side) : span(packet[side].address & mask);
      return wanted === undefined
        ? { unknown: `whether \`${element}\` of an ipset holds the address` }
        : within(addresses, wanted);
    }
    case "port": {
      const [, protocol, port = ""] = /^(?:([^:]+):)?(.*)$/.exec(element) ?? [];
      const icmp = packet.protocol === "icmp";
      // One without protocol is of a bitmap, which knows TCP and UDP only. (ip_set_getport.c)
      if (protocol === undefined ? icmp : PROTOCOL_NUMBER[protocol] !== protocolNumber(packet)) return false;
      // ICMP has type and code in its place.
      if (icmp) return port === "echo-request";
      const wanted = parseSpan(port);
      return wanted === undefined
        ? { unknown: `what port \`${port}\` of an ipset is` }
        : within(packet[side].port, wanted);
    }
    case "iface":
      return (source ? packet.in : packet.out) === element;
    case "mark":
      return packet.mark === BigInt(element);
    default:
      return { unknown: `what \`${part}\` of an ipset is` };
  }
}
