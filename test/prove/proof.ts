import type { Scale } from "../suite.ts";
/** What a proof says: one number of the promise, whether it holds, and how it was seen. */
export interface ProofRow {
  readonly proof: string;
  /** What was counted or timed, in words. */
  readonly what: string;
  readonly value: number;
  /** `ms`, `%`, `connections`, `ratio` … */
  readonly unit: string;
  /** The promise, e.g. `= 0`, `< 100`; empty where the number stands for comparison only (a peer's). */
  readonly bound: string;
  /** Always true where there is no bound. */
  readonly holds: boolean;
  /** Whose number it is. */
  readonly side: "vmmesh" | "peer";
}

/** One proof: its own file in this folder, run by `main.ts` and, at the quick scale, by a test of the vm or netns lane. */
export interface Proof {
  readonly name: string;
  readonly about: string;
  run(scale: Scale): Promise<ProofRow[]>;
}

/** @param bound e.g. `= 0`, `< 100`, `>= 95` */
export function row(
  proof: string,
  what: string,
  value: number,
  unit: string,
  bound = "",
  side: ProofRow["side"] = "vmmesh",
): ProofRow {
  return { proof, what, value, unit, bound, holds: bound === "" || holds(value, bound), side };
}

function holds(value: number, bound: string): boolean {
  const [sign, text] = bound.split(" ");
  const limit = Number(text);
  if (text === undefined || Number.isNaN(limit)) throw new Error(`"${bound}" is not a bound`);
  switch (sign) {
    case "=":
      return value === limit;
    case "<":
      return value < limit;
    case "<=":
      return value <= limit;
    case ">":
      return value > limit;
    case ">=":
      return value >= limit;
    default:
      throw new Error(`"${bound}" is not a bound`);
  }
}
