import { messageOf } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import { readFenceCounts } from "../iptables/counts.ts";
import type { Applies } from "../iptables/generation.ts";
import { loadConfirmed } from "../iptables/load.ts";
import { tryRun } from "../iptables/read.ts";
import type { Host } from "../platform/host.ts";
import { UNITS } from "../platform/services.ts";
import { readCaptureState, writeCaptureState } from "./captureState.ts";
import { startFailedPaths } from "./failedPaths.ts";
import { resolversChanged } from "./resolvers.ts";

/**
 * Puts the confirmed rules right and says what was mended. Takes no word from anybody. What it does on every run is little
 * and loads little: an order that was lost waits for it.
 *
 * @throws {VmmeshError} RULES_REJECTED, RULES_PRIVILEGE, STATE_UNREADABLE
 */
export async function repairCapture(
  host: Applies & Pick<Host, "net">,
  paths: Paths,
  say: (line: string) => void,
): Promise<void> {
  const report = await loadConfirmed(host, paths.rules);
  if (report.state === "nothing confirmed") return;
  await startFailedPaths(host, say);
  // systemd's path unit watches the file behind a link, and does not see another put in the place of the link.
  if (await resolversChanged(host.files, report.resolvers))
    await tryRun(host, { argv: ["systemctl", "start", "--no-block", UNITS.resolvers] });
  const state = await readCaptureState(host.files, paths);
  for (const line of report.repaired) say(`repaired: ${line}`);
  const counts = await readFenceCounts(host);
  const counted = JSON.stringify(counts) === JSON.stringify(state.counts);
  if (state.inForce && report.repaired.length === 0 && counted) return;
  await writeCaptureState(host, paths, {
    inForce: true,
    ...(report.backend === undefined ? {} : { backend: report.backend }),
    ...(counts === undefined ? {} : { counts }),
    repairs: state.repairs + report.repaired.length,
    ...(state.inForce ? {} : await words(host, paths, say)),
  });
}

/** The words of `vmmesh status` are lost with /run at a reboot; only then the mesh's papers are read, with all that reads them. */
async function words(
  host: Pick<Host, "files" | "net">,
  paths: Paths,
  say: (line: string) => void,
): Promise<{ inbound: string; outbound: string } | undefined> {
  try {
    const [{ captureWords }, { readWorkload }] = await Promise.all([
      import("./capture.ts"),
      import("./workloadFiles.ts"),
    ]);
    return captureWords(await readWorkload(host, paths));
  } catch (thrown) {
    say(`what is captured cannot be told: ${messageOf(thrown)}`);
    return undefined;
  }
}
