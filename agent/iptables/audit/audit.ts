import type { Host } from "../../platform/host.ts";
import type { CapturePlan } from "../plan.ts";
import { judgeProbe, probeFamilies } from "../probe.ts";
import { driftFindings } from "./drift.ts";
import type { Evidence } from "./evidence.ts";
import { exemptionFindings } from "./exemptions.ts";
import { type Finding, finding } from "./finding.ts";
import { gather } from "./gather.ts";
import { inboundFindings } from "./inbound.ts";
import { enforcementFindings, kernelFindings } from "./kernel.ts";
import { kubernetesFindings, localServiceFindings } from "./kubernetes.ts";
import { mismatchFindings } from "./mismatch.ts";
import { orderFindings } from "./order.ts";
import { residueFindings } from "./residue.ts";
import { heldFindings, rivalFindings } from "./rivals.ts";
import { shadowingFindings } from "./shadowing.ts";
import { trackingFindings } from "./tracking.ts";

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
    ...kernelFindings(evidence),
    ...kubernetesFindings(evidence),
    ...(confirmed === undefined ? [] : orderFindings(evidence, confirmed.plan, confirmed.printed)),
    ...(confirmed === undefined ? [] : shadowingFindings(evidence, confirmed)),
    ...(confirmed === undefined ? [] : exemptionFindings(evidence, confirmed.plan)),
    ...(confirmed === undefined
      ? []
      : [
          ...inboundFindings(evidence, confirmed.plan),
          ...enforcementFindings(evidence, confirmed.plan),
          ...localServiceFindings(evidence, confirmed.plan),
          ...trackingFindings(evidence, confirmed.plan),
          ...rivalFindings(evidence, confirmed.plan),
          ...heldFindings(evidence, confirmed.plan),
        ]),
  ].sort((a, b) => a.id.localeCompare(b.id));
}

/**
 * What is wrong with capture on this machine. Reads only: no test rule, no legacy table that is not registered. One
 * connection is made for each family (`probe.ts`).
 *
 * @param rulesDir undefined on a machine that is not joined
 * @param wanted what today's configuration would have applied; undefined: nobody can say
 */
export async function auditCapture(
  host: Pick<Host, "run" | "files" | "clock">,
  rulesDir: string | undefined,
  wanted?: CapturePlan | Promise<CapturePlan>,
): Promise<Finding[]> {
  const [evidence, today] = await Promise.all([gather(host, rulesDir), wanted]);
  // After it: what the probe itself changes is not to be read as the machine's own.
  const judged = judge(evidence);
  const probes = await probeFamilies(host, rulesDir);
  const { confirmed } = evidence;
  return [
    ...judged,
    ...mismatchFindings(judged, probes),
    ...probes.flatMap(judgeProbe),
    ...(confirmed === undefined || today === undefined ? [] : driftFindings(confirmed.plan, today)),
  ];
}
