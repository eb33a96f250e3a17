import { tryRun } from "../iptables/read.ts";
import type { Host } from "../platform/host.ts";
import { UNITS } from "../platform/services.ts";

const WATCHES = [UNITS.repair, UNITS.resolversWatch] as const;

/**
 * Starts again the path units that failed, and says so. systemd leaves a path unit failed for good: seen where the kernel
 * had no inotify instance left (fs.inotify.max_user_instances) and where its service met a start limit. Then only the
 * timer is left to see what others change. One that the operator stopped is not failed and stays stopped.
 */
export async function startFailedPaths(host: Pick<Host, "run">, say: (line: string) => void): Promise<void> {
  // One line for each, in this order; there is none where systemd does not run.
  const states = await tryRun(host, { argv: ["systemctl", "is-failed", ...WATCHES] });
  const lines = (states?.stdout ?? "").trimEnd().split("\n");
  for (const [index, unit] of WATCHES.entries()) {
    if (lines[index] !== "failed") continue;
    // Said first: a request that waits for it starts the quick repair, which ends this run.
    say(
      `repaired: ${unit} had failed and is started again; meanwhile changes were seen within half a minute only`,
    );
    const started = await tryRun(host, { argv: ["systemctl", "start", unit] });
    if (started?.code === 0) continue;
    const why = started?.stderr.trim().split("\n", 1)[0] ?? "no systemctl";
    say(
      `${unit} cannot be started (${why}): changes are still seen within half a minute only; if inotify instances are short, raise fs.inotify.max_user_instances`,
    );
  }
}
