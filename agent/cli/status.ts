import { VmmeshError } from "../core/errors.ts";
import { readFenceCounts } from "../iptables/counts.ts";
import { adminClient } from "../telemetry/admin.ts";
import { renderStatus } from "../telemetry/status.ts";
import type { Options } from "./commands.ts";
import { openContext, print, wantsJson } from "./context.ts";

export async function status(options: Options): Promise<number> {
  const { host, paths } = openContext(options);
  if ((await host.files.stat(paths.clusterEnv)) === undefined) {
    throw new VmmeshError("NOT_JOINED", "this machine is not joined to a mesh", {
      next: "Run `vmmesh join --namespace N` or `vmmesh join --bundle DIR`.",
    });
  }
  const told = await adminClient(host.net, paths.adminSocket, host.clock).status();
  // The agent may not read the firewall and tells what was counted up to half a minute ago; root may.
  const counts = process.getuid?.() === 0 ? await readFenceCounts(host) : undefined;
  const snapshot = counts === undefined ? told : { ...told, capture: { ...told.capture, counts } };
  const color = process.stdout.isTTY && (process.env["NO_COLOR"] ?? "") === "";
  print(wantsJson(options) ? snapshot : renderStatus(snapshot, { color, now: host.clock.now() }));
  return snapshot.conditions.some(({ severity }) => severity === "error") ? 1 : 0;
}
