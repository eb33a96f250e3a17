import { DIVERTING, HARMLESS, KNOWN_DIVERTERS, ownerOfChain, parseRule } from "./parse.ts";
import type { CapturePlan, FamilyPlan } from "./plan.ts";
import { commentsOf, ownChains, type RenderedPlan, renderTable, tableRules } from "./render.ts";
import { HOOKS } from "./rules.ts";
import { nftTables, restoreCommand } from "./undo.ts";

/** Beside `mend.sh`: a line for each thing that it has mended since the careful repair last read it. */
export const MENDED = "mended";

/**
 * The first answer to a displacement as a POSIX shell script, rendered before anything is applied: in the nat table of each
 * family our jumps come first again, with our chains, in one transaction; guard and fence are loaded if one is gone. It
 * reads first and writes nothing where all is in place. It judges only what can be judged at a glance: what is behind
 * chains of chains ahead of us, it leaves to the careful repair that follows.
 *
 * A foreign rule is data here: it is compared and fed back to iptables-restore, never evaluated.
 *
 * iptables-legacy causes no event; there it is only guard and fence that are put back.
 *
 * @returns undefined where no event would start it
 */
export function renderMendScript({
  plan,
  guard,
  fence,
}: Pick<RenderedPlan, "plan" | "guard" | "fence">): string | undefined {
  const families = plan.families.filter(
    (wanted) =>
      plan.backend === "nft" &&
      plan.programs[wanted.family] !== undefined &&
      tableRules(wanted, "nat").length > 0,
  );
  if (families.length === 0 && nftTables(plan).length === 0) return undefined;
  const own = families.flatMap((wanted) => ownChains(wanted, "nat"));
  const parts = [
    ...families.map((wanted) => ({ name: `nat${wanted.family}`, lines: natPart(plan, wanted) })),
    ...nftTables(plan).map((table, index) => ({
      name: `table${index}`,
      lines: [
        `nft -t list table ${table} >/dev/null 2>&1 || {`,
        `${plan.units === undefined ? "nft -f -" : 'sh "$here/scope.sh" load'} <<'END' && mended 'gone ${table}'`,
        (table.endsWith("-fence") ? fence : guard)?.trimEnd() ?? "",
        "END",
        "}",
      ],
    })),
  ];
  return [
    HEAD,
    ...(families.length === 0
      ? []
      : [
          JUDGE.replace("OUR_JUMPS", targets(own))
            .replace("HARMLESS", targets([...HARMLESS].filter((target) => target !== "RETURN")))
            // In the hook itself both end it: there is no chain to come back to.
            .replace("ENDING", `*" -j RETURN "*|*" -g "*`)
            .replaceAll("DIVERTING", targets([...DIVERTING, ...KNOWN_DIVERTERS])),
        ]),
    ...parts.flatMap(({ name, lines }) => [`${name}() {`, ...lines, "}"]),
    "failed=0",
    'all_of() { all=; for each; do "$each" & all="$all $!"; done; for each in $all; do wait "$each" || failed=1; done; }',
    "# Side by side: no family waits for the other's transaction. The tables that nobody displaces come after them.",
    ...["nat", "table"].map(
      (kind) => `all_of ${parts.flatMap(({ name }) => (name.startsWith(kind) ? [name] : [])).join(" ")}`,
    ),
    "exit $failed",
    "",
  ].join("\n");
}

const HEAD = String.raw`#!/bin/sh
# vmmesh: puts the redirect back in its place at once. Needs no Node; the careful repair looks at everything behind it.
here=${"$"}{0%/*}
# Other rules are on trial: these are not the ones that should be in force.
[ ! -L "$here/../trial" ] || exit 0
mended() { printf '%s\n' "$1" >>"$here/${MENDED}"; }`;

