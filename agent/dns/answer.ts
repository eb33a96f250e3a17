import { type DnsTable, lookUp } from "./table.ts";

/** The agent asks itself for this name once a second: the reply is the kernel's proof that DNS is served. `.invalid` is nobody's (RFC 6761). */
export const LEASE_NAME = "lease.vmmesh.invalid.";

/** Record types that we know by heart (RFC 1035, RFC 3596). */
export const TYPE = { A: 1, CNAME: 5, SOA: 6, AAAA: 28, OPT: 41 } as const;
const CLASS_IN = 1;

export interface Question {
  /** Lower case, trailing dot. */
  readonly name: string;
  readonly type: number;
  readonly class: number;
}

/** NOERROR with these records; no addresses means that the name exists but not in this family. */
export interface Answer {
  /** The question's name is an alias of this one. */
  readonly alias?: string;
  readonly addresses: readonly string[];
}

/**
 * What the mesh says to a question; `forward` if it is for the machine's own resolvers.
 *
 * Types other than A and AAAA are forwarded also for names of the mesh, as Istio does. Without a table everything is
 * forwarded: the machine's DNS must not wait for the control plane (istio #43276).
 */
export function answer(
  table: DnsTable | undefined,
  question: Question,
  search: readonly string[],
): Answer | "forward" {
  if (question.name === LEASE_NAME) return { addresses: [] };
  if (table === undefined || question.class !== CLASS_IN) return "forward";
  if (question.type !== TYPE.A && question.type !== TYPE.AAAA) return "forward";
  const found = lookUp(table, question.name, search);
  if (found === undefined) return "forward";
  const addresses = question.type === TYPE.A ? found.addresses.v4 : found.addresses.v6;
  return found.alias === undefined ? { addresses } : { alias: found.alias, addresses };
}

/**
 * Whether the mesh has this name, whatever is asked of it. The machine's resolvers may say that there is no such name when
 * they are asked for its HTTPS or TXT record; a cache between would then deny its addresses, too (RFC 8020).
 */
export function isOurs(table: DnsTable | undefined, question: Question, search: readonly string[]): boolean {
  return (
    table !== undefined && question.class === CLASS_IN && lookUp(table, question.name, search) !== undefined
  );
}

/** A copy in random order, so that clients that take the first address spread over all. */
export function shuffled<T>(items: readonly T[], random: () => number): T[] {
  const copy = [...items];
  for (let last = copy.length - 1; last > 0; last -= 1) {
    const pick = Math.floor(random() * (last + 1));
    const [a, b] = [copy[last], copy[pick]];
    if (a !== undefined && b !== undefined) {
      copy[last] = b;
      copy[pick] = a;
    }
  }
  return copy;
}
