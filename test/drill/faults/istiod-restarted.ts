import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";

export const fault: Fault = {
  name: "istiod-restarted",
  about: "istiod is stopped and started again at once",
  run: (stage) =>
    underLoad(stage, "istiod-restarted", stage.targets, async () => {
      const before = stage.lab.pidOf("istiod");
      await stage.lab.restartIstiod();
      const after = stage.lab.pidOf("istiod");
      if (before === after) throw new Error("istiod still runs with its old pid");
      return `istiod's pid went from ${before} to ${after}`;
    }),
};
