import type { CapturePlan } from "../plan.ts";
import { nftTables } from "../undo.ts";
import type { Evidence } from "./evidence.ts";

/** Does the guard capture, whatever the order of the iptables rules is? */
export function guardInForce(evidence: Evidence, plan: CapturePlan): boolean {
  return (
    plan.guard &&
    nftTables(plan)
      .filter((name) => name.endsWith(" vmmesh"))
      .every((name) => evidence.nftNow[name] !== undefined)
  );
}

/** Does the fence refuse what would reach our listeners or the mesh past Envoy? */
export function fenceInForce(evidence: Evidence, plan: CapturePlan): boolean {
  return plan.fence.length > 0 && evidence.nftNow["inet vmmesh-fence"] !== undefined;
}
