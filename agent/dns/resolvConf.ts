import { ipFamily } from "../core/net.ts";

export interface ResolvConf {
  readonly servers: readonly string[];
  readonly search: readonly string[];
}

/**
 * The parts of resolv.conf(5) that matter here. The last `search` or `domain` line wins; without a nameserver the
 * resolver library asks the local one, and so do we.
 */
export function parseResolvConf(text: string): ResolvConf {
  const { servers, search } = readResolvConf(text);
  return { servers: servers.length === 0 ? ["127.0.0.1"] : servers, search };
}

/** As written: no server, if none is named. */
export function readResolvConf(text: string): ResolvConf {
  const servers: string[] = [];
  let search: string[] = [];
  for (const line of text.split("\n")) {
    const [keyword, ...values] = line
      .replace(/[#;].*$/, "")
      .trim()
      .split(/\s+/);
    if (keyword === "nameserver") {
      const address = values[0] ?? "";
      if (ipFamily(withoutZone(address)) !== undefined && !servers.includes(address)) servers.push(address);
    } else if (keyword === "search" || keyword === "domain") {
      search = values.map((domain) => domain.replace(/\.$/, "")).filter((domain) => domain !== "");
    }
  }
  return { servers, search };
}

/** systemd-resolved itself, as programs that read resolv.conf know it. */
export const RESOLVED_STUB = "127.0.0.53";

/** Addresses whose port 53 is captured: a rule knows no zone, `fe80::1%eth0` is `fe80::1` to it. */
export function capturedServers(text: string): string[] {
  return [...new Set(parseResolvConf(text).servers.map(withoutZone))];
}

function withoutZone(address: string): string {
  return address.split("%")[0] ?? "";
}
