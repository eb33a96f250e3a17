import { waitFor } from "../../lab/lab.ts";
import { shortCertificates } from "../credentials.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { Watch } from "../shown.ts";

const TIMES = { quick: 2, full: 20 } as const;

export const fault: Fault = {
  name: "renewals",
  about: "certificates of 60 seconds are renewed, again and again",
  async run(stage, scale) {
    await using _short = await shortCertificates(stage, stage.targets);
    await using end = new AsyncDisposableStack();
    const watches = new Map(stage.targets.map((target) => [target, end.use(new Watch(stage, target))]));
    const times = TIMES[scale];
    const faulty = async (): Promise<string> => {
      await Promise.all(
        [...watches].map(([{ machine }, watch]) =>
          waitFor(
            `${times} new certificates of ${machine.name}`,
            async () => (watch.serials.size > times ? true : undefined),
            times * 60_000 + 10_000,
          ),
        ),
      );
      return [...watches]
        .map(
          ([{ side }, { serials }]) => `${side} has shown ${serials.size} certificates one after the other`,
        )
        .join(", ");
    };
    return await underLoad(stage, "renewals", stage.targets, faulty, {
      after: async (target) => {
        const expired = watches.get(target)?.expired ?? 0;
        return expired === 0 ? {} : { unmet: `a certificate that had ended was shown ${expired} times` };
      },
    });
  },
};
