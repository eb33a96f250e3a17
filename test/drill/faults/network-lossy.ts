import { sleep, waitFor } from "../../lab/lab.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { losePackets } from "../network.ts";
import { isConnected } from "../stage.ts";

const PERCENT = 20;

export const fault: Fault = {
  name: "network-lossy",
  about: `every fifth packet to and from the control plane is lost, while istiod is restarted`,
  run: (stage, scale) =>
    underLoad(stage, "network-lossy", stage.targets, async () => {
      const machines = stage.targets.map(({ machine }) => machine);
      await using loss = await losePackets(stage.lab, machines, PERCENT);
      // A new connection has to come through the loss, not only one that stands.
      await stage.lab.restartIstiod();
      for (const target of stage.targets)
        await waitFor(
          `${target.machine.name} to connect through the loss`,
          async () => ((await isConnected(target)) ? true : undefined),
          60_000,
        );
      await sleep(scale === "full" ? 60_000 : 1_000);
      const dropped = await loss.dropped();
      if (dropped === 0) throw new Error("no packet was lost");
      return `${dropped} packets were lost; both connected to the new istiod all the same`;
    }),
};
