import { messageOf } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Conditions } from "../health/conditions.ts";
import { monitorReader, PACE, Pace, type Writer } from "../iptables/watch.ts";
import type { Host } from "../platform/host.ts";
import type { Logger } from "../telemetry/log.ts";

export interface WatchDeps {
  readonly host: Pick<Host, "clock"> & { readonly files: Pick<Host["files"], "lines" | "stat" | "touch"> };
  readonly paths: Pick<Paths, "nftEvents" | "repairRequest">;
  readonly conditions: Pick<Conditions, "raise" | "clear">;
  readonly log: Logger;
  /** The rules were put right after this program had moved them. */
  onRepaired(by: string): void;
}

/** Where no monitor runs, by when its FIFO is looked for again; the timer of the repair is all there is meanwhile. */
const LOOK_MS = 5 * SECOND_MS;
/** Every other name in the metric is `other`: a label must not grow with what others call their programs. */
const MAX_NAMES = 20;
/** What stood so long without a repair that put anything right, has moved nothing. */
const HARMLESS_MS = SECOND_MS;

/**
 * Reads what vmmesh-nftmon.service hears of the kernel and asks for a repair when somebody may have displaced our rules.
 * Runs until `signal` aborts. Whose it was, is known by program and process; the process's unit is not: the agent sees no
 * other user's /proc, and `iptables` has ended by then.
 */
export async function watchRules(deps: WatchDeps, signal: AbortSignal): Promise<void> {
  const { host, paths, log } = deps;
  const { clock, files } = host;
  while ((await files.stat(paths.nftEvents)) === undefined) await clock.sleep(LOOK_MS, signal);

  const read = monitorReader();
  const pace = new Pace();
  const names = new Set<string>();
  let waiting = false;
  /** Who is most likely to have moved them, until we see them put right. */
  let moved: { readonly by: Writer; readonly at: number; readonly weight: number } | undefined;

  const request = async (): Promise<void> => {
    waiting = false;
    pace.requested(clock.monotonicMs());
    await files.touch(paths.repairRequest);
  };
  const ask = (now: number): Promise<void> | undefined => {
    if (waiting) return undefined;
    const inMs = pace.event(now);
    if (inMs === 0) return request();
    waiting = true;
    void clock
      .sleep(inMs, signal)
      .then(request)
      .catch((thrown: unknown) => {
        if (!signal.aborted) log.warning(`a repair could not be asked for: ${messageOf(thrown)}`);
      });
    return undefined;
  };
  const watchDuel = async (): Promise<void> => {
    while (pace.contested(clock.monotonicMs())) await clock.sleep(SECOND_MS, signal);
    deps.conditions.clear("rules-contested");
  };

  // Whatever happened while nobody read.
  await request();
  for await (const line of files.lines(paths.nftEvents, signal)) {
    const change = read(line);
    if (change === undefined) continue;
    const now = clock.monotonicMs();
    if (change.kind === "lost") {
      log.info("the kernel dropped events on its rules: looking at them all");
      await ask(now);
      continue;
    }
    if (change.kind === "foreign") {
      const { by, weight } = change;
      // A repair was asked for at once, or comes within a duel's pace: it would have been heard of by now.
      if (moved !== undefined && now - moved.at > HARMLESS_MS + (pace.contested(now) ? PACE.earnMs : 0))
        moved = undefined;
      // Who takes out a rule and puts one in ahead of us is known by the second.
      if (moved === undefined || weight > moved.weight) moved = { by, at: moved?.at ?? now, weight };
      const wasContested = pace.contested(now);
      await ask(now);
      log.debug(`${change.by.program} changed rules beside ours: ${change.line}`);
      if (!pace.contested(now)) continue;
      if (!wasContested) void watchDuel().catch(() => undefined);
      deps.conditions.raise(
        "rules-contested",
        "warning",
        `${change.by.program} takes our redirect out of its place as often as it is put back; guard and fence hold the traffic`,
        `Find out why ${change.by.program} keeps writing its rules; \`vmmesh iptables audit\` shows which stand ahead.`,
      );
      continue;
    }
    if (moved === undefined) continue;
    const { by, at } = moved;
    moved = undefined;
    // The repair for it would be over: this is an apply, or a repair for what no event told of.
    if (now - at > PACE.withinMs) continue;
    pace.repaired(now);
    const name = names.has(by.program) || names.size < MAX_NAMES ? by.program : "other";
    names.add(name);
    deps.onRepaired(name);
    log.warning(`${by.program} had moved our rules: put right`, {
      by: by.program,
      pid: by.pid,
      in_ms: Math.round(now - at),
    });
  }
}
