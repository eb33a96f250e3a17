import { VmmeshError } from "../../core/errors.ts";
import type { CapturePlan } from "../plan.ts";
import { sameNetwork } from "../policy.ts";
import type { Match } from "../rules.ts";
import type { CaptureWish, Senders, UnitCgroup } from "./wish.ts";

/**
 * One match for each kind of sender. A rule for each: iptables cannot say "one of these users" in one.
 *
 * @param which `only`: empty stands for everybody
 */
export function senderMatches({ senders }: Pick<CaptureWish, "senders">, which: "only" | "never"): Match[] {
  if (senders === undefined) return [];
  const { uids, gids, units = [] } = senders[which];
  return [
    ...[...new Set(uids)].map((uid): Match => ({ is: "owner", uid })),
    ...[...new Set(gids)].map((gid): Match => ({ is: "ownerGroup", gid })),
    ...[...new Set(units.map(levelOf))].map((level): Match => ({ is: "unit", list: which, level })),
  ];
}

/**
 * @throws {VmmeshError} USAGE for what is both included and excluded
 */
export function checkScope(wish: Pick<CaptureWish, "outbound" | "senders">): void {
  const { cidrs, excludeCidrs, includePorts = [], excludePorts } = wish.outbound;
  const { only = NOBODY, never = NOBODY } = wish.senders ?? {};
  const pairs: [string, readonly (string | number)[], readonly (string | number)[]][] = [
    ["outbound network", cidrs, excludeCidrs],
    ["outbound port", includePorts, excludePorts],
    ["uid", only.uids, never.uids],
    ["gid", only.gids, never.gids],
    ["unit", unitNames(only), unitNames(never)],
  ];
  for (const [what, included, excluded] of pairs) {
    const both = included.find((item) =>
      excluded.some((other) => item === other || sameNetwork(String(item), String(other))),
    );
    if (both !== undefined)
      throw new VmmeshError("USAGE", `${what} ${both} is both included and excluded`, {
        next: "Leave one of the two out of the join options or sidecar.env, then run the command again.",
      });
  }
}

const unitNames = ({ units = [] }: Senders): string[] => units.map(({ unit }) => unit);

/** How deep below the root of the cgroups a unit is. */
export function levelOf({ path }: Pick<UnitCgroup, "path">): number {
  return path.split("/").length;
}

/** Every unit that is chosen; undefined: none is. */
export function chosenUnits({ senders }: Pick<CaptureWish, "senders">): CapturePlan["units"] {
  const units = (["only", "never"] as const).flatMap((list) =>
    (senders?.[list].units ?? []).map((unit) => ({ ...unit, list })),
  );
  return units.length === 0 ? undefined : units;
}

const NOBODY: Senders = { uids: [], gids: [] };
