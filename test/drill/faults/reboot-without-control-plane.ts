import { waitFor } from "../../lab/lab.ts";
import { startPeer } from "../../lab/peer.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { Watch } from "../shown.ts";
import type { Target } from "../stage.ts";

/** The promise: from the end of the boot to the first handshake. */
const SERVES_WITHIN_MS = 10_000;
const ANSWERS_WITHIN_MS = 30_000;

export const fault: Fault = {
  name: "reboot-without-control-plane",
  about: "the machines are rebooted while no control plane answers",
  async run(stage) {
    await using end = new AsyncDisposableStack();
    const shown = new Map(stage.targets.map((target) => [target, end.use(new Watch(stage, target))]));
    const booted = new Map<Target, number>();
    // By Istio's documentation the peer's token lies in /run, which a reboot empties: it gets what would be lost by that alone.
    await stage.peer.machine.exec(
      `systemctl enable -q peer.service; cp -a /run/secrets /var/lib/istio/secrets
       echo 'C /run/secrets - - - - /var/lib/istio/secrets' > /etc/tmpfiles.d/peer.conf`,
    );
    await stage.lab.stopIstiod();
    try {
      return await underLoad(
        stage,
        "reboot-without-control-plane",
        stage.targets,
        async () => {
          const reboot = async (target: Target): Promise<string> => {
            const { machine, side } = target;
            const before = machine.pid;
            await machine.reboot();
            booted.set(target, Date.now());
            return `${side}'s machine has another PID 1, ${machine.pid} instead of ${before}`;
          };
          return `${(await Promise.all(stage.targets.map(reboot))).join(", ")}; istiod did not run`;
        },
        {
          // Connected it can not be.
          well: async (target) => {
            await waitFor(
              `${target.url} to answer`,
              async () => ((await stage.answers(target)) ? true : undefined),
              ANSWERS_WITHIN_MS,
              100,
            );
          },
          allowance: (target, seen) => ({
            allowed: seen.underWayDuring(shown.get(target)?.without ?? []),
            because: "those under way while the machine was down, until it showed its certificate again",
          }),
          after: async (target) => {
            const lastMs = Math.max(...(shown.get(target)?.without ?? []).map(([, until]) => until));
            const ms = Math.max(0, lastMs - (booted.get(target) ?? 0));
            return {
              end: `it showed a certificate ${ms} ms after the boot`,
              ...(ms > SERVES_WITHIN_MS ? { unmet: `the promise is ${SERVES_WITHIN_MS} ms` } : {}),
            };
          },
        },
      );
    } finally {
      await stage.lab.startIstiod();
      await startPeer(stage.peer.machine);
      for (const target of stage.targets) await stage.well(target);
    }
  },
};
