import { oursIn } from "../elsewhere.ts";
import { isOurLine } from "../rules.ts";
import type { Evidence } from "./evidence.ts";
import { APPLY, type Finding, finding, place, REPAIR, when } from "./finding.ts";

/** Nobody can say whose an empty chain was; it captures nothing. */
const isEmptyChain = (line: string): boolean => line.includes("empty chain");

/** Rules of ours in a backend in which they were not applied. */
function elsewhere({ confirmed, saves }: Evidence): string[] {
  if (confirmed === undefined) return [];
  return saves
    .filter(({ backend }) => backend !== confirmed.plan.backend)
    .flatMap(({ backend, family, tables }) =>
      oursIn(tables, family).flatMap(({ table, lines }) =>
        lines.map((line) => `iptables-${backend}, ${table} (IPv${family}): ${line}`),
      ),
    );
}

/** What can be wrong whether or not this machine is joined. */
export function residueFindings(evidence: Evidence): Finding[] {
  const recorded = new Set((evidence.confirmed?.printed ?? []).flatMap(({ own }) => own));
  const strayOurs = evidence.strayRules.filter((line) => isOurLine(line) || isEmptyChain(line));
  const foreign = [
    ...evidence.strayRules,
    ...evidence.tables.flatMap((seen) =>
      // Without comments the record alone tells what is ours.
      seen.own.filter((line) => !recorded.has(line)).map((line) => `${place(seen)}: ${line}`),
    ),
  ].filter((line) => !isOurLine(line) && !isEmptyChain(line));
  const { nft, legacy } = evidence.backends;
  return [
    ...when(strayOurs, (lines) =>
      finding(
        "FW006",
        "medium",
        "chains of vmmesh are there although nothing is confirmed",
        lines,
        "Take them out.",
        "vmmesh iptables clean",
      ),
    ),
    ...when(foreign, (lines) =>
      finding(
        "FW007",
        "high",
        "ISTIO_* rules that vmmesh did not write",
        lines,
        "Stop the other owner (istio-iptables, pilot-agent or istio-cni), then take out what it left.",
        "vmmesh iptables clean --leftovers",
      ),
    ),
    ...when(elsewhere(evidence), (lines) =>
      finding(
        "FW013",
        "high",
        "rules of vmmesh are in two backends of iptables, and both are in force",
        lines,
        "Apply again: what is in the wrong one is taken out.",
        APPLY,
      ),
    ),
    ...(nft.natRules > 0 && legacy.natRules > 0 && elsewhere(evidence).length === 0
      ? [
          finding(
            "FW013",
            "high",
            "both iptables backends hold nat rules, and both are in force",
            [`iptables-nft: ${nft.natRules} nat rules`, `iptables-legacy: ${legacy.natRules} nat rules`],
            "Let every program use one backend (update-alternatives --config iptables).",
          ),
        ]
      : []),
    ...(evidence.legacyTables.length > 0 && legacy.rules === 0
      ? [
          finding(
            "FW014",
            "low",
            "legacy tables are registered but empty",
            [`/proc/net/ip_tables_names: ${evidence.legacyTables.join(" ")}`],
            "Nothing to do; they go at the next boot. Some program asked iptables-legacy for them.",
          ),
        ]
      : []),
    ...when(
      evidence.persisted.map(({ file, line, text }) => `${file}:${line}: ${text}`),
      (lines) =>
        finding(
          "FW031",
          "critical",
          "capture rules were saved into the machine's own firewall files",
          lines,
          "Delete these lines: at boot they redirect to ports where nobody listens.",
        ),
    ),
    ...when(evidence.traces, (lines) =>
      finding("FW044", "medium", "packet tracing was left on", lines, "Delete the trace rules."),
    ),
    ...(evidence.overdueTrial
      ? [
          finding(
            "FW045",
            "medium",
            "a trial of rules is over but was not taken back",
            ["rules/trial is still there"],
            "Let it be taken back now.",
            REPAIR,
          ),
        ]
      : []),
  ];
}
