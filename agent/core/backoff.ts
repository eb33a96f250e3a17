/** How a retry waits. All times in milliseconds. */
export interface BackoffOptions {
  readonly firstMs: number;
  readonly capMs: number;
  /** Growth from one wait to the next, at least 1. */
  readonly factor: number;
  /** 0 to 1: each wait is lengthened or shortened by up to this share, so that machines do not retry together. */
  readonly jitter: number;
}

export const DEFAULT_BACKOFF: BackoffOptions = { firstMs: 500, capMs: 30_000, factor: 1.5, jitter: 0.3 };

/** Uniform numbers in [0, 1) out of a source of strong random bytes, for jitter. */
export function uniformFrom(bytes: (count: number) => Uint8Array): () => number {
  return () => bytes(4).reduce((sum, byte) => sum * 256 + byte, 0) / 2 ** 32;
}

/**
 * The endless series of waits of one retry loop.
 * @param random uniform in [0, 1), injected so that tests are exact
 */
export function* backoff(
  random: () => number,
  options: BackoffOptions = DEFAULT_BACKOFF,
): Generator<number, never> {
  let base = options.firstMs;
  for (;;) {
    yield base * (1 + options.jitter * (2 * random() - 1));
    base = Math.min(base * options.factor, options.capMs);
  }
}
