import { type Family, hostCidr, type Match, type Rule, type Table } from "../rules.ts";
import { familyOf } from "./wish.ts";

export function of(cidrs: readonly string[], family: Family): string[] {
  return unique(cidrs.filter((cidr) => familyOf(cidr) === family).map((cidr) => hostCidr(cidr, family)));
}

export function unique<T>(values: readonly T[]): T[] {
  return [...new Set(values)];
}

export const owner = (uid: number): Match => ({ is: "owner", uid });
export const to = (cidr: string): Match => ({ is: "to", cidr });
export const LO_OUT: Match = { is: "out", interface: "lo" };
export const RETURN = { do: "return" } as const;
export const jump = (chain: string) => ({ do: "jump", chain }) as const;

/** Makes rules of one table. */
export const rulesIn =
  (table: Table) =>
  (chain: string, when: readonly Match[], verdict: Rule["verdict"], why: string): Rule => ({
    table,
    chain,
    when,
    verdict,
    why,
  });

/** What makes a rule once its table and chain are settled. */
export type RuleWords = readonly [when: readonly Match[], verdict: Rule["verdict"], why: string];

/** A multiport match holds 15 ports (iptables-extensions(8)). */
export function portGroups(ports: readonly number[]): number[][] {
  const groups: number[][] = [];
  for (let at = 0; at < ports.length; at += 15) groups.push(ports.slice(at, at + 15));
  return groups;
}
