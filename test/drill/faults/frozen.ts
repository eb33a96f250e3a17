import { sleep } from "../../lab/lab.ts";
import { certificateOf, shortCertificates } from "../credentials.ts";
import type { Fault, Row } from "../fault.ts";
import { LISTED_AGAIN_MS, underLoad } from "../measure.ts";
import type { Span, Stage, Target } from "../stage.ts";

export const fault: Fault = {
  name: "frozen",
  about: "the machines stand still, as in a suspend, and go on",
  async run(stage, scale) {
    if (scale === "quick") return freezeFor(stage, "frozen for 5 s", [stage.vmmesh], () => sleep(5_000), 0);
    const rows = await freezeFor(stage, "frozen for 30 s", stage.targets, () => sleep(30_000));
    await using _short = await shortCertificates(stage, stage.targets);
    const ended = await freezeFor(stage, "frozen past the certificate", stage.targets, async () => {
      // Which is on disk is the one in use: nobody could renew it since.
      for (const target of stage.targets) await sleep((await leftOf(target)) + 1_000);
    });
    return [...rows, ...ended];
  },
};

const leftOf = async (target: Target): Promise<number> =>
  (await certificateOf(target)).validToDate.getTime() - Date.now();

async function freezeFor(
  stage: Stage,
  name: string,
  targets: readonly Target[],
  until: () => Promise<void>,
  listedAgainMs = LISTED_AGAIN_MS,
): Promise<Row[]> {
  let still: Span = [0, 0];
  const faulty = async (): Promise<string> => {
    const from = Date.now();
    try {
      await Promise.all(targets.map(({ machine }) => machine.freeze()));
      await until();
      if (!targets.every(({ machine }) => machine.isFrozen))
        throw new Error("a machine was thawed meanwhile");
    } finally {
      for (const { machine } of targets) machine.thaw();
    }
    still = [from, Date.now()];
    return `every process of the machine stood still for ${Math.round((still[1] - from) / 1000)} s, as its cgroup says`;
  };
  return underLoad(stage, name, targets, faulty, {
    allowance: (_target, seen) => ({
      allowed: seen.underWayDuring([[still[0], still[1] + listedAgainMs]]),
      because: `those under way while nobody was awake to answer${listedAgainMs === 0 ? "" : `, and ${listedAgainMs / 1000} s for istiod to list it again`}`,
    }),
  });
}
