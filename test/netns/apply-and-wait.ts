import { applyPlan } from "../../agent/iptables/apply.ts";
import { planCapture } from "../../agent/iptables/plan.ts";
import { readMachine } from "../../agent/iptables/read.ts";
import { renderPlan } from "../../agent/iptables/render.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { WISH } from "./lab.ts";

/** A join that is killed in its trial: applies, says so, and waits for its end. Arguments: rulesDir, milliseconds. */
const [rulesDir = "", confirmWithinMs] = process.argv.slice(2);
const host = linuxHost();
await applyPlan(host, renderPlan(planCapture(WISH, await readMachine(host))), {
  confirmWithinMs: Number(confirmWithinMs),
  rulesDir,
  unit: "detached",
});
console.log("applied");
await host.clock.sleep(60_000);
