import { sleep, waitFor } from "../../lab/lab.ts";
import type { Fault, Row } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { absenceInWords, type Process, pidOf, watchAbsence } from "../processes.ts";
import type { Stage, Target } from "../stage.ts";
import { Withdrawals } from "../withdrawals.ts";

const BACK_WITHIN_MS = 60_000;
/** A second's pause (the last of `RestartSteps=`) and the start, on a busy machine: 8.4 s were seen with a load of 29. */
const AWAY_AT_MOST_MS = 12_000;

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
  // On a busy machine an agent can be killed again, and again, before it has a stream.
  await using withdrawals = new Withdrawals(stage.lab);
  try {
    return await underLoad(
      stage,
      fault,
      targets,
      async () => {
        const done = targets.map(async (target) => {
          // The peer is killed for as long as ours is, however often that is.
          const until = target.side === "peer" ? ours : none;
          const { times, late } = await killAtRandom(target, killing, until.signal);
          if (target.side === "vmmesh") ours.abort();
          const words = late === 0 ? "" : `, ${late} times not back within ${BACK_WITHIN_MS / 1000} s`;
          return `${target.side}: ${times} times, each time with another pid${words}`;
        });
        return (await Promise.all(done)).join("; ");
      },
      {
        allowance: (target, seen) => {
          const absences = watches.get(target)?.stop() ?? [];
          const withdrawn = withdrawals.allow(target.machine, seen);
          return {
            allowed:
              withdrawn.allowed + (killing.processes.includes("envoy") ? seen.underWayDuring(absences) : 0),
            because: `those under way while Envoy was killed: ${absenceInWords(absences)}; ${withdrawn.because}`,
          };
        },
        // What is allowed grows with the time that Envoy takes to be back, so that has a bound of its own.
        after: async (target) => {
          const absences = watches.get(target)?.stop() ?? [];
          const longest = Math.max(0, ...absences.map(([from, to]) => to - from));
          return longest > AWAY_AT_MOST_MS ? { unmet: `Envoy was away for ${longest} ms` } : {};
        },
      },
    );
  } finally {
    for (const watch of watches.values()) watch.stop();
  }
}

/** @returns how often they were killed, each time with pids that were not there before, and how often the peer was not back in time */
async function killAtRandom(
  target: Target,
  { processes, times, withinMs }: Omit<Killing, "targets">,
  until: AbortSignal,
): Promise<{ readonly times: number; readonly late: number }> {
  const isPeer = target.side === "peer";
  let last: readonly number[] = [];
  let [done, late] = [0, 0];
  while (true) {
    const back = waitFor(
      `the ${processes.join(" and ")} of ${target.machine.name} to be there (again)`,
      async () => {
        if (until.aborted) return [];
        const found = await Promise.all(processes.map((each) => pidOf(target, each)));
        return found.every((pid): pid is number => pid !== undefined && !last.includes(pid))
          ? found
          : undefined;
      },
      BACK_WITHIN_MS,
      50,
    );
    // The peer's numbers are for comparison: it is waited for on.
    const pids = await (isPeer ? back.catch(() => undefined) : back);
    if (done === times || until.aborted) return { times: done, late };
    if (pids === undefined) {
      late += 1;
      continue;
    }
    await sleep(Math.random() * withinMs);
    // The peer's agent ends its Envoy, and itself when that has ended: one of the two may be gone by now.
    await target.machine.exec(["kill", "-9", ...pids.map(String)], { allowFail: isPeer });
    last = pids;
    done += 1;
  }
}
