import { type BackoffOptions, backoff, DEFAULT_BACKOFF } from "./backoff.ts";
import { messageOf } from "./errors.ts";

/** One long-running part of the daemon. `run` resolves only when its signal has aborted. */
export interface Task {
  readonly name: string;
  /** `restart`: run again after a backoff, the others go on. `stop-all`: the daemon ends, systemd starts it anew. */
  readonly onFailure: "restart" | "stop-all";
  run(signal: AbortSignal): Promise<void>;
}

export interface SuperviseDeps {
  sleep(ms: number, signal: AbortSignal): Promise<void>;
  random(): number;
  /** Told of every failure of a restarting task, before the wait. */
  onRestart(task: string, cause: unknown, waitMs: number): void;
  readonly backoff?: BackoffOptions;
}

/**
 * Runs tasks in one scope until `signal` aborts or a `stop-all` task ends. No task outlives the call.
 *
 * @throws {AggregateError} naming each task that failed for good, if any did
 */
export async function supervise(
  tasks: readonly Task[],
  deps: SuperviseDeps,
  signal: AbortSignal,
): Promise<void> {
  const scope = new AbortController();
  const all = AbortSignal.any([signal, scope.signal]);
  const failures: Error[] = [];

  const attend = async (task: Task): Promise<void> => {
    const waits = backoff(deps.random, deps.backoff ?? DEFAULT_BACKOFF);
    while (!all.aborted) {
      let cause: unknown = new Error("ended without being asked to");
      try {
        await task.run(all);
      } catch (thrown) {
        cause = thrown;
      }
      if (all.aborted) return;
      if (task.onFailure === "stop-all") {
        failures.push(new Error(`${task.name}: ${messageOf(cause)}`, { cause }));
        scope.abort(cause);
        return;
      }
      const waitMs = waits.next().value;
      deps.onRestart(task.name, cause, waitMs);
      await deps.sleep(waitMs, all).catch(() => undefined);
    }
  };

  await Promise.all(tasks.map(attend));
  if (failures.length > 0) throw new AggregateError(failures, failures.map(messageOf).join("; "));
}
