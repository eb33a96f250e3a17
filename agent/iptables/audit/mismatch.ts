import type { ProbeResult } from "../probe.ts";
import { type Finding, finding } from "./finding.ts";

/** Findings each of which says why a connection may go past Envoy. */
const EXPLANATIONS = new Set([
  ...[
    "FW001",
    "FW002",
    "FW005",
    "FW007",
    "FW008",
    "FW009",
    "FW011",
    "FW012",
    "FW013",
    "FW015",
    "FW016",
    "FW018",
  ],
  ...["FW025", "FW028", "FW042"],
]);

/** The rules were read and nothing is wrong with them, yet a real connection went past Envoy: the connection is right. */
export function mismatchFindings(judged: readonly Finding[], probes: readonly ProbeResult[]): Finding[] {
  if (judged.some(({ id }) => EXPLANATIONS.has(id))) return [];
  return probes
    .filter(({ met }) => met === "past")
    .map(({ family, seen }) =>
      finding(
        "FW043",
        "high",
        `the rules look right, and a real connection went past Envoy (IPv${family})`,
        ["by the rules: to Envoy", `by the connection: ${seen}`],
        "Trust the connection, and send the output of `vmmesh iptables trace --live` for it with the bug report.",
      ),
    );
}
