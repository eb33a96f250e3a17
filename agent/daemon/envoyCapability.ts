import type { Paths } from "../core/paths.ts";
import type { Workload } from "../mesh/types.ts";
import { setDropIn } from "../platform/dropIn.ts";
import type { Host } from "../platform/host.ts";
import type { Services } from "../platform/services.ts";

/** From this release on CAP_NET_RAW is enough to mark one's own packets (socket(7), SO_MARK); before, it was CAP_NET_ADMIN. */
const MARKS_WITH_NET_RAW = [5, 17] as const;

/**
 * What Envoy needs beyond nothing: in TPROXY mode its listener is transparent (IP_TRANSPARENT, ip(7)) and its connections to
 * the application carry the client's address and a mark.
 *
 * @param release of the kernel, as in /proc/sys/kernel/osrelease
 */
export function envoyCapabilities(mode: Workload["interception"]["mode"], release: string): string[] {
  if (mode !== "TPROXY") return [];
  const [major = 0, minor = 0] = release.split(/[.-]/).map(Number);
  const [wantMajor, wantMinor] = MARKS_WITH_NET_RAW;
  const enough = major > wantMajor || (major === wantMajor && minor >= wantMinor);
  return enough ? ["CAP_NET_RAW"] : ["CAP_NET_RAW", "CAP_NET_ADMIN"];
}

/** A drop-in for Envoy's unit. */
function renderDropIn(capabilities: readonly string[]): string {
  const list = capabilities.join(" ");
  return [
    "# Written by vmmesh: inbound capture by TPROXY needs a transparent listener. Removed by `vmmesh leave`.",
    "[Service]",
    `CapabilityBoundingSet=${list}`,
    `AmbientCapabilities=${list}`,
    "",
  ].join("\n");
}

type Machine = {
  readonly host: Pick<Host, "files">;
  readonly paths: Paths;
  readonly services: Pick<Services, "kind" | "reload">;
};

/**
 * Gives Envoy's unit what the mode needs and no more; it counts from Envoy's next start.
 * @returns whether anything changed. Without systemd nothing does: there is no unit.
 */
export async function grantEnvoy(
  { host, paths, services }: Machine,
  mode: Workload["interception"]["mode"],
): Promise<boolean> {
  if (services.kind !== "systemd") return false;
  const { files } = host;
  const wanted = envoyCapabilities(mode, (await files.readText("/proc/sys/kernel/osrelease")) ?? "");
  const text = wanted.length === 0 ? undefined : renderDropIn(wanted);
  if (!(await setDropIn(files, paths.envoyDropIn, text))) return false;
  await services.reload();
  return true;
}
