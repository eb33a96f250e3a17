import { istiodEnvOf } from "../../lab/controlplane.ts";
import { sleep, waitFor } from "../../lab/lab.ts";
import type { Fault, Row } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { losePackets } from "../network.ts";
import { type News, tellNews } from "../news.ts";
import { isConnected, type Stage, type Target } from "../stage.ts";
import { Withdrawals } from "../withdrawals.ts";

/** Below istiod's patience: it withdraws a machine 10 s after it has seen that the stream is gone. */
const SHORT_MS = 8_000;
const MINUTE_MS = 60_000;
/** Longer than gRPC takes to see that nobody is there (30 s and 10 s), and than some attempts after that. */
const LONG_MS = 180_000;

export const fault: Fault = {
  name: "network-cut",
  about:
    "no packet passes between the machines and the control plane with its DNS; the mesh changes meanwhile",
  async run(stage, scale) {
    const rows: Row[] = [];
    if (scale === "full") for (const ms of [SHORT_MS, MINUTE_MS]) rows.push(...(await cutFor(stage, ms, "")));
    const before = istiodEnvOf(stage.lab.id);
    await stage.lab.restartIstiod({ ...before, PILOT_WORKLOAD_ENTRY_GRACE_PERIOD: "1h" });
    try {
      for (const target of stage.targets) await stage.well(target);
      const ms = scale === "full" ? LONG_MS : SHORT_MS;
      return [...rows, ...(await cutFor(stage, ms, ", istiod waits for an hour"))];
    } finally {
      await stage.lab.restartIstiod(before);
      for (const target of stage.targets) await stage.well(target);
    }
  },
};

async function cutFor(stage: Stage, ms: number, how: string): Promise<Row[]> {
  await using end = new AsyncDisposableStack();
  const withdrawals = end.use(new Withdrawals(stage.lab));
  let news: News | undefined;
  const faulty = async (): Promise<string> => {
    const machines = stage.targets.map(({ machine }) => machine);
    await using cut = await losePackets(stage.lab, machines, 100);
    const from = Date.now();
    const seconds = (): number => Math.round((Date.now() - from) / 1000);
    const told = end.use(await tellNews(stage.lab, "drill-cut"));
    news = told;
    let noticed = "";
    if (ms > MINUTE_MS) {
      await waitFor(
        "the agent to see that istiod is gone",
        async () => ((await isConnected(stage.vmmesh)) ? undefined : true),
        90_000,
      );
      noticed = `, seen by vmmesh after ${seconds()} s`;
    }
    await sleep(from + ms - Date.now());
    const heard = await Promise.all(machines.map((machine) => told.knownTo(machine)));
    if (heard.includes(true)) throw new Error("a machine has heard through the cut");
    return `cut for ${seconds()} s: ${await cut.dropped()} packets swallowed, and no news came through${noticed}`;
  };
  const well = async (target: Target): Promise<void> => {
    await stage.well(target);
    await waitFor(
      `${target.machine.name} to hear the news`,
      async () => ((await news?.knownTo(target.machine)) === true ? true : undefined),
      30_000,
      100,
    );
  };
  return await underLoad(stage, `network-cut for ${ms / 1000} s${how}`, stage.targets, faulty, {
    well,
    allowance: ({ machine }, seen) => withdrawals.allow(machine, seen),
  });
}
