import { SECOND_MS } from "../core/time.ts";
import type { Clock } from "../platform/host.ts";

/** How soon a change of a file is seen. Links that are swapped have no event of their own that one could wait for. */
const LOOK_MS = SECOND_MS;
/** What a loaded machine does not reach: only a clock that was set, or a machine that slept. */
const JUMP_MS = 30 * SECOND_MS;

/**
 * Waits, but not past what may have changed everything: the wall clock jumped or the machine slept meanwhile (timers stand
 * still in suspend), or `changed` says so.
 */
export async function pause(
  clock: Clock,
  ms: number,
  changed: () => Promise<boolean>,
  signal: AbortSignal,
): Promise<"over" | "clock" | "changed"> {
  let left = ms;
  while (left > 0 && !signal.aborted) {
    const slice = Math.min(left, LOOK_MS);
    const before = clock.now().getTime();
    await clock.sleep(slice, signal).catch(() => undefined);
    if (Math.abs(clock.now().getTime() - before - slice) > JUMP_MS) return "clock";
    if (await changed()) return "changed";
    left -= slice;
  }
  return "over";
}
