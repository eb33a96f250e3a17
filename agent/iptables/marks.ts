import type { ParsedRule } from "./parse.ts";

/** Bits of a packet's mark, as an unsigned number of 32 bits. */
export type Bits = number;

export const NO_BITS: Bits = 0;
const ALL: Bits = 0xffff_ffff;
const SETS_MARK: ReadonlySet<string> = new Set(["CONNMARK", "CONNSECMARK", "SET"]);

/**
 * Bits that are certainly 0 in a packet that has been through this rule, of which `clear` were so before it. Pure.
 *
 * MARK as iptables prints it: `--set-xmark VALUE/MASK` clears MASK and then flips VALUE.
 */
export function clearAfter(rule: ParsedRule, clear: Bits): Bits {
  if (rule.target === "MARK") {
    const set = bitsOf(rule, "--set-xmark");
    const after = set === undefined ? NO_BITS : ((clear | set.mask) & ~set.value) >>> 0;
    return isCertain(rule) ? after : and(clear, after);
  }
  // From the connection, or from a set.
  return rule.target !== undefined && SETS_MARK.has(rule.target) ? NO_BITS : clear;
}

export const and = (one: Bits, other: Bits): Bits => (one & other) >>> 0;

/** The rule asks for a bit that is certainly 0: no packet fits it. */
export function asksForClear(rule: ParsedRule, clear: Bits): boolean {
  const at = rule.words.indexOf("--mark");
  if (at < 0 || rule.words[at - 1] === "!" || rule.words[at - 1] === "connmark") return false;
  return and(bitsOf(rule, "--mark")?.value ?? NO_BITS, clear) !== NO_BITS;
}

/** Every packet of the chain fits it: it matches nothing, a comment aside. */
export function isCertain(rule: ParsedRule): boolean {
  const end = rule.words.findIndex((word) => word === "-j" || word === "-g");
  const matches = rule.words.slice(2, end < 0 ? undefined : end);
  return (
    matches.length === 0 || (matches.length === 4 && matches[1] === "comment" && matches[2] === "--comment")
  );
}

/** `VALUE/MASK`, each with 0x; the mask of all bits is left out. undefined: it cannot be read. */
function bitsOf(rule: ParsedRule, option: string): { value: Bits; mask: Bits } | undefined {
  const [, value, mask] =
    /^(0x[0-9a-f]+)(?:\/(0x[0-9a-f]+))?$/.exec(rule.words[rule.words.indexOf(option) + 1] ?? "") ?? [];
  return value === undefined
    ? undefined
    : { value: Number(value), mask: mask === undefined ? ALL : Number(mask) };
}
