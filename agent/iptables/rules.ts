import { PORTS } from "../core/paths.ts";

/**
 * The vocabulary of the firewall. A rule is a value that carries its reason; `render.ts` (iptables), `nft.ts` (guard and
 * fence), undo, audit and `describePlan` are functions over it. A new kind of match or verdict is a new member of these
 * unions: the switches over them are exhaustive, so the compiler names every place that has to know.
 */
export type Family = 4 | 6;
export type Table = "raw" | "mangle" | "nat";

/** Built-in chains that we hook into; every other chain name is one of ours. */
export const HOOKS = ["PREROUTING", "OUTPUT"] as const;
export type Hook = (typeof HOOKS)[number];

/** Istio's names where Istio has one, so that tools and people recognise them (VM protocol, ch. 7.2). */
export const CHAIN = {
  output: "ISTIO_OUTPUT",
  dns: "ISTIO_OUTPUT_DNS",
  redirect: "ISTIO_REDIRECT",
  inbound: "ISTIO_INBOUND",
  inRedirect: "ISTIO_IN_REDIRECT",
  tproxy: "ISTIO_TPROXY",
  drop: "ISTIO_DROP",
  virtual: "VMMESH_VIRTUAL",
  lease: "VMMESH_LEASE",
  /** What a wish for certain senders only leads them to. */
  scope: "VMMESH_SCOPE",
} as const;

/**
 * A lease says "this server answered within the last 3 s"; a redirect that carries it lapses with it. `envoy` is kept by
 * the SYN-ACKs to Envoy's own health check, `dns` by the agent's answers. Each address family has its own.
 */
export type Lease = "envoy" | "dns";
export const LEASE_SECONDS = 3;

/** Where Envoy's health check connects to: an address that nothing else uses, on its outbound listener. */
export const LEASE_ADDRESS: Readonly<Record<Family, string>> = { 4: "127.77.0.1", 6: "::6" };
/** Source address of Envoy's inbound connections to the application and of the agent's probes (ch. 7.2, Appendix D). */
export const PASSTHROUGH: Readonly<Record<Family, string>> = { 4: "127.0.0.6", 6: "::6" };
export const LOOPBACK: Readonly<Record<Family, string>> = { 4: "127.0.0.0/8", 6: "::1/128" };
/** What REDIRECT in OUTPUT writes as the new destination (nf_nat_redirect.c). */
export const REDIRECTED_TO: Readonly<Record<Family, string>> = { 4: "127.0.0.1", 6: "::1" };

/**
 * The mark that Envoy puts on its connections to the application in TPROXY mode; istiod writes this number into the listener
 * whatever a machine is told (VM protocol, Appendix on listeners). Only the bits of the mask are looked at and set: above
 * them others keep theirs (netavark 0x3000, kube-proxy 0xc000, Tailscale 0xff0000, Calico 0xffff0000).
 */
export const TPROXY_MARK = { value: 0x539, mask: 0xfff } as const;

/** Units that alone are captured, or that never are. */
export type UnitList = "only" | "never";

/** The set that holds the cgroups of listed units: nft compares those of one depth. */
export function unitSet(list: UnitList, level: number): string {
  return `units_${list}_${level}`;
}

export type Match =
  | { readonly is: "protocol"; readonly protocol: "tcp" | "udp" }
  | { readonly is: "from"; readonly cidr: string }
  | { readonly is: "to"; readonly cidr: string; readonly not?: true }
  /** Destination before any NAT, whether the packet is tracked or not. */
  | { readonly is: "addressedTo"; readonly cidr: string }
  /** Ports before any NAT, whether the packet is tracked or not. */
  | { readonly is: "addressedToPorts"; readonly ports: readonly number[] }
  /** A name, or what it begins with and a `+`. */
  | { readonly is: "in" | "out"; readonly interface: string; readonly not?: true }
  | { readonly is: "fromPorts" | "toPorts"; readonly ports: readonly number[] }
  | { readonly is: "owner"; readonly uid: number; readonly not?: true }
  /** Effective group of the process that made the socket; its further groups do not count. */
  | { readonly is: "ownerGroup"; readonly gid: number }
  /** Made by a process of one of the listed systemd units whose cgroups lie this deep; nft only. */
  | { readonly is: "unit"; readonly list: UnitList; readonly level: number }
  /** The destination is an address of this machine: forwarded packets of containers are none of our business. */
  | { readonly is: "toThisMachine" }
  /** For the fence, whose table serves both families. */
  | { readonly is: "family"; readonly family: Family }
  /** Conntrack takes it for no part of the connection whose ports it carries: it would not be translated back. */
  | { readonly is: "invalid" }
  /** First segment of a TCP connection (`--syn`): a live one that conntrack meets in the middle is never redirected. */
  | { readonly is: "opening" }
  /** Second segment (SYN and ACK): a listener is bound. */
  | { readonly is: "accepted" }
  | { readonly is: "leased"; readonly lease: Lease }
  /** The packet, or the connection that it belongs to, carries `TPROXY_MARK`. */
  | { readonly is: "marked"; readonly on: "packet" | "connection" }
  /** TPROXY has handed the packet to Envoy. For the fence. */
  | { readonly is: "handedOver" };

