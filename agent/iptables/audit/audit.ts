import type { Host } from "../../platform/host.ts";
import { probeFindings } from "../probe.ts";
import type { Evidence } from "./evidence.ts";
import { exemptionFindings } from "./exemptions.ts";
import { type Finding, finding } from "./finding.ts";
import { gather } from "./gather.ts";
import { inboundFindings } from "./inbound.ts";
import { orderFindings } from "./order.ts";
import { residueFindings } from "./residue.ts";
import { shadowingFindings } from "./shadowing.ts";

/** Every finding that the evidence supports, by id. Pure. */
export function judge(evidence: Evidence): Finding[] {
  if (evidence.noPrivilege !== undefined) {
    return [
      finding(
        "FW041",
        "critical",
        "the firewall cannot be read",
        [evidence.noPrivilege],
        "Run the audit as root on the machine itself.",
        "sudo vmmesh iptables audit",
      ),
    ];
  }
  const { confirmed } = evidence;
  return [
    ...residueFindings(evidence),
    ...(confirmed === undefined ? [] : orderFindings(evidence, confirmed.plan, confirmed.printed)),
    ...(confirmed === undefined ? [] : shadowingFindings(evidence, confirmed)),
    ...(confirmed === undefined ? [] : exemptionFindings(evidence, confirmed.plan)),
    ...(confirmed === undefined ? [] : inboundFindings(evidence, confirmed.plan)),
  ].sort((a, b) => a.id.localeCompare(b.id));
}

/**
 * What is wrong with capture on this machine. Reads only: no test rule, no legacy table that is not registered. One
 * connection is made for each family (`probe.ts`).
 *
 * @param rulesDir undefined on a machine that is not joined
 */
export async function auditCapture(
  host: Pick<Host, "run" | "files" | "random">,
  rulesDir: string | undefined,
): Promise<Finding[]> {
  return [...judge(await gather(host, rulesDir)), ...(await probeFindings(host, rulesDir))];
}
