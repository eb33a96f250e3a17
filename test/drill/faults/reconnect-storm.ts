import { readdirSync, readFileSync } from "node:fs";
import { sleep } from "../../lab/lab.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { pidOf } from "../processes.ts";
import type { Target } from "../stage.ts";

/** Longer than a stream has to stand to be a good one, after which neither side waits before it connects again. */
const EVERY_MS = 2_000;
/** istiod asks everybody to connect anew every half an hour by default: a day has 48. */
const RECONNECTS = { quick: 12, full: 240 } as const;
/**
 * What an agent may grow by, after a first half in which code is compiled and malloc's arenas fill: the mean of the last
 * eighth of the storm over that of the first eighth of its second half. A stream that is not let go of costs 30 kB, 3.6 MB
 * of the 120 reconnects of that half; 1.6 MB were measured, which is V8's heap and malloc settling.
 */
const GROWTH = { noiseKb: 2048, kbPer100: 1024, descriptors: 0 } as const;

/** What an agent uses at one moment. */
interface Use {
  /** Of its own: pages of the program are shared with each `vmmesh status`, so that their share comes and goes. */
  readonly memoryKb: number;
  readonly descriptors: number;
}

export const fault: Fault = {
  name: "reconnect-storm",
  about: "the connections to istiod are destroyed every two seconds: days of reconnects in minutes",
  async run(stage, scale) {
    const used = new Map<Target, Use[]>(stage.targets.map((target) => [target, []]));
    const faulty = async (): Promise<string> => {
      const lost = new Map<Target, number>(stage.targets.map((target) => [target, 0]));
      const isOver = (): boolean => (lost.get(stage.vmmesh) ?? 0) >= RECONNECTS[scale];
      for (const until = Date.now() + 4 * EVERY_MS * RECONNECTS[scale]; !isOver(); ) {
        if (Date.now() > until) throw new Error("vmmesh does not connect again");
        for (const [target, uses] of used) {
          uses.push(await useOf(target));
          lost.set(target, (lost.get(target) ?? 0) + (await destroy(target)));
        }
        await sleep(EVERY_MS);
      }
      return [...lost].map(([{ side }, times]) => `${side} lost ${times} connections to istiod`).join(", ");
    };
    return await underLoad(stage, "reconnect-storm", stage.targets, faulty, {
      after: async (target) => {
        const uses = used.get(target) ?? [];
        const eighth = Math.max(1, Math.floor(uses.length / 8));
        const half = Math.floor(uses.length / 2);
        const first = meanOf(uses.slice(0, eighth));
        const settled = meanOf(uses.slice(half, half + eighth));
        const last = meanOf(uses.slice(-eighth));
        const rounds = uses.length - half;
        const most = GROWTH.noiseKb + (GROWTH.kbPer100 * rounds) / 100;
        const end = `the agent used ${first.memoryKb} kB at first, ${settled.memoryKb} kB after half the reconnects and ${last.memoryKb} kB after all; ${settled.descriptors} descriptors at half, ${last.descriptors} at the end`;
        const isFlat =
          last.memoryKb - settled.memoryKb <= most &&
          last.descriptors - settled.descriptors <= GROWTH.descriptors;
        return { end, ...(isFlat ? {} : { unmet: `the agent grew in the last ${rounds} reconnects` }) };
      },
    });
  },
};

/** @returns how many connections to istiod there were, and are no more */
async function destroy({ machine }: Target): Promise<number> {
  const { stdout } = await machine.exec("ss -KHtn state established '( dport = :15012 )'");
  return stdout.split("\n").filter(Boolean).length;
}

async function useOf(target: Target): Promise<Use> {
  const pid = await pidOf(target, "agent");
  if (pid === undefined) throw new Error(`the agent of ${target.machine.name} does not run`);
  const at = `/proc/${target.machine.pid}/root/proc/${pid}`;
  const [, kb] = /^Anonymous:\s+(\d+) kB$/m.exec(readFileSync(`${at}/smaps_rollup`, "utf8")) ?? [];
  return { memoryKb: Number(kb), descriptors: readdirSync(`${at}/fd`).length };
}

function meanOf(uses: readonly Use[]): Use {
  const mean = (of: (use: Use) => number): number =>
    Math.round(uses.reduce((sum, use) => sum + of(use), 0) / uses.length);
  // What is open for a moment only is not in all of them.
  return {
    memoryKb: mean(({ memoryKb }) => memoryKb),
    descriptors: Math.min(...uses.map(({ descriptors }) => descriptors)),
  };
}
