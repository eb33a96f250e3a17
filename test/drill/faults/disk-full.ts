import { waitFor } from "../../lab/lab.ts";
import { certificateOf, shortCertificates } from "../credentials.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { tellNews } from "../news.ts";
import { statusOf } from "../stage.ts";

const STATE = "/var/lib/vmmesh";
const FILLER = `${STATE}/filler`;
/** What the agent says of each thing that it could not write. */
const FINDINGS = ["identity-not-stored", "last-good-failed"] as const;

export const fault: Fault = {
  name: "disk-full",
  about:
    "no byte is free where the agent keeps its state, across a renewal and a change of the configuration",
  async run(stage) {
    const { machine } = stage.vmmesh;
    await using _short = await shortCertificates(stage, [stage.vmmesh]);
    await using end = new AsyncDisposableStack();
    // A small file system of its own, with what was there.
    await machine.exec(
      `systemctl stop vmmesh-agent && cp -a ${STATE} /run/drill-state && mount -t tmpfs -o size=4m,mode=0700 drill ${STATE} &&
       cp -a /run/drill-state/. ${STATE} && chown --reference=/run/drill-state ${STATE} && rm -r /run/drill-state && systemctl start vmmesh-agent`,
    );
    end.defer(async () => {
      await machine.exec(`systemctl stop vmmesh-agent; umount ${STATE}; systemctl start vmmesh-agent`);
    });
    await stage.well(stage.vmmesh);
    const said = new Set<string>();
    const faulty = async (): Promise<string> => {
      const before = (await statusOf(machine)).identity?.notAfter;
      await machine.exec(
        `head -c 8M /dev/zero > ${FILLER}; [ "$(df --output=avail ${STATE} | tail -n 1)" -eq 0 ]`,
      );
      try {
        const news = end.use(await tellNews(stage.lab, "drill-full"));
        await waitFor("the news", async () => ((await news.knownTo(machine)) ? true : undefined));
        const renewed = await waitFor(
          "a renewal",
          async () => {
            const { identity, conditions } = await statusOf(machine);
            for (const { id } of conditions) said.add(id);
            const isNew = identity !== undefined && identity.notAfter !== before;
            return isNew && FINDINGS.every((id) => said.has(id)) ? identity.notAfter : undefined;
          },
          90_000,
        ).catch(() => undefined);
        const stored = (await certificateOf(stage.vmmesh)).validToDate.toISOString();
        if (stored === renewed) throw new Error("the new certificate was stored: the disk was not full");
        return `0 bytes were free; the certificate in use ends at ${renewed}, the stored one at ${stored}`;
      } finally {
        await machine.exec(["rm", FILLER]);
      }
    };
    return await underLoad(stage, "disk-full", [stage.vmmesh], faulty, {
      well: async (target) => {
        await stage.well(target);
        await waitFor(
          "the findings to be over",
          async () => {
            const { conditions } = await statusOf(machine);
            return conditions.some(({ id }) => (FINDINGS as readonly string[]).includes(id))
              ? undefined
              : true;
          },
          90_000,
        );
      },
      after: async () => {
        const silent = FINDINGS.filter((id) => !said.has(id));
        const ends = `it said ${[...said].join(", ")}`;
        return silent.length === 0
          ? { end: ends }
          : { end: ends, unmet: `it never said ${silent.join(", ")}` };
      },
    });
  },
};
