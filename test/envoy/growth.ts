import { readdirSync } from "node:fs";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { expect } from "vitest";

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

/** Bytes of the heap after a collection, and open descriptors, of this process. */
function used(): { heap: number; descriptors: number } {
  collect();
  return { heap: process.memoryUsage().heapUsed, descriptors: readdirSync("/proc/self/fd").length };
}

/** What `work` leaves behind in this process, printed and below `most`. */
export async function expectNoGrowth(
  most: ReturnType<typeof used>,
  work: () => Promise<void>,
): Promise<void> {
  const before = used();
  await work();
  const after = used();
  const words = (["heap", "descriptors"] as const).flatMap((what) => [what, before[what], "→", after[what]]);
  console.log(...words);
  expect(after.heap - before.heap).toBeLessThan(most.heap);
  expect(after.descriptors - before.descriptors).toBeLessThan(most.descriptors);
}
