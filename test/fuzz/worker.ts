import { parentPort, workerData } from "node:worker_threads";
import { readCorpus, writeCorpus } from "./corpus.ts";
import { Coverage } from "./coverage.ts";
import { Broken, Engine } from "./engine.ts";
import type { Order, Report } from "./run.ts";
import type { Target } from "./target.ts";

parentPort?.postMessage(await work(workerData as Order));

async function work({ file, corpus, seconds, shared }: Order): Promise<Report> {
  const counters = new Int32Array(shared, 0, 2);
  const window = new Uint8Array(shared, counters.byteLength);
  const coverage = new Coverage();
  await coverage.start();
  const { target } = (await import(file)) as { target: Target };
  await coverage.loaded(target.covers ?? /\/agent\//);
  const engine = new Engine(target, coverage, (input) => {
    window.set(input);
    counters[1] = input.length;
    Atomics.add(counters, 0, 1);
  });
  const seeds = target.seeds.map((seed) => Buffer.from(seed));
  let reachedBefore = 0;
  let broken: Broken | undefined;
  try {
    await engine.keepBest([...seeds, ...readCorpus(corpus).values()]);
    reachedBefore = coverage.size;
    await engine.fuzz(seconds);
  } catch (thrown) {
    if (!(thrown instanceof Broken)) throw thrown;
    broken = await engine.shrunk(thrown);
  }
  const report = {
    executions: engine.executions,
    slowestMs: engine.slowestMs,
    reachedBefore,
    reached: coverage.size,
  };
  if (broken !== undefined) return { ...report, finding: { input: broken.input, what: broken.message } };
  coverage.forget();
  await engine.keepBest(engine.corpus);
  writeCorpus(
    corpus,
    engine.corpus.filter((input) => !seeds.some((seed) => seed.equals(input))),
  );
  return { ...report, finding: undefined };
}
