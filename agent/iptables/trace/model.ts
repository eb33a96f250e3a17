import type { Family } from "../rules.ts";
import type { IpSets } from "./ipset.ts";
import { isUnknown, type Packet, type Protocol, type Span, type Tri, type Value } from "./packet.ts";

/** Netfilter's places, in the order in which a packet can meet them. */
export type HookName = "ingress" | "prerouting" | "input" | "forward" | "output" | "postrouting" | "egress";

export type Verdict =
  | { readonly do: "accept" | "drop" | "return" | "queue" }
  | { readonly do: "reject"; readonly with: string }
  | { readonly do: "jump" | "goto"; readonly chain: string };

/** What one step of a rule does with a packet. Several: only the kernel knows which, `because` says why. */
export interface Turn {
  readonly packet: Packet;
  readonly does: "on" | "miss" | Verdict;
  readonly because?: string;
}
export type Step = (packet: Packet, world: World) => readonly Turn[];
export type Test = (packet: Packet, world: World) => Tri;

export interface TraceRule {
  /** As its program prints it. */
  readonly text: string;
  readonly comment: string | undefined;
  readonly steps: readonly Step[];
}

export interface Chain {
  /** `iptables-nft nat`, `iptables-legacy filter` or `nft ip vmmesh`: what a person would list to see it. */
  readonly table: string;
  readonly name: string;
  readonly rules: readonly TraceRule[];
}

/** A chain that the kernel calls by itself. */
export interface Base {
  readonly chain: Chain;
  readonly hook: HookName;
  readonly type: string;
  readonly priority: number;
  readonly policy: "accept" | "drop";
  /** Of netdev's and inet's ingress and egress hooks. */
  readonly device: string | undefined;
}

/** The rules of one address family. */
export interface Ruleset {
  readonly bases: readonly Base[];
  /** By `chainKey`. */
  readonly chains: ReadonlyMap<string, Chain>;
}

export const chainKey = (table: string, name: string): string => `${table}\n${name}`;

export interface Route {
  readonly type: string;
  readonly device: string;
  readonly source: bigint | undefined;
  /** The kernel's refusal in its own words; the rest means nothing then. */
  readonly refused?: string;
}

export interface RouteQuestion {
  readonly family: Family;
  readonly to: bigint;
  readonly from?: bigint;
  readonly mark?: bigint;
  readonly uid?: number;
  /** Arriving here: an input route. */
  readonly in?: string;
}

export interface Socket {
  /** Of its process; empty if that cannot be seen. */
  readonly name: string;
  /** Bound to every address. */
  readonly wildcard: boolean;
  /** IP_TRANSPARENT; undefined: this machine's ss cannot say. */
  readonly transparent: boolean | undefined;
}

/** All that a walk may know of the machine beside its rules. `undefined` where nobody can say (yet). */
export interface World {
  route(question: RouteQuestion): Route | undefined;
  /** First address of an interface: what REDIRECT writes for a packet that came in there. */
  addressOf(device: string, family: Family): bigint | undefined;
  /** First address that others may see, of this interface or else of any. (inet_select_addr) */
  visibleAddress(device: string, family: Family): bigint | undefined;
  /** Who listens there; undefined: nobody does. */
  socket(protocol: Protocol, family: Family, address: bigint, port: bigint): Socket | undefined;
  /** Seconds since an address was last put on a list of the `recent` match; undefined: not known. */
  recent(list: string, address: bigint): number | "never" | undefined;
  readonly ipSets: IpSets;
}

export function test(judge: Test): Step {
  return (packet, world) => {
    const tri = judge(packet, world);
    if (!isUnknown(tri)) return [{ packet, does: tri ? "on" : "miss" }];
    return [
      { packet, does: "on", because: tri.unknown },
      { packet, does: "miss", because: tri.unknown },
    ];
  };
}

export const verdict =
  (then: Verdict): Step =>
  (packet) => [{ packet, does: then }];

export const change =
  (how: (packet: Packet, world: World) => Packet): Step =>
  (packet, world) => [{ packet: how(packet, world), does: "on" }];

/** What lets a balancer choose: an answer that is open for no other reason names all it chooses from. */
export const CHANCE = "chance or a count decides";

export const nothing: Step = (packet) => [{ packet, does: "on" }];

export const opaque = (because: string): Step => test(() => ({ unknown: because }));

/** One of those that the kernel may choose. */
export interface Target {
  /** undefined: unchanged. */
  readonly address: bigint | undefined;
  readonly port: Span | undefined;
  /** By what it chooses. */
  readonly because?: string;
}

