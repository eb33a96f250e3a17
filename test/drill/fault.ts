import type { Scale } from "../suite.ts";
import type { Stage } from "./stage.ts";

/** Whose machine is meant: ours, or one with the real pilot-agent. */
export type Side = "vmmesh" | "peer";

/** One line of the drill's table. */
export interface Row {
  readonly fault: string;
  readonly side: Side;
  /** Requests that the client outside the machine has sent from before the fault until all was well again. */
  readonly requests: number;
  /** How many of them were not answered with 200 by the machine. */
  readonly lost: number;
  /** What physics costs: how many may be lost. Undefined where the number stands for comparison only (the peer's). */
  readonly allowed: number | undefined;
  /** Why so many may be lost. */
  readonly because: string;
  /** From the end of the fault until requests are answered and the agent says that it is well; never: undefined. */
  readonly recoverMs: number | undefined;
  /** How it ended, in words. */
  readonly end: string;
  /** What shows that the fault has really happened. */
  readonly happened: string;
  /** A promise beside the requests that was not kept, in words: memory that grew, a wrong word on health. */
  readonly unmet?: string;
}

/** One fault: its own file in `faults/`. It leaves the stage as it found it, also when it fails. */
export interface Fault {
  readonly name: string;
  readonly about: string;
  /** A row for each side that it can be done to. */
  run(stage: Stage, scale: Scale): Promise<Row[]>;
}

/** Whether ours has kept its promise; the peer's rows hold none. */
export const holds = ({ side, requests, lost, allowed, recoverMs, unmet }: Row): boolean =>
  side === "peer" ||
  (requests > 0 && lost <= (allowed ?? 0) && recoverMs !== undefined && unmet === undefined);
