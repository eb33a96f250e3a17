import type { CapturePlan } from "../plan.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, when } from "./finding.ts";

/** Of conntrack's room; above it the kernel begins to drop (nf_conntrack_core.c: early_drop). */
const CROWDED = 0.8;
/** Everybody who writes rules waits as long. */
const LONG_WAIT_MS = 1000;

/** What the kernel and the tools cannot show or do, whether or not this machine is joined. */
export function kernelFindings(evidence: Evidence): Finding[] {
  const { conntrack, lock } = evidence.around;
  const legacy = evidence.backends.legacy.rules > 0;
  return [
    ...when(
      evidence.saves.flatMap(({ backend, family, complaints }) =>
        complaints.map((line) => `IPv${family}, ${backend}: ${line}`),
      ),
      (lines) =>
        finding(
          "FW015",
          "high",
          "a table of iptables holds what iptables cannot show: its order cannot be judged",
          lines,
          "Move what was written with nft into an nft table of its own.",
          "nft list chains",
        ),
    ),
    ...when(
      [
        ...(conntrack.max > 0 && conntrack.count > conntrack.max * CROWDED
          ? [`${conntrack.count} of ${conntrack.max} connections`]
          : []),
        ...(conntrack.lost > 0 ? [`${conntrack.lost} packets were dropped while this was looked at`] : []),
      ],
      (lines) =>
        finding(
          "FW038",
          "medium",
          "the table of connections is nearly full: new ones, captured ones among them, will be dropped",
          lines,
          "Give it more room.",
          `sysctl -w net.netfilter.nf_conntrack_max=${Math.max(conntrack.max, 65_536) * 2}`,
        ),
    ),
    ...when(
      [
        ...(legacy && lock.waitedMs > LONG_WAIT_MS
          ? [`iptables-legacy answered after ${Math.round(lock.waitedMs)} ms`]
          : []),
        ...(legacy ? lock.strangers : []),
      ],
      (lines) =>
        finding(
          "FW035",
          "medium",
          "programs that write iptables-legacy rules keep each other waiting, or do not wait for each other at all",
          lines,
          "Mount /run/xtables.lock into the container that writes rules, and let no program hold it.",
        ),
    ),
  ];
}

/** What keeps our own rules from being in force. */
export function enforcementFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const [sleeping] = evidence.dormant;
  const users = [
    ["Envoy", plan.envoyUid],
    ["the agent", plan.agentUid],
  ] as const;
  return [
    ...(sleeping === undefined
      ? []
      : [
          finding(
            "FW016",
            "critical",
            "tables are listed but not in force",
            evidence.dormant.map((table) => `table ${table} has the flag dormant`),
            "Wake them.",
            evidence.dormant.map((table) => `nft add table ${table} '{ }'`).join(" && "),
          ),
        ]),
    ...when(
      users
        .filter(([, uid]) => !isMapped(evidence.around.uidMap, uid))
        .map(([who, uid]) => `uid ${uid} of ${who} is not in /proc/self/uid_map`),
      (lines) =>
        finding(
          "FW027",
          "high",
          "iptables cannot match these users in this user namespace",
          lines,
          "Map the uids into the namespace, or run vmmesh on the machine itself.",
        ),
    ),
  ];
}

/** @see user_namespaces(7): lines of "first inside, first outside, length" */
function isMapped(uidMap: string, uid: number): boolean {
  const lines = uidMap.split("\n").map((line) => line.trim().split(/\s+/).map(Number));
  const known = lines.filter((numbers) => numbers.length === 3);
  return (
    known.length === 0 || known.some(([inside = 0, , length = 0]) => uid >= inside && uid < inside + length)
  );
}
