import { sleep } from "../../lab/lab.ts";
import { certificateOf, shortCertificates } from "../credentials.ts";
import type { Fault, Row } from "../fault.ts";
import { type After, LISTED_AGAIN_MS, underLoad } from "../measure.ts";
import { type Process, pidOf } from "../processes.ts";
import type { Span, Stage, Target } from "../stage.ts";

export const fault: Fault = {
  name: "frozen",
  about: "the machines stand still, as in a suspend, and go on; then the agent alone, and Envoy alone",
  async run(stage, scale) {
    if (scale === "quick")
      return freezeFor(stage, "frozen for 5 s", MACHINE, [stage.vmmesh], () => sleep(5_000), 0);
    const rows = [
      ...(await freezeFor(stage, "frozen for 30 s", MACHINE, stage.targets, () => sleep(30_000))),
      ...(await freezeFor(stage, "frozen: agent for 20 s", AGENT, stage.targets, () => sleep(20_000), 0)),
      ...(await freezeFor(stage, "frozen: Envoy for 30 s", ENVOY, stage.targets, () => sleep(30_000))),
    ];
    await using _short = await shortCertificates(stage, stage.targets);
    const ended = await freezeFor(stage, "frozen past the certificate", MACHINE, stage.targets, async () => {
      // Which is on disk is the one in use: nobody could renew it since.
      for (const target of stage.targets) await sleep((await leftOf(target)) + 1_000);
    });
    return [...rows, ...ended];
  },
};

/** Something that is made to stand still. */
interface Freezer {
  /** Who shows that it stands still, and what does. */
  readonly proof: string;
  /** Does nothing get through while it stands still? */
  readonly isDataPath: boolean;
  freeze(target: Target): Promise<void>;
  isFrozen(target: Target): Promise<boolean>;
  thaw(target: Target): Promise<void>;
}

const MACHINE: Freezer = {
  proof: "every process of the machine stood still, as its cgroup says",
  isDataPath: true,
  freeze: ({ machine }) => machine.freeze(),
  isFrozen: async ({ machine }) => machine.isFrozen,
  thaw: async ({ machine }) => machine.thaw(),
};
const AGENT = stopped("agent");
const ENVOY = stopped("envoy");

function stopped(process: Process): Freezer {
  const signal = async (target: Target, name: string): Promise<void> => {
    await target.machine.exec(["kill", `-${name}`, String(await pidOf(target, process))]);
  };
  return {
    proof: `the ${process} was stopped by a signal (state T), and the same at the end`,
    isDataPath: process === "envoy",
    freeze: (target) => signal(target, "STOP"),
    isFrozen: async (target) => {
      const pid = await pidOf(target, process);
      const { stdout } = await target.machine.exec(["ps", "-o", "state=", "-p", String(pid)], {
        allowFail: true,
      });
      return stdout.trim() === "T";
    },
    thaw: (target) => signal(target, "CONT"),
  };
}

const leftOf = async (target: Target): Promise<number> =>
  (await certificateOf(target)).validToDate.getTime() - Date.now();

const pidsOf = (target: Target): Promise<(number | undefined)[]> =>
  Promise.all([pidOf(target, "agent"), pidOf(target, "envoy")]);

async function freezeFor(
  stage: Stage,
  name: string,
  freezer: Freezer,
  targets: readonly Target[],
  until: () => Promise<void>,
  listedAgainMs = LISTED_AGAIN_MS,
): Promise<Row[]> {
  const before = new Map<Target, string>();
  for (const target of targets) before.set(target, String(await pidsOf(target)));
  let still: Span = [0, 0];
  const faulty = async (): Promise<string> => {
    const from = Date.now();
    try {
      await Promise.all(targets.map((target) => freezer.freeze(target)));
      await until();
      for (const target of targets)
        if (!(await freezer.isFrozen(target))) throw new Error(`${target.machine.name} was thawed meanwhile`);
    } finally {
      for (const target of targets) await freezer.thaw(target);
    }
    still = [from, Date.now()];
    return `${freezer.proof}, for ${Math.round((still[1] - from) / 1000)} s`;
  };
  // Who sleeps is not broken: to be ended for it would cost the connections that have outlived the sleep.
  const after: After = async (target) =>
    String(await pidsOf(target)) === before.get(target)
      ? { end: "agent and Envoy went on" }
      : { end: "agent or Envoy was started anew", unmet: "agent or Envoy was ended for having slept" };
  return underLoad(stage, name, targets, faulty, {
    after,
    allowance: (_target, seen) =>
      freezer.isDataPath
        ? {
            allowed: seen.underWayDuring([[still[0], still[1] + listedAgainMs]]),
            because: `those under way while nobody was awake to answer${listedAgainMs === 0 ? "" : `, and ${listedAgainMs / 1000} s for istiod to list it again`}`,
          }
        : { allowed: 0, because: "Envoy was awake" },
  });
}
