import { VmmeshError } from "../core/errors.ts";

/**
 * How long to wait before asking the CA for the next certificate.
 *
 * Renewal falls at half of the lifetime, earlier by up to a tenth of the lifetime, so that machines that joined together
 * do not renew together.
 *
 * @param now wall clock; the certificate's dates are wall clock too
 * @param random uniform in [0, 1), injected so that tests are exact
 * @returns milliseconds from `now`, never negative: 0 means renew at once
 * @throws {VmmeshError} CERT_NOT_VALID if `notAfter` is not later than `notBefore`
 * @see Istio's SECRET_GRACE_PERIOD_RATIO, default 0.5
 */
export function renewIn(
  validity: { notBefore: Date; notAfter: Date },
  now: Date,
  random: () => number,
): number {
  const lifetime = validity.notAfter.getTime() - validity.notBefore.getTime();
  if (lifetime <= 0) throw new VmmeshError("CERT_NOT_VALID", "a certificate ends before it begins");
  const at = validity.notBefore.getTime() + lifetime * (0.5 - 0.1 * random());
  return Math.max(0, at - now.getTime());
}