/** @param choose a sentence: what is not known */
export function translate(
  direction: "source" | "destination",
  choose: (packet: Packet, world: World) => readonly Target[] | string,
): Step {
  return (packet, world) => {
    const side = direction === "source" ? "from" : "to";
    const chosen = choose(packet, world);
    if (typeof chosen === "string") return opaque(chosen)(packet, world);
    return chosen.map(({ address, port, because = "one of several targets is chosen by the kernel" }) => {
      const now = { address: address ?? packet[side].address, port: port ?? packet[side].port };
      const changed = now.address !== packet[side].address || now.port.low !== packet[side].port.low;
      return {
        packet: {
          ...packet,
          [side]: now,
          settled: { ...packet.settled, [direction]: true },
          translated: { ...packet.translated, [direction]: packet.translated[direction] || changed },
        },
        does: { do: "accept" as const },
        ...(chosen.length > 1 ? { because } : {}),
      };
    });
  };
}

/** What REDIRECT writes: the loopback address for our own packets, else the first address of the interface. (nf_nat_redirect.c) */
export function redirect(port: Span | undefined): Step {
  return translate("destination", (packet, world) => {
    if (packet.in === undefined) return [{ address: packet.family === 4 ? 0x7f000001n : 1n, port }];
    const address = world.addressOf(packet.in, packet.family);
    return address === undefined ? `the first address of ${packet.in} is not known` : [{ address, port }];
  });
}

/**
 * TPROXY keeps the addresses and gives the packet to a listener that is allowed to take any. (xt_TPROXY.c, nft_tproxy.c)
 *
 * @param address undefined: the first one of the interface @param port 0: the packet's own
 */
export function tproxy(
  address: bigint | undefined,
  port: Span,
  without: Turn["does"],
  taken: (packet: Packet) => Turn,
): Step {
  return (packet, world) => {
    const { protocol, family } = packet;
    const at = address ?? world.addressOf(packet.in ?? "lo", family) ?? packet.to.address;
    const proxied = port.low === 0n ? packet.to.port : port;
    const socket = world.socket(protocol, family, at, proxied.low);
    const missed: Turn = { packet, does: without };
    if (socket === undefined || socket.transparent === false) return [missed];
    const took = taken({ ...packet, proxied: { address: at, port: proxied } });
    if (socket.transparent === true) return [took];
    const because = `whether ${socket.name || "the listener"} on port ${proxied.low} is transparent`;
    return [
      { ...took, because },
      { ...missed, because },
    ];
  };
}

/** The listener that the packet would get, or was given by TPROXY. (nf_socket_ipv4.c) */
export function socketOf({ protocol, family, to, proxied }: Packet, world: World): Socket | undefined {
  const { address, port } = proxied ?? to;
  return world.socket(protocol, family, address, port.low);
}

/** Masquerading: the address that the outgoing interface would give. */
export const masquerade: Step = translate("source", (packet, world) => {
  const route = world.route({ family: packet.family, to: packet.to.address, mark: packet.mark });
  // Those of lo are for this machine alone, and the route's own source is one of them.
  const source =
    route?.device === "lo" && packet.family === 4 ? world.visibleAddress("lo", 4) : route?.source;
  return source === undefined
    ? "the source address that masquerading takes is not known"
    : [{ address: source, port: undefined }];
});

/**
 * Before conntrack has seen it a packet is "invalid" to a rule that asks; with a zone it carries a template of an entry, and
 * that is new. (xt_conntrack.c, nft_ct.c, xt_CT.c)
 */
export function ctState(packet: Packet): "new" | "untracked" | "invalid" {
  if (packet.tracking === "tracked" || packet.tracking === "zoned") return "new";
  return packet.tracking === "untracked" ? "untracked" : "invalid";
}

export function ctStatus(packet: Packet): readonly string[] {
  return [
    ...(packet.confirmed ? ["confirmed"] : []),
    ...(packet.translated.source ? ["snat"] : []),
    ...(packet.translated.destination ? ["dnat"] : []),
  ];
}

/** Kind of an address as the kernel's routing tables see it: local, unicast, broadcast, multicast … */
export function addressType(world: World, family: Family, address: bigint): Value | { unknown: string } {
  const route = world.route({ family, to: address });
  if (route === undefined) return { unknown: "what kind of address it is" };
  return route.refused === undefined ? route.type : "unicast";
}
