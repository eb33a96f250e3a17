import { sleep } from "../lab/lab.ts";
import type { Row } from "./fault.ts";
import { type Seen, type Stage, type Target, together } from "./stage.ts";

/** What physics costs, and why. */
export interface Allowance {
  readonly allowed: number;
  readonly because: string;
}

export const NOTHING: Allowance = { allowed: 0, because: "" };

/**
 * istiod withdraws a machine that it does not hear from (after 10 s without its stream, or 20 s of silence and those 10). When
 * that is back, so long at most until the others have been told.
 */
export const LISTED_AGAIN_MS = 3_000;

/** What is asked of a machine when it is well again and nobody asks it any more: how it ended, and what it has not kept. */
export type After = (target: Target) => Promise<Pick<Row, "unmet"> & { readonly end?: string }>;

/** Of a fault of credentials: enough to see a certificate that is bad for a moment. */
export const HANDSHAKE_RATE = 20;

/** Requests go on for so long before a fault: a loss counts against it only if all was well before. */
const BEFORE_MS = 1_000;

/**
 * A fault under load: the clients start, the fault is made and ended, all gets well again, the clients stop.
 * @param faulty makes the fault, ends it, and says what shows that it has happened; throws if it has not
 */
export async function underLoad(
  stage: Stage,
  fault: string,
  targets: readonly Target[],
  faulty: () => Promise<string>,
  {
    rate = 200,
    handshakeRate,
    allowance = () => NOTHING,
    wellWithinMs = 60_000,
    well = (target) => stage.well(target, wellWithinMs),
    after = async () => ({}),
  }: {
    rate?: number;
    /** So many requests a second beside them, each by a TLS connection of its own; left out: none. */
    handshakeRate?: number;
    allowance?: (target: Target, seen: Seen) => Allowance;
    wellWithinMs?: number;
    /** Resolves when all is well again; rejects if it never is. */
    well?: (target: Target) => Promise<void>;
    after?: After;
  } = {},
): Promise<Row[]> {
  const loads = targets.map((target) => {
    const handshakes = handshakeRate === undefined ? [] : [stage.handshakes(target, handshakeRate)];
    return { target, handshakes, load: together([stage.load(target, rate), ...handshakes]) };
  });
  try {
    await sleep(BEFORE_MS);
    const begun = Date.now();
    const happened = await faulty();
    const ended = Date.now();
    return await Promise.all(
      loads.map(async ({ target, handshakes, load }): Promise<Row> => {
        const isWell = await well(target).then(
          () => true,
          () => false,
        );
        const wellAt = Date.now();
        const seen = await load.stop();
        if (seen.firstFailedAt !== undefined && seen.firstFailedAt < begun)
          throw new Error(`${target.url} lost requests before ${fault}: ${words(seen)}`);
        const { allowed, because } = allowance(target, seen);
        const { end, unmet } = await after(target);
        const made = await Promise.all(handshakes.map((each) => each.stop()));
        const losses = [
          seen.lost === 0 ? "no request was lost" : words(seen),
          ...made.map(
            ({ requests, lost }) => `${lost} of the ${requests} TLS connections of their own failed`,
          ),
        ].join("; ");
        return {
          fault,
          side: target.side,
          requests: seen.requests,
          lost: seen.lost,
          allowed: target.side === "peer" ? undefined : allowed,
          because,
          recoverMs: isWell ? recovery(seen, ended, wellAt) : undefined,
          end: end === undefined ? losses : `${losses}; ${end}`,
          happened,
          ...(unmet === undefined || target.side === "peer" ? {} : { unmet }),
        };
      }),
    );
  } finally {
    for (const { load } of loads) await load.stop().catch(() => undefined);
  }
}

/** Until the last request was lost; where none was, until the agent has said that it is well. */
function recovery(seen: Seen, ended: number, wellAt: number): number {
  if (seen.lastLoss === undefined) return wellAt - ended;
  return Math.max(0, (seen.answeredAfter(seen.lastLoss) ?? wellAt) - ended);
}

const words = ({ reasons }: Seen): string =>
  Object.entries(reasons)
    .sort(([, a], [, b]) => b - a)
    .slice(0, 3)
    .map(([reason, times]) => `${times} × ${reason}`)
    .join(", ");
