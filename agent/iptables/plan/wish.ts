import { VmmeshError } from "../../core/errors.ts";
import { ipFamily, parseHostPort } from "../../core/net.ts";
import type { PolicyRule } from "../policy.ts";
import type { Family } from "../rules.ts";

/** Processes by the ids that their sockets carry. */
export interface Senders {
  readonly uids: readonly number[];
  readonly gids: readonly number[];
}

/** What is wanted, in words of the mesh. */
export interface CaptureWish {
  readonly agentUid: number;
  readonly envoyUid: number;
  readonly inbound:
    | { readonly kind: "ports"; readonly ports: readonly number[] }
    | { readonly kind: "all"; readonly excludePorts: readonly number[] };
  /** How inbound connections reach Envoy; absent: REDIRECT. */
  readonly interception?: Interception;
  /** Added to the ports on which sshd is seen to listen. */
  readonly sshPorts: readonly number[];
  readonly outbound: {
    /** `["*"]` is everything. */
    readonly cidrs: readonly string[];
    readonly excludeCidrs: readonly string[];
    readonly excludePorts: readonly number[];
    /** Captured wherever they lead. */
    readonly includePorts?: readonly number[];
  };
  /** Whose connections and questions are captured. Unset: everybody's. */
  readonly senders?: {
    /** Nobody but these; empty: everybody. */
    readonly only: Senders;
    /** Wins over `only`. */
    readonly never: Senders;
  };
  /** Where the mesh's services live: always captured, and closed when Envoy is down. */
  readonly meshCidrs: readonly string[];
  /** Servers of resolv.conf whose port 53 goes to the agent. */
  readonly dns: { readonly servers: readonly string[] } | undefined;
  readonly ipv6: boolean;
  /** `ip:port`, let through. */
  readonly istiod: readonly string[];
  /** Management networks, let through. */
  readonly keep: readonly string[];
  /** What differs from: declared inbound ports and the mesh closed, the rest open. */
  readonly failurePolicy?: readonly PolicyRule[];
}

/**
 * `REDIRECT` changes the address that the connection goes to, `TPROXY` leaves both addresses as they are: the application
 * sees the client's, and the machine's own firewall judges the port that was dialled.
 */
export type Interception =
  | { readonly mode: "REDIRECT" }
  /** `routeTable`: where the answers to the client's address are turned back to Envoy. */
  | { readonly mode: "TPROXY"; readonly routeTable: number };

/** The table that Istio's start script uses, too (ISTIO_INBOUND_TPROXY_ROUTE_TABLE). */
export const DEFAULT_ROUTE_TABLE = 133;

/** Which iptables program writes into which tables of the kernel. */
export type Backend = "nft" | "legacy";

/** What was read from this machine (`readMachine`) and decides how the wish becomes rules. */
export interface MachineFacts {
  /** undefined: there is no usable iptables, the guard does it alone. */
  readonly backend: Backend | undefined;
  readonly backendWhy: string;
  /** Program names, e.g. `iptables-nft`; `6` is undefined where there is no ip6tables. */
  readonly programs: Readonly<Record<Family, string | undefined>>;
  /** `nft` and nf_tables work: guard and fence are possible. */
  readonly nft: boolean;
  /** The kernel has IPv6 at all (ipv6.disable=1 takes it away). */
  readonly ipv6: boolean;
  /** nft can set conntrack timeouts (CONFIG_NF_CONNTRACK_TIMEOUT). */
  readonly dnsTimeouts: boolean;
  readonly sshPorts: readonly number[];
}

export function check(wish: CaptureWish): void {
  const wrong = (what: string): never => {
    throw new VmmeshError("USAGE", what, {
      next: "Correct it in the join options or sidecar.env, then run the command again.",
    });
  };
  for (const uid of [wish.agentUid, wish.envoyUid]) {
    if (!Number.isInteger(uid) || uid <= 0) {
      wrong(`uid ${uid} cannot be exempted from capture: it must be a dedicated user, not root`);
    }
  }
  const ports = [
    ...wish.sshPorts,
    ...wish.outbound.excludePorts,
    ...(wish.outbound.includePorts ?? []),
    ...(wish.inbound.kind === "ports" ? wish.inbound.ports : wish.inbound.excludePorts),
  ];
  for (const port of ports) {
    if (!Number.isInteger(port) || port < 1 || port > 65535) wrong(`${port} is not a port`);
  }
  if (wish.interception?.mode === "TPROXY") {
    const { routeTable } = wish.interception;
    // 0 is no table; 253 to 255 are the kernel's own (rtnetlink(7)).
    if (!Number.isInteger(routeTable) || routeTable < 1 || routeTable > 252) {
      wrong(`${routeTable} is not a routing table of one's own: it must be between 1 and 252`);
    }
  }
  const cidrs = [
    ...wish.outbound.cidrs.filter((cidr) => cidr !== "*"),
    ...wish.outbound.excludeCidrs,
    ...wish.meshCidrs,
    ...wish.keep,
  ];
  for (const cidr of [...cidrs, ...(wish.dns?.servers ?? [])]) {
    if (familyOf(cidr) === undefined) wrong(`"${cidr}" is not an IP address or prefix`);
  }
  for (const target of wish.istiod) {
    if (parseHostPort(target) === undefined) wrong(`"${target}" is not ip:port`);
  }
}

/** Family of an address or prefix; undefined if it is neither. */
export function familyOf(cidr: string): Family | undefined {
  const [address = "", bits, ...rest] = cidr.split("/");
  const family = ipFamily(address);
  if (family === undefined || rest.length > 0) return undefined;
  if (bits !== undefined && !(/^\d{1,3}$/.test(bits) && Number(bits) <= (family === 4 ? 32 : 128)))
    return undefined;
  return family;
}