/** Next to no programs: a fork takes longer than all the rest of these. */
const JUDGE = String.raw`
# $line without what is in quotes, to $bare: a comment may say anything.
unquote() {
  rest=$line bare=
  while :; do
    case $rest in *\\\"*) rest=${"$"}{rest%%\\\"*}${"$"}{rest#*\\\"} ;; *) break ;; esac
  done
  while :; do
    case $rest in *\"*\"*) bare=$bare${"$"}{rest%%\"*} rest=${"$"}{rest#*\"} rest=${"$"}{rest#*\"} ;; *) break ;; esac
  done
  bare="$bare$rest "
}

# Does the chain that $bare leads to hold a rule that diverts? What is behind further chains, the careful repair sees.
leads_away() {
  chain=${"$"}{bare##* -[jg] }
  while IFS= read -r line; do
    unquote
    case $bare in DIVERTING) return 0 ;; esac
  done <<END
$($1 -t nat -S "${"$"}{chain%% *}" 2>/dev/null)
END
  return 1
}

# $3 is what program $1 prints of $hook in table $2. Our jumps are added to $out, to be taken out; to $why, why they go in anew.
judge() {
  found= ahead=
  while IFS= read -r line; do
    unquote
    case $bare in
      OUR_JUMPS)
        found=yes out="$out-D ${"$"}{line#-A }
" ;;
      HARMLESS) ;;
      ENDING|DIVERTING)
        [ -n "$found$ahead" ] || ahead=$line ;;
      *" -j "*)
        rule=$line
        [ -n "$found$ahead" ] || ! leads_away "$1" || ahead=$rule ;;
    esac
  done <<END
$3
END
  if [ -z "$found" ]; then
    why="${"$"}{why}missing $2 $hook
"
  elif [ -n "$ahead" ]; then
    why="${"$"}{why}ahead $2 $ahead
"
  fi
}
`;

/** Shell patterns of rules with one of these targets. */
function targets(names: Iterable<string>): string {
  return [...new Set(names)].map((name) => `*" -j ${name} "*|*" -g ${name} "*`).join("|");
}

function natPart(plan: CapturePlan, wanted: FamilyPlan): string[] {
  const hooks = HOOKS.filter((hook) => tableRules(wanted, "nat").some((rule) => rule.chain === hook));
  const program = plan.programs[wanted.family];
  const text = renderTable(wanted, "nat", [], commentsOf(plan)).trimEnd().split("\n");
  const head = text.filter((line) => /^[*:]/.test(line));
  return [
    "out= why=",
    `for hook in ${hooks.join(" ")}; do`,
    `  rules=$(${program} -t nat -S "$hook") || return 1`,
    `  judge ${program} "nat ${wanted.family}" "$rules"`,
    "done",
    '[ -n "$why" ] || return 0',
    "{",
    `printf '%s\\n' ${head.map((line) => `'${line}'`).join(" ")}`,
    "printf '%s' \"$out\"",
    "cat <<'END'",
    ...text.slice(head.length),
    "END",
    `} | ${restoreCommand(plan, wanted.family).join(" ")} && mended "$why"`,
  ];
}

/** What `mend.sh` has written into its file, as sentences for a person, with who is likely to have moved it. Pure. */
export function mendedSentences(text: string): string[] {
  return text.split("\n").flatMap((line) => {
    const [, kind, table, family, rest = ""] = /^(ahead|missing) (\w+) ([46]) (.+)$/.exec(line) ?? [];
    const gone = /^gone (.+)$/.exec(line)?.[1];
    if (gone !== undefined) return [`table ${gone} was gone`];
    if (kind === undefined) return [];
    const name = `${table} (IPv${family})`;
    return [
      kind === "missing"
        ? missing(name, [rest])
        : ahead(name, rest, ownerOfChain(parseRule(rest)?.target ?? "")),
    ];
  });
}

/** @param hooks in which there should be a jump of ours */
export function missing(table: string, hooks: readonly string[]): string {
  return `${table}: the jump in ${hooks.join(" and ")} was missing`;
}

/** @param rule as iptables prints it; `by` as `ownerOfChain` names it */
export function ahead(table: string, rule: string, by: string | undefined): string {
  return `${table}: \`${rule}\` stood ahead of us${by === undefined ? "" : `, put there by ${by}`}`;
}
