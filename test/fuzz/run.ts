import { Worker } from "node:worker_threads";
import { saveFinding } from "./corpus.ts";
import { GROWN_BYTES } from "./engine.ts";
import { MAX_BYTES } from "./target.ts";

/** What a worker is told. */
export interface Order {
  /** URL of the target's file. */
  readonly file: string;
  /** Folder of its kept inputs. */
  readonly corpus: string;
  readonly seconds: number;
  /** [inputs begun, bytes of the last one] as 32-bit numbers, then that input: all that is left of a worker that hangs. */
  readonly shared: SharedArrayBuffer;
}

export interface Report {
  readonly executions: number;
  /** Characters of source reached: by what was kept before, and at the end. */
  readonly reachedBefore: number;
  readonly reached: number;
  readonly slowestMs: number;
  readonly finding: { readonly input: Uint8Array; readonly what: string } | undefined;
}

/** An input that has not ended after this time hangs. */
const HANG_MS = 10_000;
/** What a parser may hold at once, with what V8 has not collected yet. */
const HEAP_MB = 256;
/** That of the main thread, where the agent parses: a worker's is four times as large. */
const STACK_MB = 1;

/**
 * Fuzzes one target in a worker of its own and keeps the inputs that reached something new, or the finding.
 * @throws {Error} if the target itself is broken: it cannot be loaded, or its seeds reach nothing
 */
export async function runTarget(
  file: string,
  corpus: string,
  seconds: number,
  hangMs = HANG_MS,
): Promise<Report & { readonly saved: string | undefined }> {
  const shared = new SharedArrayBuffer(8 + MAX_BYTES + GROWN_BYTES);
  const counters = new Int32Array(shared, 0, 2);
  const lastInput = (): Uint8Array => Uint8Array.from(new Uint8Array(shared, 8, counters[1]));
  const order: Order = { file, corpus, seconds, shared };
  const report = await new Promise<Report>((resolve, reject) => {
    const worker = new Worker(new URL("./worker.ts", import.meta.url), {
      workerData: order,
      resourceLimits: { maxOldGenerationSizeMb: HEAP_MB, stackSizeMb: STACK_MB },
    });
    const broken = (what: string): Report => ({
      executions: counters[0] ?? 0,
      reachedBefore: 0,
      reached: 0,
      slowestMs: hangMs,
      finding: { input: lastInput(), what },
    });
    let last = -1;
    const watch = setInterval(() => {
      const now = Atomics.load(counters, 0);
      if (now === last && now > 0) {
        void worker.terminate();
        resolve(broken(`does not end within ${hangMs / 1000} s`));
      }
      last = now;
    }, hangMs);
    worker.on("message", resolve);
    worker.on("error", (error: NodeJS.ErrnoException) => {
      if (error.code === "ERR_WORKER_OUT_OF_MEMORY") resolve(broken(`needs more than ${HEAP_MB} MB`));
      else reject(error);
    });
    worker.on("exit", () => {
      clearInterval(watch);
      reject(new Error("the worker ended without a report"));
    });
  });
  const { finding } = report;
  return { ...report, saved: finding === undefined ? undefined : saveFinding(corpus, finding.input) };
}
