import { renderFence } from "../nft.ts";
import type { CapturePlan } from "../plan.ts";
import { renderRule } from "../render.ts";
import { APPLY, type Finding, finding, when } from "./finding.ts";

/** Evidence is for a person: of more lines than these, of each kind, there is the number. */
const SHOWN = 3;

/** What would be rendered from today's configuration, and is not what was confirmed; ours in order, so a mere move is none. */
export function driftFindings(confirmed: CapturePlan, wanted: CapturePlan): Finding[] {
  const [now, then] = [linesOf(wanted), linesOf(confirmed)];
  const some = (words: string, lines: readonly string[]): string[] => [
    ...lines.slice(0, SHOWN).map((line) => `${words}: ${line}`),
    ...(lines.length > SHOWN ? [`${words}: ${lines.length - SHOWN} more`] : []),
  ];
  const changes = [
    ...some(
      "would come",
      [...now].filter((line) => !then.has(line)),
    ),
    ...some(
      "would go",
      [...then].filter((line) => !now.has(line)),
    ),
  ];
  return when(changes, (lines) =>
    finding(
      "FW047",
      "medium",
      "the configuration asks for other rules than those in force",
      lines,
      "sidecar.env, the mesh's configuration, resolv.conf or istiod's address changed since the rules were confirmed.",
      APPLY,
    ),
  );
}

function linesOf({ families, fence }: CapturePlan): Set<string> {
  const rules = families.flatMap(({ family, rules: own }) =>
    own.map(
      (rule) => `IPv${family} ${rule.table} ${rule.chain} ${renderRule(rule, family, { comments: false })}`,
    ),
  );
  const fenced = renderFence(fence)
    .split("\n")
    .filter((line) => line.includes(" comment "))
    .map((line) => `fence ${line.trim().replace(/ comment ".*"$/, "")}`);
  return new Set([...rules, ...fenced]);
}
