import { SECOND_MS } from "../core/time.ts";
import { joinMachine } from "../daemon/joinMachine.ts";
import { leaveMesh } from "../daemon/leave.ts";
import type { Options } from "./commands.ts";
import {
  flag,
  number,
  openContext,
  openServices,
  print,
  requireNetAdmin,
  say,
  takeLock,
  untilInterrupted,
  wantsJson,
} from "./context.ts";

export async function leave(options: Options): Promise<number> {
  const context = openContext(options);
  await requireNetAdmin(context, "vmmesh leave");
  const { services, owners } = await openServices(context);
  await using _lock = await takeLock(context);
  await leaveMesh(
    joinMachine(context.host, context.paths, owners, services, say),
    { withdrawWithinMs: number(options, "withdraw-within") * SECOND_MS, now: flag(options, "now") },
    (line) => say(`- ${line}`),
    untilInterrupted(),
  );
  print(
    wantsJson(options)
      ? { left: true }
      : "left: nothing of vmmesh is in force on this machine; its WorkloadEntry goes within seconds",
  );
  return 0;
}
