/** Resolves when `signal` aborts; at once if it has. Never rejects. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/**
 * The latest of a value that changes: who asks late gets the last one, who waits is told of the next.
 * Rooms hand results to each other through it (identity → sds, xds → dns) without knowing each other.
 */
export class Latest<T> {
  #value: T | undefined;
  readonly #listeners = new Set<(value: T) => void>();

  get value(): T | undefined {
    return this.#value;
  }

  set(value: T): void {
    this.#value = value;
    for (const listener of [...this.#listeners]) listener(value);
  }

  /** Calls `listener` with the present value, if there is one, and with each later one until `signal` aborts. */
  subscribe(listener: (value: T) => void, signal: AbortSignal): void {
    if (signal.aborted) return;
    this.#listeners.add(listener);
    signal.addEventListener("abort", () => this.#listeners.delete(listener), { once: true });
    if (this.#value !== undefined) listener(this.#value);
  }

  /** The present value, or the first one to come. Rejects with the reason of `signal`. */
  next(signal: AbortSignal): Promise<T> {
    if (this.#value !== undefined) return Promise.resolve(this.#value);
    return new Promise((resolve, reject) => {
      const scope = new AbortController();
      signal.addEventListener("abort", () => reject(signal.reason), { once: true, signal: scope.signal });
      this.subscribe(
        (value) => {
          scope.abort();
          resolve(value);
        },
        AbortSignal.any([signal, scope.signal]),
      );
    });
  }
}
