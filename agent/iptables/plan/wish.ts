import { VmmeshError } from "../../core/errors.ts";
import { ipFamily, parseHostPort } from "../../core/net.ts";
import type { PolicyRule } from "../policy.ts";
import type { Family } from "../rules.ts";

/** Processes by the ids that their sockets carry. */
export interface Senders {
  readonly uids: readonly number[];
  readonly gids: readonly number[];
  readonly units?: readonly UnitCgroup[];
}

/** A systemd service or slice and its cgroup below the root of the unified hierarchy, e.g. `system.slice/app.service`. */
export interface UnitCgroup {
  readonly unit: string;
  readonly path: string;
  /** Of a slice: the services in it, whose start may make its cgroup anew. */
  readonly services?: readonly string[];
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
  /** Interfaces whose traffic is left alone, in both directions. */
  readonly excludeInterfaces?: readonly string[];
  /** Bridges and taps of containers and machines behind this one: what they forward counts as outbound. */
  readonly virtualInterfaces?: readonly string[];
  /** Drop what conntrack calls invalid, on captured ports. */
  readonly dropInvalid?: boolean;
  /** false: no rule carries its reason, e.g. where the kernel lacks the comment match. */
  readonly ruleComments?: boolean;
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

/** What an operator may ask for: `auto` is the one that the machine really uses, `nftables` tables of our own alone. */
export type BackendWish = "auto" | Backend | "nftables";

/** What was read from this machine (`readMachine`) and decides how the wish becomes rules. */
export interface MachineFacts {
  /** undefined: there is no usable iptables, or it is not wanted; the guard does it alone. */
  readonly backend: Backend | undefined;
  /** Somebody has asked for it. */
  readonly backendAsked?: boolean;
  readonly backendWhy: string;
  /** Program names, e.g. `iptables-nft`; `6` is undefined where there is no ip6tables. */
  readonly programs: Readonly<Record<Family, string | undefined>>;
  /** `nft` and nf_tables work: guard and fence are possible. */
  readonly nft: boolean;
  /** The kernel has IPv6 at all (ipv6.disable=1 takes it away). */
  readonly ipv6: boolean;
  readonly sshPorts: readonly number[];
  /** Names of the interfaces that are there now; absent: not known. */
  readonly interfaces?: readonly string[];
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
  checkInterfaces(wish.excludeInterfaces ?? [], wish.virtualInterfaces ?? []);
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

/** @throws {VmmeshError} USAGE for what is no interface's name, and for one that is to be both excluded and captured */
export function checkInterfaces(excluded: readonly string[], virtual: readonly string[]): void {
  for (const name of [...excluded, ...virtual]) {
    const what = !isInterfaceName(name)
      ? `"${name}" is not the name of a network interface`
      : name === "lo"
        ? "lo is this machine itself: it is neither excluded nor virtual"
        : excluded.includes(name) && virtual.includes(name)
          ? `interface ${name} is both excluded from capture and to be captured`
          : undefined;
    if (what !== undefined)
      throw new VmmeshError("USAGE", what, { next: "`ip link` shows this machine's interfaces." });
  }
}

/** At most 15 bytes, no space and no slash (dev_valid_name in the kernel); `+` at the end stands for any ending (iptables(8)). */
function isInterfaceName(name: string): boolean {
  return /^[A-Za-z0-9_.@:-]{1,15}\+?$/.test(name) && name.length <= 15 && name !== "." && name !== "..";
}

/** Does `pattern` of a rule, which may end in `+`, stand for this interface? */
export function fitsInterface(pattern: string, name: string): boolean {
  return pattern.endsWith("+") ? name.startsWith(pattern.slice(0, -1)) : name === pattern;
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
