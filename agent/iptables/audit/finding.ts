import type { SeenTable } from "../read.ts";

export type Severity = "critical" | "high" | "medium" | "low" | "info";

/** One thing that is wrong with capture, or may be soon. Ids are stable: scripts and runbooks name them. */
export interface Finding {
  readonly id: string;
  readonly severity: Severity;
  readonly title: string;
  /** Lines from the machine that show it. */
  readonly evidence: readonly string[];
  /** One sentence. */
  readonly remedy: string;
  /** To be typed as it stands; empty if there is no single command. */
  readonly command: string;
}

/** 2 if anything is critical, 1 for high or medium, else 0. */
export function auditExitCode(findings: readonly Finding[]): 0 | 1 | 2 {
  if (findings.some(({ severity }) => severity === "critical")) return 2;
  return findings.some(({ severity }) => severity === "high" || severity === "medium") ? 1 : 0;
}

/** Puts the confirmed rules right. */
export const REPAIR = "vmmesh iptables repair";
/** Plans anew from what the machine is now. */
export const APPLY = "vmmesh iptables apply";

/** `remedy` is one sentence. */
export function finding(
  id: string,
  severity: Severity,
  title: string,
  evidence: readonly string[],
  remedy: string,
  command = "",
): Finding {
  return { id, severity, title, evidence, remedy, command };
}

/** A finding if there is evidence for it. */
export function when(evidence: readonly string[], make: (evidence: readonly string[]) => Finding): Finding[] {
  return evidence.length === 0 ? [] : [make(evidence)];
}

/** Table and family, for evidence. */
export const place = (seen: SeenTable): string => `${seen.table} (IPv${seen.family})`;
