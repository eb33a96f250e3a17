import type { GenerationFile } from "../generation.ts";
import { GUARD_PRIORITY } from "../nft.ts";
import type { BaseChain } from "../parse.ts";
import { nftTables } from "../undo.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, REPAIR, when } from "./finding.ts";
import { guardInForce } from "./inForce.ts";

/** Tables that iptables-nft itself makes. */
const IPTABLES_TABLES = new Set([
  "ip nat",
  "ip6 nat",
  "ip filter",
  "ip6 filter",
  "ip mangle",
  "ip6 mangle",
  "ip raw",
  "ip6 raw",
]);

/** nft: our own tables, and base chains of others that come earlier or at an undefined moment. */
export function shadowingFindings(
  evidence: Evidence,
  { plan, nft }: Pick<GenerationFile, "plan" | "nft">,
): Finding[] {
  const ours = nftTables(plan);
  const changed = ours.flatMap((name) => {
    const now = evidence.nftNow[name];
    if (now === undefined) return [`table ${name} is gone`];
    return now === nft[name] ? [] : [`table ${name} is not what was loaded`];
  });
  const first = guardInForce(evidence, plan) ? GUARD_PRIORITY : -100;
  const foreign = evidence.baseChains.filter(
    ({ table, type, hook }) =>
      type === "nat" &&
      (hook === "output" || hook === "prerouting") &&
      !IPTABLES_TABLES.has(table) &&
      !ours.includes(table),
  );
  const say = ({ table, chain, hook, priority }: BaseChain): string =>
    `table ${table}, chain ${chain}: nat hook ${hook} priority ${priority}`;
  return [
    ...when(changed, (lines) =>
      finding("FW042", "high", "guard or fence is not as it was loaded", lines, "Load them again.", REPAIR),
    ),
    ...when(foreign.filter(({ priority }) => priority === first).map(say), (lines) =>
      finding(
        "FW008",
        "critical",
        "another nat chain has our priority: which runs first is not defined",
        lines,
        "Load the guard, which runs ahead of it.",
        REPAIR,
      ),
    ),
    ...when(foreign.filter(({ priority }) => priority < first).map(say), (lines) =>
      finding(
        "FW009",
        "critical",
        "another nat chain runs before ours",
        lines,
        "Ask its owner for a later priority, or let it be.",
      ),
    ),
  ];
}
