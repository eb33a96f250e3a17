import { formatDuration, MINUTE_MS } from "../core/time.ts";
import type { Conditions } from "../health/conditions.ts";
import type { Clock } from "../platform/host.ts";
import { BACKDATED_MS } from "./renew.ts";

/** CAs date certificates back by different spans (istiod two minutes, others not at all): less than this says nothing. */
export const CLOCK_TOLERANCE_MS = 10 * MINUTE_MS;
const CONDITION = "clock-wrong";

/**
 * Compares this machine's clock with the mesh's: the CA dates what it signs by its own. From that moment on the monotonic
 * clock tells the mesh's time, but it stands still in suspend: where it finds the clock behind, it is; where it finds it
 * ahead, the machine may have slept, and only the CA can tell.
 */
export class ClockCheck {
  readonly #clock: Pick<Clock, "now" | "monotonicMs">;
  readonly #conditions: Conditions;
  /** The mesh's time less our monotonic one, when the CA signed last. */
  #meshMs: number | undefined;
  /** By how much the condition says that the clock is ahead. */
  #saidMs: number | undefined;

  constructor(clock: Pick<Clock, "now" | "monotonicMs">, conditions: Conditions) {
    this.#clock = clock;
    this.#conditions = conditions;
  }

  /** The CA has this moment signed a certificate that begins then. */
  signed(notBefore: Date): void {
    this.#meshMs = notBefore.getTime() + BACKDATED_MS - this.#clock.monotonicMs();
    this.#judge(this.#aheadMs(this.#meshMs));
  }

  /**
   * Looks at the clock by what is known.
   * @param notBefore of the certificate that is held; if the clock is before that, it is behind
   * @returns whether the clock seems to have gone ahead: the CA is to be asked
   */
  look(notBefore: Date | undefined): boolean {
    if (this.#meshMs === undefined) {
      const sinceMs = this.#clock.now().getTime() - (notBefore?.getTime() ?? 0) - BACKDATED_MS;
      this.#judge(Math.min(0, sinceMs));
      return false;
    }
    const aheadMs = this.#aheadMs(this.#meshMs);
    const isNew = aheadMs > CLOCK_TOLERANCE_MS && this.#saidMs === undefined;
    if (!isNew) this.#judge(aheadMs);
    return isNew;
  }

  #aheadMs(meshMs: number): number {
    return this.#clock.now().getTime() - this.#clock.monotonicMs() - meshMs;
  }

  #judge(aheadMs: number): void {
    if (Math.abs(aheadMs) <= CLOCK_TOLERANCE_MS) {
      this.#saidMs = undefined;
      this.#conditions.clear(CONDITION);
      return;
    }
    if (this.#saidMs !== undefined && Math.abs(aheadMs - this.#saidMs) <= CLOCK_TOLERANCE_MS) return;
    this.#saidMs = aheadMs;
    const [where, what] = aheadMs > 0 ? ["ahead of", "have ended"] : ["behind", "are not valid yet"];
    this.#conditions.raise(
      CONDITION,
      "error",
      `this machine's clock is ${formatDuration(Math.abs(aheadMs))} ${where} the mesh's: to it, certificates that are valid ${what}`,
      "Set it: `timedatectl set-ntp true`, and look at `timedatectl timesync-status` or `chronyc tracking`; this ends by itself when it is right.",
    );
  }
}
