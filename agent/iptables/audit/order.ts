import type { GenerationFile } from "../generation.ts";
import type { CapturePlan } from "../plan.ts";
import { tableRules } from "../render.ts";
import { isHook, isOurLine } from "../rules.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, place, REPAIR, when } from "./finding.ts";
import { guardInForce } from "./inForce.ts";

/** The ISTIO_* chains against the record of what was applied. */
export function orderFindings(
  evidence: Evidence,
  plan: CapturePlan,
  printed: GenerationFile["printed"],
): Finding[] {
  const nat = evidence.tables.filter(({ table }) => table === "nat");
  const lost = nat.flatMap((seen) => seen.missing.map((hook) => `${place(seen)}: no jump in ${hook}`));
  const ahead = nat.flatMap((seen) =>
    seen.ahead.map(
      (it) =>
        `${place(seen)}, position ${it.position}: ${it.line}${it.by === undefined ? "" : ` (${it.by})`}`,
    ),
  );
  const benign = nat.flatMap((seen) => seen.benign.map((line) => `${place(seen)}: ${line}`));
  const twice = evidence.tables.flatMap((seen) => {
    const lines = seen.jumps.map(({ line }) => line);
    const wanted = plan.families.find(({ family }) => family === seen.family);
    const hooks =
      wanted === undefined ? [] : tableRules(wanted, seen.table).filter(({ chain }) => isHook(chain));
    return lines.length > hooks.length ? lines.map((line) => `${place(seen)}: ${line}`) : [];
  });
  const drift = evidence.tables.flatMap((seen) => {
    const wanted = printed.find((it) => it.family === seen.family && it.table === seen.table)?.own ?? [];
    return [
      ...wanted.filter((line) => !seen.own.includes(line)).map((line) => `${place(seen)} lacks: ${line}`),
      ...seen.own
        .filter((line) => isOurLine(line) && !wanted.includes(line))
        .map((line) => `${place(seen)} has: ${line}`),
      ...(wanted.length === seen.own.length &&
      wanted.every((line) => seen.own.includes(line)) &&
      wanted.some((line, index) => line !== seen.own[index])
        ? [`${place(seen)}: the order is different`]
        : []),
    ];
  });
  const untracked = evidence.tables
    .filter(({ table }) => table === "raw")
    .flatMap((seen) => seen.untracking.map((line) => `${place(seen)}: ${line}`));
  return [
    ...when(lost, (lines) =>
      finding("FW001", "critical", "the jump to our chains is missing", lines, "Put it back.", REPAIR),
    ),
    ...when(ahead, (lines) =>
      finding(
        "FW002",
        "critical",
        "a rule ahead of ours takes captured traffic away",
        lines,
        "Move ours ahead again; the guard captures meanwhile.",
        REPAIR,
      ),
    ),
    ...when(benign, (lines) =>
      finding("FW003", "info", "rules ahead of ours that divert nothing", lines, "Nothing to do."),
    ),
    ...when(twice, (lines) =>
      finding(
        "FW004",
        "medium",
        "a jump to our chains is there more than once",
        lines,
        "Write the table again.",
        REPAIR,
      ),
    ),
    ...when(drift, (lines) =>
      finding(
        "FW005",
        "high",
        "our chains are not what was applied",
        lines,
        "Write the table again.",
        REPAIR,
      ),
    ),
    ...(guardInForce(evidence, plan)
      ? []
      : when(untracked, (lines) =>
          finding(
            "FW017",
            "high",
            "questions for names are untracked before they can be redirected",
            lines,
            "Move our jump in raw to the front.",
            REPAIR,
          ),
        )),
    ...when(
      evidence.tables.flatMap((seen) =>
        seen.own
          .filter(
            (line) =>
              /-p tcp .*-j REDIRECT/.test(line) && !/--tcp-flags FIN,SYN,RST,ACK SYN |--syn /.test(line),
          )
          .map((line) => `${place(seen)}: ${line}`),
      ),
      (lines) =>
        finding(
          "FW024",
          "medium",
          "a redirect takes more than first segments: it can end connections that are open",
          lines,
          "Write the table again.",
          REPAIR,
        ),
    ),
  ];
}
