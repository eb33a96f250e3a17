import { FENCE_TABLE, guardTable } from "./nft.ts";
import type { CapturePlan } from "./plan.ts";
import { commentsOf, ownChains, renderTable, tableRules } from "./render.ts";
import { undoRouting } from "./routing.ts";
import { type Family, HOOKS, PASSTHROUGH, type Table } from "./rules.ts";

/** nat first: as long as a redirect is there, the leases and zones that it relies on are there too. */
const UNDO_ORDER: readonly Table[] = ["nat", "mangle", "raw"];

const FORMER_NFT = '"$rules/confirmed/boot.nft"';

/** nft text that takes these tables out, whether they are there or not. */
export function removeTables(tables: readonly string[]): string {
  return tables.map((table) => `add table ${table}\ndelete table ${table}\n`).join("");
}

/**
 * The inverse of a plan as a POSIX shell script, rendered before anything is applied. It never restores a snapshot (that
 * would erase what kube-proxy wrote meanwhile): it empties and deletes our chains and the jumps to them that it finds, one
 * transaction a table, so it works on whatever is left. Jumps are fed back as printed, through iptables-restore, never
 * through the shell: a foreign rule's comment is data.
 *
 * `undo.sh now` runs at once; `undo.sh trial` and `undo.sh after SECONDS` only if this generation is still the trial: the
 * rename that claims it is the same that `confirm` needs, so exactly one of the two succeeds. With iptables-legacy nothing
 * is claimed or taken out before its lock could be had: `now SECONDS` and `trial SECONDS` give up after that time (exit
 * code 4), without SECONDS and with `after` they wait for as long as somebody holds it.
 */
export function renderUndoScript(plan: CapturePlan): string {
  const families = plan.families.filter(
    ({ family }) => plan.backend !== undefined && plan.programs[family] !== undefined,
  );
  return [
    "#!/bin/sh",
    "# vmmesh: takes the rules of this generation out again. Needs no Node.",
    'here=$(cd "$(dirname "$0")" && pwd -P)',
    'rules=$(dirname "$here")',
    'mode="$1"',
    'if [ "$mode" = after ]; then',
    '  exec </dev/null >>"$here/undo.log" 2>&1',
    '  sleep "$2"',
    "fi",
    ...takeLock(plan),
    'if [ "$mode" != now ]; then',
    "  # Until the last program of this script has ended: who applies, repairs or cleans up waits for it.",
    "  # A directory can be locked on a full disk, too.",
    '  exec 9<"$rules"',
    "  flock -w 60 9",
    '  [ "$(readlink "$rules/trial")" = "$(basename "$here")" ] || exit 0',
    '  mv -fT "$rules/trial" "$rules/undone" || exit 0',
    ...(plan.backend === "legacy"
      ? ["  # Claimed: now it has to be done, however long it takes.", "  wait=-w"]
      : []),
    "fi",
    "failed=0",
    ...(plan.guard
      ? [
          "# Guard and fence of a former generation come back in the transaction that takes these out: nothing slips between.",
          "former=/dev/null",
          `[ "$mode" = now ] || [ ! -e ${FORMER_NFT} ] || former=${FORMER_NFT}`,
          "{",
          "  cat <<'END'",
          removeTables(["ip vmmesh", "ip6 vmmesh", FENCE_TABLE]).trimEnd(),
          "END",
          '  cat "$former"',
          '} | if [ "$mode" != now ] && [ -e "$rules/confirmed/scope.sh" ]; then',
          '  sh "$rules/confirmed/scope.sh" load',
          "else",
          "  nft -f -",
          "fi || failed=1",
        ]
      : []),
    `[ ! -e "$here/made.address" ] || ip -6 addr del ${PASSTHROUGH[6]}/128 dev lo || true`,
    ...undoRouting(plan),
    ...families.flatMap((wanted) =>
      UNDO_ORDER.map((table) => ({ family: wanted.family, table, chains: ownChains(wanted, table) }))
        .filter(({ chains }) => chains.length > 0)
        .flatMap((at) => undoTable(plan, at)),
    ),
    // A former generation was confirmed: it comes back with the texts that were rendered for it.
    'if [ "$mode" != now ] && [ -e "$rules/confirmed" ]; then',
    '  [ ! -e "$rules/confirmed/load.sh" ] || sh "$rules/confirmed/load.sh" || failed=1',
    ...(plan.guard ? [] : [`  [ ! -e ${FORMER_NFT} ] || nft -f ${FORMER_NFT} || failed=1`]),
    '  [ ! -e "$rules/confirmed/routing.sh" ] || sh "$rules/confirmed/routing.sh" || failed=1',
    "fi",
    "exit $failed",
    "",
  ].join("\n");
}

/** Chains of one table of one family. */
export interface Chains {
  readonly family: Family;
  readonly table: Table;
  readonly chains: readonly string[];
}

type Programs = Pick<CapturePlan, "backend" | "programs">;

