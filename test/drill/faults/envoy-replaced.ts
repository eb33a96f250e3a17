import { ENVOY_VERSIONS } from "../../envoy/fetch.ts";
import { ENVOY } from "../../lab/parts.ts";
import { putEnvoy, useEnvoy } from "../envoys.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { absenceInWords, watchAbsence } from "../processes.ts";

export const fault: Fault = {
  name: "envoy-replaced",
  about: "Envoy is replaced by a newer version",
  async run(stage, scale) {
    const targets = scale === "quick" ? [stage.vmmesh] : stage.targets;
    // CI has the oldest already.
    const old = scale === "quick" ? ENVOY_VERSIONS[0] : "1.39.3";
    for (const target of targets) {
      for (const version of [old, ENVOY]) await putEnvoy(target, version);
      await useEnvoy(target, old);
      await stage.well(target);
    }
    const watches = new Map(targets.map((target) => [target, watchAbsence(target.machine)]));
    try {
      return await underLoad(
        stage,
        "envoy-replaced",
        targets,
        async () => {
          await Promise.all(targets.map((target) => useEnvoy(target, ENVOY)));
          return `the running Envoy said ${old}, and then ${ENVOY}`;
        },
        {
          allowance: (target, seen) => {
            const absences = watches.get(target)?.stop() ?? [];
            return {
              allowed: seen.underWayDuring(absences),
              because: `those under way while ${absenceInWords(absences)}`,
            };
          },
        },
      );
    } finally {
      for (const watch of watches.values()) watch.stop();
      for (const target of targets) await useEnvoy(target, ENVOY);
    }
  },
};
