import { sleep, waitFor } from "../../lab/lab.ts";
import type { Fault, Row } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { absenceInWords, type Process, pidOf, watchAbsence } from "../processes.ts";
import type { Stage, Target } from "../stage.ts";

interface Killing {
  readonly processes: readonly Process[];
  readonly targets: readonly Target[];
  readonly times: number;
  /** Each is killed at a random moment of so long a time after its pid was first seen. */
  readonly withinMs: number;
}

/** 200 times in all at full scale. */
const VICTIMS: readonly { readonly name: string; readonly processes: readonly Process[]; times: number }[] = [
  { name: "agent", processes: ["agent"], times: 67 },
  { name: "envoy", processes: ["envoy"], times: 67 },
  { name: "both", processes: ["agent", "envoy"], times: 66 },
];

export const fault: Fault = {
  name: "killed",
  about: "kill -9 of the agent, of Envoy, of both, at random moments",
  run: async (stage, scale) => {
    const rows: Row[] = [];
    for (const { name, processes, times } of VICTIMS) {
      const killing =
        scale === "full"
          ? { processes, targets: stage.targets, times, withinMs: 2000 }
          : // The peer's unit waits 10 s before it starts again: too long for CI.
            { processes, targets: [stage.vmmesh], times: 2, withinMs: 500 };
      rows.push(...(await kill(stage, `killed: ${name}`, killing)));
    }
    return rows;
  },
};

async function kill(stage: Stage, fault: string, { targets, ...killing }: Killing): Promise<Row[]> {
  const watches = new Map(targets.map((target) => [target, watchAbsence(target.machine)]));
  const ours = new AbortController();
  const none = new AbortController();
  try {
    return await underLoad(
      stage,
      fault,
      targets,
      async () => {
        const done = targets.map(async (target) => {
          // The peer is killed for as long as ours is, however often that is.
          const times = await killAtRandom(target, killing, (target.side === "peer" ? ours : none).signal);
          if (target.side === "vmmesh") ours.abort();
          return `${target.side}: ${times} times, each time with another pid`;
        });
        return (await Promise.all(done)).join("; ");
      },
      {
        allowance: (target, seen) => {
          const absences = watches.get(target)?.stop() ?? [];
          const because = absenceInWords(absences);
          return killing.processes.includes("envoy")
            ? { allowed: seen.underWayDuring(absences), because: `those under way while ${because}` }
            : { allowed: 0, because };
        },
      },
    );
  } finally {
    for (const watch of watches.values()) watch.stop();
  }
}

/** @returns how often they were killed: each time with pids that were not there before */
async function killAtRandom(
  target: Target,
  { processes, times, withinMs }: Omit<Killing, "targets">,
  until: AbortSignal,
): Promise<number> {
  let last: readonly number[] = [];
  for (let done = 0; ; done += 1) {
    const pids = await waitFor(
      `the ${processes.join(" and ")} of ${target.machine.name} to be there (again)`,
      async () => {
        const found = await Promise.all(processes.map((each) => pidOf(target, each)));
        return found.every((pid): pid is number => pid !== undefined && !last.includes(pid))
          ? found
          : undefined;
      },
      60_000,
      50,
    );
    if (done === times || until.aborted) return done;
    await sleep(Math.random() * withinMs);
    await target.machine.exec(["kill", "-9", ...pids.map(String)]);
    last = pids;
  }
}
