/** What one file of test/fuzz/targets/ exports as `target`; its file's name is its name. */
export interface Target {
  /** The property, in one sentence. */
  readonly about: string;
  /** Valid inputs to begin with. */
  readonly seeds: readonly (string | Uint8Array)[];
  /** What mutation puts in whole: words of the format that chance would take long to find. */
  readonly words?: readonly string[];
  /** URLs of the sources whose coverage guides; default: the agent's. */
  readonly covers?: RegExp;
  /** Changes an input as its format is built; used half of the time. */
  mutate?(bytes: Uint8Array): Uint8Array;
  /**
   * States the property: throws what breaks it. The declared errors of the parser are caught by `refused`; any other one
   * that comes through, a slow answer and a full memory are findings as well.
   */
  run(bytes: Uint8Array): void | Promise<void>;
}

/** The value, or undefined if the parser refused in the way that it declares; everything else is thrown on. */
export function unlessRefused<T>(parse: () => T, isDeclared: (thrown: unknown) => boolean): T | undefined {
  try {
    return parse();
  } catch (thrown) {
    if (isDeclared(thrown)) return undefined;
    throw thrown;
  }
}

/** Most bytes of an input that is kept; growth is tried far beyond. */
export const MAX_BYTES = 4096;
