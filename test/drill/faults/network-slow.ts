import { sleep, waitFor } from "../../lab/lab.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { isConnected } from "../stage.ts";

/** Of a modem. The kernel of a test machine need not have netem, by which packets can be delayed; this queue comes with it. */
const QUEUE = ["root", "tbf", "rate", "56kbit", "burst", "3k", "latency", "3s"];
const DEVICE = ["dev", "br0"];

export const fault: Fault = {
  name: "network-slow",
  about: "what the control plane sends goes through 56 kbit/s, while istiod is restarted",
  run: (stage, scale) =>
    underLoad(
      stage,
      "network-slow",
      stage.targets,
      async () => {
        const tc = (verb: string, ...rest: string[]) =>
          stage.lab.exec(["tc", "-s", "qdisc", verb, ...DEVICE, ...rest]);
        await tc("add", ...QUEUE);
        try {
          // The whole configuration has to come through it, not only what is new.
          await stage.lab.restartIstiod();
          for (const target of stage.targets)
            await waitFor(
              `${target.machine.name} to connect`,
              async () => ((await isConnected(target)) ? true : undefined),
              60_000,
            );
          await sleep(scale === "full" ? 60_000 : 1_000);
          const { stdout } = await tc("show");
          const [, bytes = "0", held = "0"] = /Sent (\d+) bytes.*overlimits (\d+)/.exec(stdout) ?? [];
          if (Number(held) === 0) throw new Error(`no packet had to wait: ${stdout}`);
          return `${bytes} bytes went through, and ${held} times something had to wait; both connected to the new istiod all the same`;
        } finally {
          await tc("del", "root");
        }
      },
      { wellWithinMs: 90_000 },
    ),
};
