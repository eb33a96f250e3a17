import { istiodEnvOf } from "../../lab/controlplane.ts";
import { waitFor } from "../../lab/lab.ts";
import { startPeer } from "../../lab/peer.ts";
import type { Fault, Row } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { absenceInWords, pidOf, watchAbsence } from "../processes.ts";
import { type Stage, statusOf } from "../stage.ts";

export const fault: Fault = {
  name: "default-istiod",
  about: "istiod goes over to its default settings, by which it names what no stock Envoy has",
  async run(stage) {
    const before = istiodEnvOf(stage.lab.id);
    try {
      return [...(await goOver(stage)), ...(await startAnew(stage))];
    } finally {
      await stage.lab.restartIstiod(before);
      await startPeer(stage.peer.machine);
      for (const target of stage.targets) await stage.well(target);
    }
  },
};

function goOver(stage: Stage): Promise<Row[]> {
  return underLoad(stage, "default-istiod", stage.targets, async () => {
    await stage.lab.restartIstiod({});
    const said = await waitFor(
      "vmmesh to say what it has taken out",
      async () =>
        (await statusOf(stage.vmmesh.machine)).conditions.find(({ id }) => id === "extensions-stripped"),
      60_000,
    );
    return `vmmesh says: ${said.message}`;
  });
}

/** An Envoy that went on with what it had would show nothing. */
async function startAnew(stage: Stage): Promise<Row[]> {
  const watches = new Map(stage.targets.map((target) => [target, watchAbsence(target.machine)]));
  try {
    const faulty = async (): Promise<string> => {
      const killed = stage.targets.map(async (target) => {
        const pid = await pidOf(target, "envoy");
        await target.machine.exec(["kill", "-9", String(pid)]);
        return `${target.side}'s Envoy ${pid} was killed`;
      });
      return (await Promise.all(killed)).join(", ");
    };
    return await underLoad(stage, "default-istiod: a new Envoy", stage.targets, faulty, {
      wellWithinMs: 30_000,
      allowance: (target, seen) => {
        const absences = watches.get(target)?.stop() ?? [];
        return {
          allowed: seen.underWayDuring(absences),
          because: `those under way while ${absenceInWords(absences)}`,
        };
      },
    });
  } finally {
    for (const watch of watches.values()) watch.stop();
  }
}
