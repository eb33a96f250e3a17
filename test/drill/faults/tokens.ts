import { writeFileSync } from "node:fs";
import { sleep, waitFor } from "../../lab/lab.ts";
import { certificateOf, putToken, shortCertificates, tokenFor } from "../credentials.ts";
import type { Fault, Row } from "../fault.ts";
import { HANDSHAKE_RATE, LISTED_AGAIN_MS, underLoad } from "../measure.ts";
import { type Stage, statusOf, type Target } from "../stage.ts";

const ENDED_SEC = -600;
const HEAL = "vmmesh join --bundle /root/bundle";

export const fault: Fault = {
  name: "tokens",
  about: "the token ends while the certificate lives; then the certificate ends, too",
  async run(stage, scale) {
    await using _short = await shortCertificates(stage, stage.targets);
    const rows = await tokenEnded(stage, scale === "full" ? 5 : 1);
    return [...rows, ...(await bothEnded(stage))];
  },
};

async function tokenEnded(stage: Stage, renewals: number): Promise<Row[]> {
  const faulty = async (): Promise<string> => {
    for (const target of stage.targets) await putToken(target, tokenFor(stage, target, ENDED_SEC));
    const renewed = async (target: Target): Promise<void> => {
      for (let done = 0; done < renewals; done += 1) {
        const { serialNumber } = await certificateOf(target);
        await waitFor(
          `a new certificate of ${target.machine.name}`,
          async () => ((await certificateOf(target)).serialNumber === serialNumber ? undefined : true),
          70_000,
        );
      }
    };
    await Promise.all(stage.targets.map(renewed));
    return `the token of each had ended 10 minutes before, and the certificate changed ${renewals} times`;
  };
  return underLoad(stage, "tokens: ended", stage.targets, faulty, { handshakeRate: HANDSHAKE_RATE });
}

/** Nobody can renew while istiod is away; when it is back, nothing is left that it would take. */
async function bothEnded(stage: Stage): Promise<Row[]> {
  let from = 0;
  let healed = 0;
  const words: string[] = [];
  const faulty = async (): Promise<string> => {
    await stage.lab.stopIstiod();
    try {
      const ends = await Promise.all(stage.targets.map(async (it) => (await certificateOf(it)).validToDate));
      from = Math.min(...ends.map((end) => end.getTime()));
      await sleep(Math.max(...ends.map((end) => end.getTime())) + 1_000 - Date.now());
    } finally {
      await stage.lab.startIstiod();
    }
    const ended = await waitFor(
      "the end state",
      async () => {
        const found = (await statusOf(stage.vmmesh.machine)).conditions.find(
          ({ id, severity }) => id === "identity-not-renewed" && severity === "error",
        );
        return found?.next.includes("`vmmesh join --bundle DIR`") === true ? found : undefined;
      },
      60_000,
    );
    words.push(`status said: ${ended.message}`);
    const { machine } = stage.vmmesh;
    writeFileSync(`${machine.root}/root/bundle/istio-token`, tokenFor(stage, stage.vmmesh));
    const { stdout } = await machine.exec(HEAL);
    words.push(`\`${HEAL}\` said: ${stdout.split("\n")[0]}`);
    await putToken(stage.peer, tokenFor(stage, stage.peer));
    healed = Date.now();
    return `both had ended; ${words[0]}`;
  };
  return underLoad(stage, "tokens: certificate ended, too", stage.targets, faulty, {
    rate: 50,
    handshakeRate: HANDSHAKE_RATE,
    allowance: (_target, seen) => ({
      allowed: seen.underWayDuring([[from, healed + LISTED_AGAIN_MS]]),
      because: `those under way while nothing could prove who the machine is, and ${LISTED_AGAIN_MS / 1000} s for istiod to list it again`,
    }),
    after: async ({ side }) => (side === "vmmesh" ? { end: words[1] ?? "" } : {}),
  });
}
