import { readdirSync } from "node:fs";
import { queryObjects, setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { expect } from "vitest";

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

interface Use {
  /** Bytes of the heap after a collection. */
  readonly heap: number;
  /** Those still alive: what waits for something, once for each round, is too small to stand out of the heap's own noise. */
  readonly promises: number;
  readonly descriptors: number;
}

/** Of this process. */
function used(): Use {
  collect();
  return {
    heap: process.memoryUsage().heapUsed,
    promises: Number(queryObjects(Promise)),
    descriptors: readdirSync("/proc/self/fd").length,
  };
}

/** What `work` leaves behind in this process, printed and below `most`. */
export async function expectNoGrowth(most: Use, work: () => Promise<void>): Promise<void> {
  const before = used();
  await work();
  const after = used();
  const kinds = ["heap", "promises", "descriptors"] as const;
  console.log(...kinds.flatMap((what) => [what, before[what], "→", after[what]]));
  for (const what of kinds) expect(after[what] - before[what], what).toBeLessThan(most[what]);
}