/**
 * A shell script that takes chains, and the jumps to them, out of one backend: `sh -s DIRECTORY SECONDS`, the directory of
 * the generation that made them.
 */
export function renderChainsOut(from: Programs, chains: readonly Chains[]): string {
  return [
    'here="$1"',
    'wait="-w $2"',
    "failed=0",
    ...UNDO_ORDER.flatMap((table) => chains.filter((at) => at.table === table)).flatMap((at) =>
      undoTable(from, at),
    ),
    "exit $failed",
    "",
  ].join("\n");
}

/**
 * A shell script that puts the iptables rules of a plan back, with its own programs and whatever is left of them, each table
 * in one transaction. undefined: it has none.
 */
export function renderLoadScript(plan: CapturePlan): string | undefined {
  if (plan.backend === undefined) return undefined;
  const tables = plan.families
    .filter(({ family }) => plan.programs[family] !== undefined)
    .flatMap((wanted) =>
      // nat last, as in every apply.
      UNDO_ORDER.toReversed()
        .filter((table) => tableRules(wanted, table).length > 0)
        .flatMap((table) => {
          const lines = renderTable(wanted, table, [], commentsOf(plan)).trimEnd().split("\n");
          const head = lines.filter((line) => /^[*:]/.test(line));
          const { family } = wanted;
          return [
            "text=$(",
            ...head.map((line) => `  echo '${line}'`),
            ...jumpsOut(plan, { family, table, chains: ownChains(wanted, table) }),
            "  cat <<'END'",
            ...lines.slice(head.length),
            "END",
            ")",
            `printf '%s\\n' "$text" | ${restore(plan, family)} || failed=1`,
          ];
        }),
    );
  return [
    "#!/bin/sh",
    "# vmmesh: puts the iptables rules of this generation back. Needs no Node.",
    "wait=-w",
    "failed=0",
    ...tables,
    "exit $failed",
    "",
  ].join("\n");
}

/** Shell lines: `$wait` for every call of iptables-legacy; the first call shows whether its lock is to be had at all. */
function takeLock({ backend, programs }: Programs): string[] {
  if (backend !== "legacy") return [];
  return [
    'wait="-w $2"',
    '[ "$mode" != after ] || wait=-w',
    // Other failures are for the calls below: what can be taken out is taken out.
    `${programs[4]} $wait -t nat -S OUTPUT >/dev/null || [ $? -ne 4 ] || exit 4`,
  ];
}

const waiting = ({ backend }: Programs): string => (backend === "legacy" ? " $wait" : "");

/** Program and options that feed one text to the kernel, in the script. */
function restore(plan: Programs, family: Family): string {
  return `${plan.programs[family]}-restore --noflush${waiting(plan)}`;
}

/**
 * `iptables-restore --noflush`; legacy waits for the lock that all its users share (nft needs none).
 * @see iptables-restore(8), -w since 1.6.2
 */
export function restoreCommand(
  plan: Pick<CapturePlan, "backend" | "programs">,
  family: Family,
): readonly [string, ...string[]] {
  return [`${plan.programs[family]}-restore`, "--noflush", ...(plan.backend === "legacy" ? ["-w", "5"] : [])];
}

/** What is to be fed back so that the jumps to these chains go, one line for each that is there. */
function jumpsOut(plan: Programs, { family, table, chains }: Chains): string[] {
  const toOurs = `s/^-A \\(.* -j \\(${chains.join("\\|")}\\)\\)$/-D \\1/p`;
  return HOOKS.map(
    (hook) => `  ${plan.programs[family]}${waiting(plan)} -t ${table} -S ${hook} | sed -n '${toOurs}'`,
  );
}

function undoTable(plan: Programs, at: Chains): string[] {
  const { family, table, chains } = at;
  const program = plan.programs[family];
  const nftFamily = family === 4 ? "ip" : "ip6";
  return [
    // The whole text first: legacy's restore would hold the lock for which the listing within it waits.
    "text=$(",
    `  echo '*${table}'`,
    ...chains.map((chain) => `  echo ':${chain} - [0:0]'`),
    ...jumpsOut(plan, at),
    ...chains.map((chain) => `  echo '-X ${chain}'`),
    "  echo COMMIT",
    ")",
    `printf '%s\\n' "$text" | ${restore(plan, family)} || failed=1`,
    ...(plan.backend === "nft"
      ? [
          "# The table was not there before us: it goes if nobody else has put anything into it.",
          `if [ -e "$here/made.${nftFamily}.${table}" ] && ! ${program}-save -t ${table} | grep -q '^-A\\|^:[^ ]* - \\|incompatible'; then`,
          `  nft delete table ${nftFamily} ${table}`,
          "fi",
        ]
      : []),
  ];
}

/** The guard tables and the fence, as `nft list table` names them. */
export function nftTables(plan: CapturePlan): string[] {
  return [
    ...(plan.guard ? plan.families.map(({ family }) => guardTable(family)) : []),
    ...(plan.fence.length > 0 ? [FENCE_TABLE] : []),
  ];
}
