import { VmmeshError } from "../core/errors.ts";
import { MINUTE_MS } from "../core/time.ts";

/** istiod dates certificates back by this, for peers whose clocks are behind: the CA's own clock is notBefore plus this. */
export const BACKDATED_MS = 2 * MINUTE_MS;

/**
 * How long to wait before asking the CA for the next certificate.
 *
 * Renewal falls at half of the lifetime, earlier by up to a tenth of the lifetime, so that machines that joined together
 * do not renew together. The lifetime begins when the CA signed, not at the backdated `notBefore`: a certificate of one
 * minute would otherwise be past its half when it is issued.
 *
 * @param now wall clock; the certificate's dates are wall clock too
 * @param random uniform in [0, 1), injected so that tests are exact
 * @returns milliseconds from `now`, never negative: 0 means renew at once
 * @throws {VmmeshError} CERT_NOT_VALID if `notAfter` is not later than `notBefore`
 * @see Istio's SECRET_GRACE_PERIOD_RATIO, default 0.5; ch. 3.5 of its VM protocol for the two minutes
 */
export function renewIn(
  validity: { notBefore: Date; notAfter: Date },
  now: Date,
  random: () => number,
): number {
  const whole = validity.notAfter.getTime() - validity.notBefore.getTime();
  if (whole <= 0) throw new VmmeshError("CERT_NOT_VALID", "a certificate ends before it begins");
  // A certificate shorter than the backdating comes from a CA that does not do it.
  const lifetime = whole > BACKDATED_MS ? whole - BACKDATED_MS : whole;
  const at = validity.notAfter.getTime() - lifetime * (0.5 + 0.1 * random());
  return Math.max(0, at - now.getTime());
}

/** A certificate, and what both clocks said when it came. */
export interface Accepted {
  readonly notBefore: Date;
  readonly notAfter: Date;
  readonly acceptedAt: Date;
  readonly acceptedMs: number;
}

/**
 * `renewIn` for a wall clock that may have been set since: the monotonic one, which stands still only in suspend, keeps a
 * clock that was put back from stretching the certificate's life. One that is not valid yet is due at once.
 *
 * @param monotonicMs of now
 */
export function untilRenewal(
  accepted: Accepted,
  now: Date,
  monotonicMs: number,
  random: () => number,
): number {
  if (accepted.notBefore > now) return 0;
  const passedMs = monotonicMs - accepted.acceptedMs;
  const byMonotonic = renewIn(accepted, accepted.acceptedAt, random) - passedMs;
  return Math.max(0, Math.min(renewIn(accepted, now, random), byMonotonic));
}
