import type { Coverage } from "./coverage.ts";
import { MAX_BYTES, type Target } from "./target.ts";

/** An input grows to sizes between these to see how its time grows. */
const SMALLEST_GROWN_BYTES = 8 * 1024;
export const GROWN_BYTES = 128 * 1024;

/** Longest that an input of at most `MAX_BYTES` may take. */
export const SLOW_MS = 100;
/** Between two looks at the coverage. */
const BATCH_MS = 100;
/** Four times the size may take four times the time, and somewhat more; sixteen times would be quadratic. */
const MAX_GROWTH = 9;

/** An input broke the property; the message says how. */
export class Broken extends Error {
  readonly input: Uint8Array;
  readonly isSlow: boolean;

  constructor(input: Uint8Array, what: string, isSlow = false) {
    super(what);
    this.input = input;
    this.isSlow = isSlow;
  }
}

/**
 * Mutates inputs and keeps those that reach source which no other reached; ends at the first one that breaks the property.
 * The coverage is asked for once in many executions, for it costs milliseconds; if there is something new in it, halving
 * finds whose it is.
 */
export class Engine {
  readonly #target: Target;
  readonly #coverage: Coverage;
  readonly #onInput: (input: Uint8Array) => void;
  readonly #words: readonly Uint8Array[];
  corpus: Uint8Array[] = [];
  executions = 0;
  slowestMs = 0;

  /** @param onInput told of each input before it runs */
  constructor(target: Target, coverage: Coverage, onInput: (input: Uint8Array) => void) {
    this.#target = target;
    this.#coverage = coverage;
    this.#onInput = onInput;
    this.#words = (target.words ?? []).map((word) => Buffer.from(word));
  }

  /** Runs each by itself and keeps what adds coverage, the shortest first. */
  async keepBest(inputs: readonly Uint8Array[]): Promise<void> {
    this.corpus = [];
    for (const input of inputs.toSorted((a, b) => a.length - b.length)) await this.#sift([input]);
  }

  async fuzz(seconds: number): Promise<void> {
    const end = performance.now() + seconds * 1000;
    for (let batches = 0; performance.now() < end; batches += 1) {
      const batch: Uint8Array[] = [];
      const until = performance.now() + BATCH_MS;
      while (performance.now() < until) {
        const input = this.#mutated();
        batch.push(input);
        await this.#execute(input);
      }
      const reach = await this.#coverage.take();
      if (this.#coverage.isNew(reach)) {
        await this.#sift(batch);
        // What depends on more than the input (a cache) is found by no half: not to be looked for again.
        this.#coverage.add(reach);
      }
      if (batches % 4 === 0) await this.#grow(end);
    }
  }

  /** Keeps those that reach something new; what is of no use is run log n times. */
  async #sift(inputs: readonly Uint8Array[]): Promise<void> {
    for (const input of inputs) await this.#execute(input);
    const reach = await this.#coverage.take();
    if (!this.#coverage.isNew(reach)) return;
    const [input, ...others] = inputs;
    if (input !== undefined && others.length === 0) {
      this.#coverage.add(reach);
      this.corpus.push(input);
      return;
    }
    const middle = inputs.length >> 1;
    await this.#sift(inputs.slice(0, middle));
    await this.#sift(inputs.slice(middle));
  }

