import { bracketed, type Cidr, ipFamily, ipv4Bytes, ipv6Bytes, parseCidr } from "../../core/net.ts";
import type { Family } from "../rules.ts";

/** Numbers from `low` to `high`, both included: an address, a port, a mark, or one of several that cannot be told apart. */
export interface Span {
  readonly low: bigint;
  readonly high: bigint;
}

/** What only the kernel can say; `oneOf` if the possible values are known. */
export interface Unknown {
  readonly unknown: string;
  readonly oneOf?: readonly Value[];
}

/** A number, a name (interface, conntrack state), or several values side by side (nft's concatenation). */
export type Value = Span | string | readonly Value[];
/** undefined: the packet has no such thing, and a rule that asks for it does not match. */
export type Got = Value | Unknown | undefined;
/** The answer of one match. */
export type Tri = boolean | Unknown;

export const isUnknown = (got: Got | Tri): got is Unknown => typeof got === "object" && "unknown" in got;
export const isSpan = (got: Got): got is Span => typeof got === "object" && "low" in got;

export function span(low: number | bigint, high: number | bigint = low): Span {
  return { low: BigInt(low), high: BigInt(high) };
}

/** @returns undefined if `text` is no address */
export function addressNumber(text: string): bigint | undefined {
  const bytes = ipv4Bytes(text) ?? ipv6Bytes(text);
  return bytes?.reduce((number, byte) => (number << 8n) | BigInt(byte), 0n);
}

export function addressText(address: bigint, family: Family): string {
  if (family === 4) return [24n, 16n, 8n, 0n].map((bits) => (address >> bits) & 255n).join(".");
  const groups = Array.from({ length: 8 }, (_, index) =>
    ((address >> BigInt(112 - 16 * index)) & 0xffffn).toString(16),
  );
  const zeros = [...groups.join(":").matchAll(/(?<=^|:)0(:0)+(?=:|$)/g)].sort(
    (a, b) => b[0].length - a[0].length,
  )[0];
  const text = groups.join(":");
  if (zeros === undefined) return text;
  return `${text.slice(0, zeros.index).replace(/:$/, "")}::${text.slice(zeros.index + zeros[0].length).replace(/^:/, "")}`;
}

export function prefixSpan(text: string): Span | undefined {
  const [address = "", mask = ""] = text.split("/");
  const cidr = parseCidr(mask.includes(".") ? `${address}/${maskBits(mask)}` : text);
  return cidr === undefined ? undefined : cidrSpan(cidr);
}

function maskBits(mask: string): number {
  return (addressNumber(mask) ?? 0n).toString(2).replaceAll("0", "").length;
}

function cidrSpan({ family, address, bits }: Cidr): Span {
  const host = (1n << BigInt((family === 4 ? 32 : 128) - bits)) - 1n;
  const low = (addressNumber(address) ?? 0n) & ~host;
  return { low, high: low | host };
}

export const PROTOCOL_NUMBER: Readonly<Record<string, number>> = {
  icmp: 1,
  tcp: 6,
  udp: 17,
  dccp: 33,
  esp: 50,
  ah: 51,
  "ipv6-icmp": 58,
  icmpv6: 58,
  sctp: 132,
  udplite: 136,
};

/** ICMP: an echo request, of either family. */
export type Protocol = "tcp" | "udp" | "icmp";

export function protocolNumber({ protocol, family }: Pick<Packet, "protocol" | "family">): number {
  return PROTOCOL_NUMBER[protocol === "icmp" && family === 6 ? "icmpv6" : protocol] ?? 0;
}

export interface Endpoint {
  readonly address: bigint;
  /** 0 of ICMP, which has none. */
  readonly port: Span;
}

/** Who sends, as far as rules can ask. */
export interface Sender {
  readonly uid: number;
  /** undefined: a bare number of a user that does not exist here. */
  readonly gid: number | undefined;
  /** In the cgroup2 hierarchy, without a leading slash; undefined: not known. */
  readonly cgroup: string | undefined;
}

interface Ends {
  readonly from: Endpoint;
  readonly to: Endpoint;
}

/** The first packet of a connection, at one place of its way. */
export interface Packet extends Ends {
  readonly family: Family;
  readonly protocol: Protocol;
  /** As conntrack remembers it: before any translation. */
  readonly original: Ends;
  readonly mark: bigint;
  readonly ctMark: bigint;
  /** `zoned`: not looked at by conntrack yet, but a later NOTRACK comes too late (xt_CT.c: the first one stays). */
  readonly tracking: "not yet" | "zoned" | "tracked" | "untracked";
  /** Directions for which conntrack has settled the translation; the nat chains of that direction run only once. */
  readonly settled: { readonly source: boolean; readonly destination: boolean };
  readonly translated: { readonly source: boolean; readonly destination: boolean };
  readonly in: string | undefined;
  readonly out: string | undefined;
  /** undefined from outside, and once the packet has gone through lo. */
  readonly sender: Sender | undefined;
  /** Conntrack has the connection in its table (it has left or reached the machine once). */
  readonly confirmed: boolean;
  /** Taken by TPROXY for the listener there, without a change of its own address. */
  readonly proxied: Endpoint | undefined;
  /** By what it was routed last: anew on its way out, or on its way in. */
  readonly routed?: { readonly to: bigint; readonly from: bigint; readonly mark: bigint };
  /** It stands for those of every sender outside: `from.address` means nothing. */
  readonly fromAnywhere?: true;
}

