import { VmmeshError } from "../core/errors.ts";
import type { Host } from "../platform/host.ts";
import type { CapturePlan } from "./plan.ts";
import { tryRun } from "./read.ts";
import { type Family, TPROXY_MARK } from "./rules.ts";

/**
 * The way back of TPROXY: a packet with Istio's mark is for this machine, whatever its address says. Rule and route carry a
 * protocol number of ours, so that what is removed is what we made. @see ip-rule(8), ip-route(8)
 */
const PRIORITY = 133;
const PROTOCOL = 133;

const selector = (table: number): string =>
  `priority ${PRIORITY} fwmark 0x${TPROXY_MARK.value.toString(16)}/0x${TPROXY_MARK.mask.toString(16)} lookup ${table} protocol ${PROTOCOL}`;
const route = (table: number): string => `local default dev lo table ${table} proto ${PROTOCOL}`;

/**
 * A shell script that lays what is missing and says each thing that it lays; with `check` it only says. Needs no Node, for the
 * undo script puts the former generation back with it.
 */
export function renderRouting(plan: Pick<CapturePlan, "families" | "routeTable">): string | undefined {
  const { routeTable: table } = plan;
  if (table === undefined) return undefined;
  return [
    "#!/bin/sh",
    "# vmmesh: what the application answers to a client's address comes back to Envoy (TPROXY).",
    'lay() { echo "$1"; shift; [ "$mode" = check ] || "$@"; }',
    "mode=$1",
    ...plan.families.flatMap(({ family }) => [
      `ip -N -${family} rule show | grep -q '^${PRIORITY}:.* lookup ${table} proto ${PROTOCOL} *$' ||`,
      `  lay "the IPv${family} rule for Istio's mark was missing" ip -${family} rule add ${selector(table)} || exit 1`,
      `ip -${family} route show table ${table} 2>/dev/null | grep -q '^local default dev lo ' ||`,
      `  lay "the IPv${family} route in table ${table} was missing" ip -${family} route add ${route(table)} || exit 1`,
    ]),
    "exit 0",
    "",
  ].join("\n");
}

/** Lines of the undo script. What others have put into the table stays. */
export function undoRouting(plan: Pick<CapturePlan, "families" | "routeTable">): string[] {
  const { routeTable: table } = plan;
  if (table === undefined) return [];
  return plan.families.flatMap(({ family }) => [
    `while ip -${family} rule del ${selector(table)} 2>/dev/null; do :; done`,
    `ip -${family} route del ${route(table)} 2>/dev/null || true`,
  ]);
}

/** What of it is not there now, one sentence each. Changes nothing. */
export async function missingRouting(
  host: Pick<Host, "run">,
  plan: Pick<CapturePlan, "families" | "routeTable">,
): Promise<string[]> {
  const script = renderRouting(plan);
  if (script === undefined) return [];
  const { stdout } = await host.run({ argv: ["sh", "-s", "check"], input: script });
  return stdout.split("\n").filter((line) => line !== "");
}

/** What is there of ours after it was taken out, as ip would list it: what somebody has made unlike our own since. */
export async function leftRouting(
  host: Pick<Host, "run">,
  { families, routeTable: table }: Pick<CapturePlan, "families" | "routeTable">,
): Promise<string[]> {
  if (table === undefined) return [];
  const isOurs = ({ protocol }: { readonly protocol?: string }): boolean => protocol === String(PROTOCOL);
  const left = await Promise.all(
    families.map(async ({ family }) => {
      const { rules, routes } = await readRouting(host, family, table);
      return [
        ...rules
          .filter((rule) => isOurs(rule) && rule.priority === PRIORITY && rule.table === String(table))
          .map(
            ({ priority, fwmark }) =>
              `ip -${family} rule: priority ${priority} fwmark ${fwmark ?? "none"} lookup ${table}`,
          ),
        ...routes
          .filter(isOurs)
          .map(({ dst, dev }) => `ip -${family} route: ${dst} dev ${dev} table ${table}`),
      ];
    }),
  );
  return left.flat();
}

/** What `ip -j -N rule` (tables as numbers) and `ip -j route` print of an entry; what we do not ask for is left out. */
interface RuleEntry {
  readonly priority: number;
  readonly protocol?: string;
  readonly fwmark?: string;
  readonly fwmask?: string;
  readonly table: string;
  readonly not?: null;
}
interface RouteEntry {
  readonly protocol?: string;
  readonly type?: string;
  readonly dst: string;
  readonly dev?: string;
}

/**
 * Another owner of Istio's mark or of the routing table: with both in force, packets of one would go the other's way.
 *
 * @throws {VmmeshError} RULES_REJECTED naming the entry; nothing has been changed then
 */
export async function refuseSharedRouting(
  host: Pick<Host, "run">,
  plan: Pick<CapturePlan, "families" | "routeTable">,
): Promise<void> {
  const { routeTable: table } = plan;
  if (table === undefined) return;
  for (const { family } of plan.families) {
    const { rules, routes } = await readRouting(host, family, table);
    const use = foreignUse(rules, routes, table);
    if (use === undefined) continue;
    throw new VmmeshError("RULES_REJECTED", `TPROXY cannot share with another owner: ${use} (IPv${family})`, {
      next: use.includes("mark")
        ? "Istio's mark is fixed: give the other program another mark, or capture by REDIRECT."
        : "Choose a free table with ISTIO_INBOUND_TPROXY_ROUTE_TABLE in sidecar.env, then run the command again.",
    });
  }
}

/** One sentence, or undefined if mark and table are free or used as Istio's own tools use them. Pure. */
export function foreignUse(
  rules: readonly RuleEntry[],
  routes: readonly RouteEntry[],
  table: number,
): string | undefined {
  const taken = routes.find(({ type, dst, dev }) => !(type === "local" && dst === "default" && dev === "lo"));
  if (taken !== undefined) return `routing table ${table} has a route to ${taken.dst}`;
  for (const rule of rules) {
    const mark = Number(rule.fwmark ?? 0);
    const mask = Number(rule.fwmask ?? 0xffff_ffff);
    const shown = `priority ${rule.priority}, mark ${rule.fwmark ?? "none"}, table ${rule.table}`;
    const seesOurs =
      rule.fwmark !== undefined &&
      rule.not === undefined &&
      (mask & TPROXY_MARK.mask) !== 0 &&
      ((mark ^ TPROXY_MARK.value) & mask & TPROXY_MARK.mask) === 0;
    if (seesOurs && rule.table !== String(table))
      return `a routing rule takes Istio's mark elsewhere (${shown})`;
    if (!seesOurs && rule.table === String(table))
      return `another rule uses routing table ${table} (${shown})`;
  }
  return undefined;
}

/** Every rule of a family, and the routes of one table. */
async function readRouting(
  host: Pick<Host, "run">,
  family: Family,
  table: number,
): Promise<{ rules: RuleEntry[]; routes: RouteEntry[] }> {
  const [rules, routes] = await Promise.all([
    list<RuleEntry>(host, family, ["-N", "rule"]),
    list<RouteEntry>(host, family, ["route", "show", "table", String(table)]),
  ]);
  return { rules, routes };
}

/** Empty if there is no such table. */
async function list<T>(host: Pick<Host, "run">, family: Family, args: readonly string[]): Promise<T[]> {
  const result = await tryRun(host, { argv: ["ip", "-j", `-${family}`, ...args] });
  if (result?.code !== 0 || result.stdout.trim() === "") return [];
  // Printed by iproute2.
  return JSON.parse(result.stdout) as T[];
}
