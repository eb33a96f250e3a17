import type { Paths } from "../core/paths.ts";
import type { Workload } from "../mesh/types.ts";
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
  const path = paths.envoyDropIn;
  if ((await files.readText(path)) === text) return false;
  if (text === undefined) await removeDropIn(files, path);
  else {
    await files.makeDir(folderOf(path), { mode: 0o755 });
    await files.writeAtomic(path, text, { mode: 0o644 });
  }
  await services.reload();
  return true;
}

/** The folder goes with it, unless somebody else keeps a drop-in there. */
async function removeDropIn(files: Host["files"], path: string): Promise<void> {
  await files.remove(path);
  if ((await files.list(folderOf(path)))?.length === 0) await files.remove(folderOf(path));
}

const folderOf = (path: string): string => path.slice(0, path.lastIndexOf("/"));
