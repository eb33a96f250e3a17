import { VmmeshError } from "../../core/errors.ts";
import { ipv4Bytes, ipv6Bytes } from "../../core/net.ts";
import type { CompatConfig } from "./flags.ts";
import type { CompatFacts } from "./rules.ts";

/** What lies on the machine; undefined: the file cannot be read. */
export interface Machine {
  readonly addresses: readonly string[];
  readonly resolvConf: string | undefined;
  readonly passwd: string | undefined;
}

/** Given facts stand in for those of the machine. */
export type GivenFacts = Partial<Pick<CompatFacts, "ipv6" | "dnsServers">>;

/**
 * What the peer would find out on this machine.
 *
 * @throws {VmmeshError} NO_ADDRESS or STATE_UNREADABLE where the peer ends with an error
 */
export function compatFacts(config: CompatConfig, machine: Machine, given: GivenFacts = {}): CompatFacts {
  const ipv6 = given.ipv6 ?? ipv6Of(machine.addresses, config.dualStack);
  if (ipv6 === undefined)
    throw new VmmeshError(
      "NO_ADDRESS",
      "this machine has no address that is neither loopback nor link-local",
      {
        next: "Give one to an interface, or say --ipv6 true|false.",
      },
    );
  const needsServers = config.redirectDns && !config.captureAllDns;
  const dnsServers = needsServers
    ? (given.dnsServers ?? (machine.resolvConf === undefined ? undefined : nameServersOf(machine.resolvConf)))
    : [];
  if (dnsServers === undefined)
    throw new VmmeshError("STATE_UNREADABLE", "/etc/resolv.conf cannot be read", {
      next: "Write one, or say --dns-server IP|none.",
    });
  return { ipv6, dnsServers, proxyUid: uidOf(machine.passwd ?? "", config.envoyUser) };
}

/** Words of the `nameserver` lines of a resolv.conf(5), addresses or not. */
function nameServersOf(resolvConf: string): readonly string[] {
  return resolvConf
    .split("\n")
    .map((line) => line.trim().split(/\s+/))
    .flatMap(([keyword, server]) => (keyword === "nameserver" && server !== undefined ? [server] : []));
}

/**
 * The first address that is neither loopback nor link-local says whether there are rules for IPv6, and the kernel lists IPv4
 * first; with dual stack any address of IPv6 does.
 */
function ipv6Of(addresses: readonly string[], dualStack: boolean): boolean | undefined {
  const families = new Set(addresses.map(usableFamily));
  if (families.has(6) && (dualStack || !families.has(4))) return true;
  return families.has(4) ? false : undefined;
}

/** Unlike core's isRoutable, ::6 counts: the peer puts it on lo and then takes it for an address of the machine. */
function usableFamily(address: string): 4 | 6 | undefined {
  const v4 = ipv4Bytes(address);
  if (v4 !== undefined) return v4[0] === 127 || (v4[0] === 169 && v4[1] === 254) ? undefined : 4;
  const v6 = ipv6Bytes(address.split("%")[0] ?? "");
  if (v6 === undefined) return undefined;
  const linkLocal = v6[0] === 0xfe && ((v6[1] ?? 0) & 0xc0) === 0x80;
  const loopback = v6.subarray(0, 15).every((byte) => byte === 0) && v6[15] === 1;
  return linkLocal || loopback ? undefined : 6;
}

/** The peer reads passwd(5) itself, so users of other sources are unknown to it. */
function uidOf(passwd: string, user: string): string | undefined {
  const found = passwd
    .split("\n")
    .map((line) => line.split(":"))
    .find(([name, , uid]) => name === user && /^\d+$/.test(uid ?? ""));
  return found?.[2];
}