  async #execute(input: Uint8Array): Promise<void> {
    const ms = await this.#timed(input);
    const busyMs = ms < SLOW_MS ? ms : await this.#busyMs(input);
    if (busyMs > SLOW_MS)
      throw new Broken(input, `${input.length} bytes took ${Math.round(busyMs)} ms`, true);
    this.slowestMs = Math.max(this.slowestMs, busyMs);
  }

  /** A part of an input over and over: its time must grow as its size does. @param end no larger one is begun after it */
  async #grow(end: number): Promise<void> {
    const base = this.#pick(this.corpus);
    const from = below(base.length);
    const part =
      this.#words.length > 0 && below(4) === 0
        ? this.#pick(this.#words)
        : base.subarray(from, from + 1 + below(below(64) + 1));
    if (part.length === 0) return;
    const grown = (bytes: number): Uint8Array => cut(base, from, 0, Buffer.alloc(bytes, part));
    for (let bytes = SMALLEST_GROWN_BYTES; bytes <= GROWN_BYTES && performance.now() < end; bytes *= 2) {
      const whole = grown(bytes);
      if ((await this.#timed(whole)) < SLOW_MS) continue;
      const [ms, quarterMs] = [await this.#busyMs(whole), await this.#busyMs(grown(bytes / 4))];
      if (ms < SLOW_MS || ms < quarterMs * MAX_GROWTH) continue;
      const sizes = `${bytes / 4} more bytes take ${Math.round(quarterMs)} ms, ${bytes} take ${Math.round(ms)} ms`;
      throw new Broken(whole, `time grows faster than size: ${sizes}`, true);
    }
  }

  /** Milliseconds of the processor that an input takes, at best: others work on this machine too. */
  async #busyMs(input: Uint8Array): Promise<number> {
    let best = Number.POSITIVE_INFINITY;
    for (let times = 0; times < 3; times += 1) {
      const before = process.threadCpuUsage();
      await this.#timed(input);
      const { user, system } = process.threadCpuUsage(before);
      best = Math.min(best, (user + system) / 1000);
    }
    return best;
  }

  async #timed(input: Uint8Array): Promise<number> {
    this.executions += 1;
    this.#onInput(input);
    const start = performance.now();
    try {
      // A copy: what a parser writes into its input must not spoil the corpus.
      const running = this.#target.run(Uint8Array.from(input));
      if (running !== undefined) await running;
    } catch (thrown) {
      throw new Broken(input, thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown));
    }
    return performance.now() - start;
  }

  /** Cuts pieces out of a finding as long as it stays the same one. */
  async shrunk(found: Broken): Promise<Broken> {
    const { input, message, isSlow } = found;
    if (isSlow) return found;
    const kind = (text: string): string => text.split("\n", 1)[0]?.replace(/\d+|".*"|`.*`/g, "") ?? "";
    let best = new Broken(input, message);
    for (let size = input.length >> 1; size > 0; size >>= 1) {
      for (let at = 0; at + size <= best.input.length; ) {
        const less = cut(best.input, at, size);
        try {
          await this.#timed(less);
          at += size;
        } catch (thrown) {
          if (thrown instanceof Broken && kind(thrown.message) === kind(message)) best = thrown;
          else at += size;
        }
      }
    }
    return best;
  }

  #mutated(): Uint8Array {
    let bytes = this.#pick(this.corpus);
    for (let times = 1 + below(4); times > 0; times -= 1)
      bytes =
        this.#target.mutate !== undefined && below(2) === 0
          ? this.#target.mutate(bytes)
          : this.#pick(MUTATIONS)(bytes, this.#pick(this.corpus), this.#pick(this.#words, Buffer.from(" ")));
    return bytes.subarray(0, MAX_BYTES);
  }

  #pick<T>(from: readonly T[], otherwise?: T): T {
    const found = from[below(from.length)] ?? otherwise;
    if (found === undefined) throw new Error("the target has no seed that reaches anything");
    return found;
  }
}

/** A whole number from 0 to less than `limit`. */
export function below(limit: number): number {
  return Math.floor(Math.random() * limit);
}

function cut(
  bytes: Uint8Array,
  at: number,
  size: number,
  instead: Uint8Array = new Uint8Array(),
): Uint8Array {
  return Buffer.concat([bytes.subarray(0, at), instead, bytes.subarray(at + size)]);
}

const BYTES = [0, 1, 0x0a, 0x20, 0x22, 0x27, 0x2e, 0x5c, 0x7f, 0x80, 0xc0, 0xff] as const;
const NUMBERS = [
  "0",
  "-1",
  "1e400",
  "65535",
  "65536",
  "2147483648",
  "9007199254740993",
  "00",
  "0x1",
  "NaN",
] as const;

type Mutation = (bytes: Uint8Array, other: Uint8Array, word: Uint8Array) => Uint8Array;
const MUTATIONS: readonly Mutation[] = [
  (bytes) => cut(bytes, below(bytes.length), 1, Buffer.from([below(256)])),
  (bytes) => cut(bytes, below(bytes.length), 1, Buffer.from([BYTES[below(BYTES.length)] ?? 0])),
  (bytes) => cut(bytes, below(bytes.length + 1), 0, Buffer.from([BYTES[below(BYTES.length)] ?? 0])),
  (bytes) => cut(bytes, below(bytes.length), 1 + below(below(bytes.length) + 1)),
  (bytes) => bytes.subarray(0, below(bytes.length + 1)),
  (bytes, _other, word) => cut(bytes, below(bytes.length + 1), below(2) * word.length, word),
  // Somewhere else, once more: a part of itself or of another input.
  (bytes) => cut(bytes, below(bytes.length + 1), 0, partOf(bytes)),
  (bytes, other) => cut(bytes, below(bytes.length + 1), below(8), partOf(other)),
  (bytes, other) =>
    Buffer.concat([bytes.subarray(0, below(bytes.length + 1)), other.subarray(below(other.length))]),
  (bytes) => {
    const part = partOf(bytes).subarray(0, 32);
    return cut(bytes, below(bytes.length + 1), 0, Buffer.alloc(part.length * (1 + below(16)), part));
  },
  (bytes) => {
    const numbers = [...Buffer.from(bytes).toString("latin1").matchAll(/\d+/g)];
    const found = numbers[below(numbers.length)];
    if (found === undefined) return bytes;
    return cut(bytes, found.index, found[0].length, Buffer.from(NUMBERS[below(NUMBERS.length)] ?? "0"));
  },
];

function partOf(bytes: Uint8Array): Uint8Array {
  const from = below(bytes.length);
  return bytes.subarray(from, from + 1 + below(bytes.length - from));
}
