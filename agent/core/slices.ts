/** A question that waits no longer than this for its turn is not late. */
const SLICE_MS = 5;

/**
 * Does work that says by each step where it may be interrupted, 5 ms at a time; between the slices everybody else on the
 * event loop has his turn.
 *
 * @throws what the work throws
 */
export async function inSlices<Result>(
  work: Generator<unknown, Result>,
  clock: { monotonicMs(): number; sleep(ms: number): Promise<void> },
): Promise<Result> {
  for (;;) {
    const endMs = clock.monotonicMs() + SLICE_MS;
    do {
      const step = work.next();
      if (step.done === true) return step.value;
    } while (clock.monotonicMs() < endMs);
    await clock.sleep(0);
  }
}
