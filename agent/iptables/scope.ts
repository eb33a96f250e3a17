import { VmmeshError } from "../core/errors.ts";
import { setDropIn } from "../platform/dropIn.ts";
import type { Files, Host } from "../platform/host.ts";
import { FENCE_TABLE, guardTable } from "./nft.ts";
import { levelOf } from "./plan/senders.ts";
import type { UnitCgroup } from "./plan/wish.ts";
import type { CapturePlan } from "./plan.ts";
import { type UnitList, unitSet } from "./rules.ts";

/**
 * Units are matched by the number of their cgroup, which is another one after each restart. The numbers are elements of
 * sets; an `ExecCondition=` of the unit (or of each service in a slice), run in its new cgroup before any process of its own, adds the new one. Who writes
 * the sets holds a lock while he looks which cgroups there are: so no number is lost between a look and a load.
 */
const LOCK = "/run/vmmesh-scope.lock";
const SYSTEM_UNITS = "/etc/systemd/system";
const DROP_IN = "50-vmmesh.conf";

/**
 * Shell for the generation's directory:
 * `load` feeds nft its standard input and the elements in one transaction; `refresh` sets the elements right, cgroups that
 * are gone left out; `start UNIT` adds that unit's. Without tables (somebody flushed them) `start` has nothing to add to:
 * repair brings them back with the elements in them. undefined: the plan names no unit.
 *
 * Exit status of `start`: not 0 if a unit that alone is captured cannot be added.
 */
export function renderScope(plan: CapturePlan): string | undefined {
  const units = plan.units ?? [];
  if (units.length === 0) return undefined;
  const tables = [
    ...plan.families.map(({ family }) => guardTable(family)),
    ...(plan.fence.some(({ when }) => when.some(({ is }) => is === "unit")) ? [FENCE_TABLE] : []),
  ];
  const sets = [...new Set(units.map((unit) => unitSet(unit.list, levelOf(unit))))];
  const elements = (unit: UnitCgroup & { list: UnitList }, index: number): string[] => [
    `unit_${index}() {`,
    `  [ -d '/sys/fs/cgroup/${unit.path}' ] || return 0`,
    ...tables.map(
      (table) => `  echo 'add element ${table} ${unitSet(unit.list, levelOf(unit))} { "${unit.path}" }'`,
    ),
    "}",
  ];
  const flush = tables.flatMap((table) => sets.map((set) => `  echo 'flush set ${table} ${set}'`));
  return [
    "#!/bin/sh",
    "# vmmesh: keeps the cgroups of chosen units in the sets of guard and fence. Needs no Node.",
    `exec 9>${LOCK}`,
    "flock 9",
    ...units.flatMap(elements),
    `elements() { ${units.map((_, index) => `unit_${index};`).join(" ")} }`,
    "flush() {",
    ...flush,
    "}",
    "# A cgroup that went between our look and nft's makes nft refuse the whole text.",
    "load() {",
    "  for try in 1 2 3; do",
    '    { printf "%s\\n" "$1"; elements; } | nft -f - && return 0',
    "  done",
    "  return 1",
    "}",
    `there() { ${tables.map((table) => `nft -t list table ${table} >/dev/null 2>&1`).join(" && ")}; }`,
    'case "$1:$2" in',
    'load:) load "$(cat)" ;;',
    'refresh:) load "$(flush)" ;;',
    ...[...new Set(units.flatMap(starters))].map((service) => {
      const started = units.flatMap((unit, index) =>
        starters(unit).includes(service) ? [{ unit, index }] : [],
      );
      const must = started.some(({ unit }) => unit.list === "only");
      const add = `{ ${started.map(({ index }) => `unit_${index};`).join(" ")} } | nft -f -`;
      return `start:${service}) ! there || ${add}${must ? "" : " || echo 'vmmesh: captured until the next repair' >&2"} ;;`;
    }),
    "esac",
    "",
  ].join("\n");
}

/** Whose start makes the unit's cgroup: its own, or that of any service in a slice. */
const starters = ({ unit, services }: UnitCgroup): readonly string[] => services ?? [unit];

/**
 * Has systemd tell the sets of each restart of these units. Those of other units stay: a trial may be taken back.
 *
 * @throws {VmmeshError} RULES_REJECTED if systemd does not read its units again
 */
export async function addDropIns(
  host: Pick<Host, "files" | "run">,
  plan: CapturePlan,
  rulesDir: string,
): Promise<void> {
  const text = [
    "# Written by vmmesh for --include-outbound-unit and --exclude-outbound-unit; `vmmesh leave` takes it away.",
    "[Service]",
    `ExecCondition=+/bin/sh -c 'cd ${rulesDir} || exit 0; for at in trial confirmed; do [ ! -e $$at/scope.sh ] || sh $$at/scope.sh start "%n" || exit 255; done'`,
    "",
  ].join("\n");
  let changed = false;
  for (const service of new Set((plan.units ?? []).flatMap(starters))) {
    if (await setDropIn(host.files, `${SYSTEM_UNITS}/${service}.d/${DROP_IN}`, text)) changed = true;
  }
  if (changed) await reload(host);
}

/**
 * Takes the drop-ins of all units away but of those that the plan names.
 *
 * @throws {VmmeshError} RULES_REJECTED if systemd does not read its units again
 */
export async function pruneDropIns(
  host: { readonly files: Files } & Pick<Host, "run">,
  plan: Pick<CapturePlan, "units">,
): Promise<void> {
  const kept = (plan.units ?? []).flatMap(starters).map((service) => `${service}.d`);
  let changed = false;
  for (const name of (await host.files.list(SYSTEM_UNITS)) ?? []) {
    if (!name.endsWith(".service.d") || kept.includes(name)) continue;
    if (await setDropIn(host.files, `${SYSTEM_UNITS}/${name}/${DROP_IN}`, undefined)) changed = true;
  }
  if (changed) await reload(host);
}

async function reload(host: Pick<Host, "run">): Promise<void> {
  const { code, stderr } = await host.run({ argv: ["systemctl", "daemon-reload"] });
  if (code === 0) return;
  throw new VmmeshError("RULES_REJECTED", "systemd did not read its units again", {
    cause: new Error(stderr.trim()),
    next: "Run `systemctl daemon-reload`, mend what it names, and run the same command again.",
  });
}
