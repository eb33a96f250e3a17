import { RESOLV_CONF } from "../core/paths.ts";
import { capturedServers, readResolvConf } from "../dns/resolvConf.ts";
import type { Host } from "../platform/host.ts";

/**
 * Does resolv.conf name other servers than those whose questions are captured? A file that names none, as at the end of a
 * DHCP lease, asks for nothing.
 *
 * @param captured by the rules in force; undefined: nobody's
 */
export async function resolversChanged(
  files: Pick<Host["files"], "readText">,
  captured: readonly string[] | undefined,
): Promise<boolean> {
  if (captured === undefined) return false;
  const text = (await files.readText(RESOLV_CONF)) ?? "";
  if (readResolvConf(text).servers.length === 0) return false;
  return capturedServers(text).sort().join() !== captured.toSorted().join();
}
