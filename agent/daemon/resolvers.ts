import { RESOLV_CONF } from "../core/paths.ts";
import { capturedServers, readResolvConf } from "../dns/resolvConf.ts";
import { readState } from "../iptables/apply.ts";
import type { Host } from "../platform/host.ts";

/**
 * Does resolv.conf name other servers than those whose questions the confirmed rules capture? A file that names none, as
 * at the end of a DHCP lease, asks for nothing.
 */
export async function resolversChanged(host: Pick<Host, "files">, rulesDir: string): Promise<boolean> {
  const text = (await host.files.readText(RESOLV_CONF)) ?? "";
  const confirmed = await readState(host.files, rulesDir, "confirmed");
  if (confirmed?.state.plan.resolvers === undefined || readResolvConf(text).servers.length === 0)
    return false;
  const captured = [...confirmed.state.plan.resolvers].sort();
  return capturedServers(text).sort().join() !== captured.join();
}
