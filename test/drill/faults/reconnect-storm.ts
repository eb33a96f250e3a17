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
/** How much more the last third of the time may use than the first: what a garbage collector leaves lying about. */
const GROWTH = { share: 1.15, descriptors: 4 } as const;

/** What an agent uses at one moment. */
interface Use {
  readonly pssKb: number;
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
        const third = Math.floor(uses.length / 3);
        const [first, last] = [meanOf(uses.slice(0, third)), meanOf(uses.slice(-third))];
        const end = `the agent used ${first.pssKb} kB and ${first.descriptors} descriptors in the first third, ${last.pssKb} kB and ${last.descriptors} in the last`;
        const isFlat =
          last.pssKb <= first.pssKb * GROWTH.share &&
          last.descriptors <= first.descriptors + GROWTH.descriptors;
        return { end, ...(isFlat ? {} : { unmet: "the agent grew" }) };
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
  const [, pss] = /^Pss:\s+(\d+) kB$/m.exec(readFileSync(`${at}/smaps_rollup`, "utf8")) ?? [];
  return { pssKb: Number(pss), descriptors: readdirSync(`${at}/fd`).length };
}

function meanOf(uses: readonly Use[]): Use {
  const mean = (of: (use: Use) => number): number =>
    Math.round(uses.reduce((sum, use) => sum + of(use), 0) / uses.length);
  return { pssKb: mean(({ pssKb }) => pssKb), descriptors: mean(({ descriptors }) => descriptors) };
}
