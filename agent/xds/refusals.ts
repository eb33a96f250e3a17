/** One that stands: Envoy goes on with what it had of it, or without. */
export interface Refusal {
  readonly typeUrl: string;
  /** In Envoy's words. */
  readonly reason: string;
}

/**
 * What one Envoy has refused and not accepted since. An ACK is of one response: what an earlier one brought and Envoy
 * refused is not in force for it. Which of a response's resources it is, only the words say: Envoy puts the name before
 * the reason (`Error adding/updating cluster(s) NAME: …`, seen of 1.36 and 1.40, delta and state of the world; the other
 * types were not looked at); where the words have none of the names, the next ACK of the type ends it.
 */
export class Refusals {
  /** Type → name → reason. The empty name: it is not known which. */
  readonly #types = new Map<string, Map<string, string>>();

  /**
   * @param names of the resources that the response brought or took away
   * @param whole whether the response was all there is of the type: what is not in it is no more
   * @param reason undefined: accepted
   */
  answered(typeUrl: string, names: Iterable<string>, whole: boolean, reason: string | undefined): void {
    const standing = whole ? new Map<string, string>() : new Map(this.#types.get(typeUrl));
    standing.delete("");
    const meant: string[] = [];
    for (const name of names) {
      standing.delete(name);
      if (reason !== undefined && mentions(reason, name)) meant.push(name);
    }
    if (reason !== undefined)
      for (const name of meant.length === 0 ? [""] : meant) standing.set(name, reason);
    if (standing.size === 0) this.#types.delete(typeUrl);
    else this.#types.set(typeUrl, standing);
  }

  /** Envoy does not want these any more. @param rest whether it wants others of the type */
  unwanted(typeUrl: string, names: Iterable<string>, rest: boolean): void {
    const standing = this.#types.get(typeUrl);
    for (const name of names) standing?.delete(name);
    if (!rest || standing?.size === 0) this.#types.delete(typeUrl);
  }

  /** Each reason once. */
  list(): Refusal[] {
    return [...this.#types].flatMap(([typeUrl, standing]) =>
      [...new Set(standing.values())].map((reason) => ({ typeUrl, reason })),
    );
  }
}

/** Part of a name on either side would make it another one: `0.0.0.0_80` is not in `0.0.0.0_8080`. */
const OF_A_NAME = /[\w.|*-]/;

function mentions(text: string, name: string): boolean {
  if (name === "") return false;
  for (let at = text.indexOf(name); at !== -1; at = text.indexOf(name, at + 1)) {
    const [before, after] = [text[at - 1] ?? "", text[at + name.length] ?? ""];
    // A full stop may end the sentence.
    if (!OF_A_NAME.test(before) && (!OF_A_NAME.test(after) || after === ".")) return true;
  }
  return false;
}
