import { sleep, waitFor } from "../../lab/lab.ts";
import { certificateOf, shortCertificates } from "../credentials.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { Watch } from "../shown.ts";

const LIFETIME_MS = 60_000;
/** How long istiod stays away when the last certificate has ended. */
const BEYOND_MS = { quick: LIFETIME_MS / 4, full: 5 * LIFETIME_MS } as const;
/** The longest pause between two attempts of a machine that has no certificate (30 s, and 30 % for jitter), and some for the answer. */
const BACK_WITHIN_MS = 45_000;

export const fault: Fault = {
  name: "istiod-stopped",
  about: "istiod is away for longer than the certificates live",
  async run(stage, scale) {
    await using _short = await shortCertificates(stage, stage.targets);
    await using end = new AsyncDisposableStack();
    const shown = new Map(stage.targets.map((target) => [target, end.use(new Watch(stage, target))]));
    let returned = 0;
    const faulty = async (): Promise<string> => {
      await stage.lab.stopIstiod();
      const from = Date.now();
      try {
        const ends = await Promise.all(
          stage.targets.map(async (target) => (await certificateOf(target)).validToDate.getTime()),
        );
        await sleep(Math.max(...ends) + BEYOND_MS[scale] - Date.now());
      } finally {
        await stage.lab.startIstiod();
      }
      returned = Date.now();
      const last = shown.get(stage.vmmesh)?.looks.at(-1);
      if (last?.certificate !== undefined && last.certificate.validToDate.getTime() > returned)
        throw new Error("a valid certificate was shown that nobody can have signed");
      return `istiod was away for ${Math.round((returned - from) / 1000)} s, and each certificate ended`;
    };
    return await underLoad(stage, "istiod-stopped", stage.targets, faulty, {
      wellWithinMs: 360_000,
      well: async (target) => {
        await stage.well(target, 360_000);
        await waitFor(
          "a valid certificate to be shown",
          async () => {
            const last = shown.get(target)?.looks.at(-1);
            return last?.certificate !== undefined && last.certificate.validToDate > new Date()
              ? true
              : undefined;
          },
          360_000,
        );
      },
      allowance: (target, seen) => {
        const without = shown.get(target)?.without ?? [];
        const ms = without.reduce((sum, [begin, until]) => sum + until - begin, 0);
        return {
          allowed: seen.underWayDuring(without),
          because: `those under way while the machine had no certificate to show, ${ms} ms`,
        };
      },
      after: async (target) => {
        const { without = [], expired = 0 } = shown.get(target) ?? {};
        const backMs = Math.max(0, ...without.map(([, until]) => until - returned));
        return {
          // Envoy acknowledges the removal of a secret and keeps it.
          end: `${expired} new connections were offered what had ended, which nobody takes who verifies; a valid certificate came ${backMs} ms after istiod was back`,
          ...(backMs > BACK_WITHIN_MS ? { unmet: `the promise is ${BACK_WITHIN_MS} ms` } : {}),
        };
      },
    });
  },
};