export type Verdict =
  | { readonly do: "return" }
  | { readonly do: "drop" }
  /** TCP reset: the application fails at once instead of waiting. */
  | { readonly do: "reset" }
  | { readonly do: "jump"; readonly chain: string }
  | { readonly do: "redirect"; readonly port: number }
  /**
   * To the transparent socket on this port, addresses and ports as they are. Where none listens nft goes on with the next
   * rule and iptables drops the packet. @see nft(8), iptables-extensions(8)
   */
  | { readonly do: "tproxy"; readonly port: number }
  /** `TPROXY_MARK` from the packet to its connection, or back. */
  | { readonly do: "saveMark" | "restoreMark" }
  /** Conntrack zone; the first one that a packet gets stays. */
  | { readonly do: "zone"; readonly zone: number }
  | { readonly do: "refresh"; readonly lease: Lease };

export interface Rule {
  readonly table: Table;
  readonly chain: string;
  readonly when: readonly Match[];
  readonly verdict: Verdict;
  /** Becomes the netfilter comment `vmmesh: …` and the rule's line in `plan` and `audit`: ASCII, at most 110 characters. */
  readonly why: string;
  /** iptables has no such target: the rule is in the guard only. */
  readonly guardOnly?: true;
  /** In a hook: after what other programs translate, so that a port published for a container stays theirs. The guard alone has it. */
  readonly late?: true;
}

/** A rule of the fence: filter hooks of a table of its own, both families. */
export interface FenceRule {
  readonly chain: "output" | "input";
  readonly when: readonly Match[];
  /** `count`: let through, and one more in the counter of what went past Envoy. */
  readonly verdict: { readonly do: "return" } | { readonly do: "reset" } | { readonly do: "count" };
  readonly why: string;
}

/** nft keeps 127 bytes of a comment, netfilter's comment match 255; one text serves both. */
export const MAX_WHY = 110;
export const COMMENT_PREFIX = "vmmesh: ";

/** Does a parsed rule carry our comment? */
export function isOurs({ comment }: { readonly comment: string | undefined }): boolean {
  return comment?.startsWith(COMMENT_PREFIX) === true;
}

/** The same of a line as `iptables -S` prints it. */
export function isOurLine(line: string): boolean {
  return line.includes(`"${COMMENT_PREFIX}`);
}

/** Our own listeners: never captured, neither from outside nor through loopback. */
export const OWN_PORTS: readonly number[] = [
  PORTS.outbound,
  PORTS.inbound,
  PORTS.status,
  PORTS.readiness,
  PORTS.dns,
  PORTS.envoyPrometheus,
];

export const TCP: Match = { is: "protocol", protocol: "tcp" };
export const UDP: Match = { is: "protocol", protocol: "udp" };
export const OPENING: Match = { is: "opening" };

/** `1.2.3.4` → `1.2.3.4/32`: the form in which iptables prints it back. */
export function hostCidr(address: string, family: Family): string {
  return address.includes("/") ? address : `${address}/${family === 4 ? 32 : 128}`;
}

/** Does `chain` belong to the kernel's hooks rather than to us? */
export function isHook(chain: string): chain is Hook {
  return (HOOKS as readonly string[]).includes(chain);
}
