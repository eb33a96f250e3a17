import { coversCidr, parseCidr } from "../core/net.ts";
import { fitsInterface } from "./plan/wish.ts";
import type { FamilyPlan } from "./plan.ts";
import { type Family, hostCidr, type Match, type Rule, type UnitList } from "./rules.ts";

/** The first segment of a TCP connection, as one of the plan's own hooks meets it. */
export interface Opening {
  readonly hook: "OUTPUT" | "PREROUTING";
  readonly family: Family;
  readonly from: string;
  readonly fromPort: number;
  readonly to: string;
  readonly toPort: number;
  readonly interface: string;
  /** undefined: the kernel's own socket (a network file system's), which no owner match fits. */
  readonly uid: number | undefined;
  /** Of the process that made it; undefined: not known, or the kernel. */
  readonly gid: number | undefined;
  /** In which lists of chosen units, at which depth, the unit stands that made it. */
  readonly units: readonly { readonly list: UnitList; readonly level: number }[];
  /** The destination is an address of this machine. */
  readonly toThisMachine: boolean;
}

export interface Decision {
  /** Where it is redirected; undefined: it goes where it was addressed. */
  readonly port: number | undefined;
  /** It goes direct while Envoy does not answer. */
  readonly open: boolean;
  /** The rules that decided, from the hook on. */
  readonly path: readonly Rule[];
}

/**
 * What the plan does with a new connection on a machine where all is well (leases are held). Pure; only our own rules: for
 * those of others there is `trace`.
 */
export function decide(plan: FamilyPlan, opening: Opening): Decision {
  // TPROXY is in mangle, which comes before nat.
  const tables = opening.hook === "OUTPUT" ? (["nat"] as const) : (["mangle", "nat"] as const);
  const ends = tables.map((table) =>
    walk(
      plan.rules.filter((rule) => rule.table === table),
      opening.hook,
      opening,
      [],
    ),
  );
  const end = ends.find((it) => it?.port !== undefined) ?? ends.at(-1);
  return { port: end?.port, open: end?.open ?? true, path: end?.path ?? [] };
}

/** @returns undefined if no rule of the chain, or of those that it jumps to, said anything */
function walk(
  rules: readonly Rule[],
  chain: string,
  opening: Opening,
  path: readonly Rule[],
): Decision | undefined {
  let returned: Decision | undefined;
  for (const rule of rules) {
    if (rule.chain !== chain) continue;
    if (!rule.when.every((match) => fits(match, opening))) continue;
    const here = [...path, rule];
    const { verdict } = rule;
    if (verdict.do === "redirect" || verdict.do === "tproxy") {
      const open = here.some(({ when }) => when.some(({ is }) => is === "leased"));
      return { port: verdict.port, open, path: here };
    }
    if (verdict.do === "return") return { port: undefined, open: true, path: here };
    if (verdict.do === "jump") {
      const decided = walk(rules, verdict.chain, opening, here);
      if (decided?.port !== undefined) return decided;
      // It came back: the next rule of this chain is asked, but why it came back may be all there is to say.
      returned = decided ?? returned;
    }
  }
  return returned;
}

function fits(match: Match, opening: Opening): boolean {
  switch (match.is) {
    case "protocol":
      return match.protocol === "tcp";
    case "from":
      return inside(opening.from, match.cidr);
    case "to":
      return inside(opening.to, match.cidr) !== (match.not === true);
    case "in":
    case "out":
      return fitsInterface(match.interface, opening.interface) !== (match.not === true);
    case "fromPorts":
      return match.ports.includes(opening.fromPort);
    case "toPorts":
      return match.ports.includes(opening.toPort);
    case "owner":
      return (opening.uid === match.uid) !== (match.not === true);
    case "toThisMachine":
      return opening.toThisMachine;
    case "family":
      return match.family === opening.family;
    case "ownerGroup":
      return opening.gid === match.gid;
    case "unit":
      return opening.units.some(({ list, level }) => list === match.list && level === match.level);
    case "opening":
    case "leased":
      return true;
    case "accepted":
    case "invalid":
    case "marked":
    case "handedOver":
    // The fence's own: it judges what the redirects have left.
    case "addressedTo":
    case "addressedToPorts":
      return false;
  }
}

function inside(address: string, cidr: string): boolean {
  const [outer, inner] = [parseCidr(cidr), parseCidr(hostCidr(address, address.includes(":") ? 6 : 4))];
  return outer !== undefined && inner !== undefined && coversCidr(outer, inner);
}