const ANYWHERE: Readonly<Record<Family, Span>> = {
  4: { low: 0n, high: (1n << 32n) - 1n },
  6: { low: 0n, high: (1n << 128n) - 1n },
};
/** No packet from outside has such a source. (ip_route_input_slow: martian) */
const LOOPBACK: Readonly<Record<Family, Span>> = {
  4: { low: 0x7f000000n, high: 0x7fffffffn },
  6: { low: 1n, high: 1n },
};

/** What cannot be told of a packet that stands for those of every sender; behind a colon, what was asked. */
export const ITS_SOURCE = "where it comes from";
const ASKED = `${ITS_SOURCE}: `;

/** Has this reason one answer for one sender, in whatever rule? */
export const isAskedOfSource = (because: string): boolean => because.startsWith(ASKED);

export function addressesOf(packet: Packet, side: "from" | "to", at: Ends = packet): Span {
  return side === "from" && packet.fromAnywhere ? ANYWHERE[packet.family] : span(at[side].address);
}

export function endpointText({ address, port }: Endpoint, family: Family): string {
  const host = addressText(address, family);
  return port.high === 0n ? host : `${bracketed(host)}:${spanText(port)}`;
}

export function spanText({ low, high }: Span): string {
  return low === high ? `${low}` : `${low}-${high}`;
}

/** `10.0.0.1`, `10.0.0.1-10.0.0.9`, `10.0.0.0/8`, `80`, `1000:2000`, `0x1`; undefined if it is none of them. */
export function parseSpan(text: string): Span | undefined {
  if (text.includes("/")) return prefixSpan(text);
  const one = (part: string): bigint | undefined =>
    ipFamily(part) !== undefined
      ? addressNumber(part)
      : /^(0x[0-9a-fA-F]+|\d+)$/.test(part)
        ? BigInt(part)
        : undefined;
  const single = one(text);
  if (single !== undefined) return { low: single, high: single };
  const range = /^([^-:]*|[^-]*:[^-]*)[-:]([^-]*)$/.exec(text);
  if (range === null) return undefined;
  const [, from = "", to = ""] = range;
  const low = one(from === "" ? "0" : from);
  const high = one(to === "" ? "65535" : to);
  return low === undefined || high === undefined ? undefined : { low, high };
}

/** Inside: true; apart: false; else it depends on what is not known. */
export function within(value: Span, pattern: Span): Tri {
  if (value.low >= pattern.low && value.high <= pattern.high) return true;
  if (value.high < pattern.low || value.low > pattern.high) return false;
  const family = ([4, 6] as const).find((each) => ANYWHERE[each].high === value.high);
  if (family !== undefined) {
    const { low, high } = LOOPBACK[family];
    if (pattern.low >= low && pattern.high <= high) return false;
    const [from, to] = [addressText(pattern.low, family), addressText(pattern.high, family)];
    return { unknown: `${ASKED}${from === to ? from : `${from}-${to}`}` };
  }
  return { unknown: `the source port is chosen by the kernel from ${spanText(value)}` };
}

export function notTri(tri: Tri): Tri {
  if (!isUnknown(tri)) return !tri;
  return tri.unknown.startsWith(ASKED) ? { unknown: tri.unknown.replace(ASKED, `${ASKED}not `) } : tri;
}

/** True if any is, else unknown if any is. */
export function anyTri(all: Iterable<Tri>): Tri {
  let unknown: Unknown | undefined;
  const sources = new Set<string>();
  for (const tri of all) {
    if (tri === true) return true;
    if (!isUnknown(tri)) continue;
    if (tri.unknown.startsWith(ITS_SOURCE)) sources.add(tri.unknown.replace(ASKED, ""));
    else unknown = tri;
  }
  if (unknown !== undefined || sources.size === 0) return unknown ?? false;
  // All of them: what is asked of one port may name other networks than what is asked of another.
  return { unknown: `${sources.has(ITS_SOURCE) ? `${ITS_SOURCE}, ` : ASKED}${[...sources].join(" or ")}` };
}

/** False if any is, else unknown if any is. */
export function allTri(all: Iterable<Tri>): Tri {
  let unknown: Unknown | undefined;
  for (const tri of all) {
    if (tri === false) return false;
    if (isUnknown(tri)) unknown = tri;
  }
  return unknown ?? true;
}
