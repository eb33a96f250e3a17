import { VmmeshError } from "../core/errors.ts";
import { formatDuration, MINUTE_MS } from "../core/time.ts";

/** Audience that istiod's CA asks for (TOKEN_AUDIENCES). */
const AUDIENCE = "istio-ca";

export interface TokenFacts {
  /** undefined: the token says nothing of its end. */
  readonly expiresAt: Date | undefined;
  readonly issuedAt: Date | undefined;
  readonly audiences: readonly string[];
}

/** @throws {VmmeshError} TOKEN_UNREADABLE if the text is no JWT */
export function readToken(token: string): TokenFacts {
  const payload = token.trim().split(".")[1];
  try {
    if (payload === undefined) throw new Error("it has no three parts");
    const claims = JSON.parse(Buffer.from(payload, "base64url").toString()) as {
      exp?: unknown;
      iat?: unknown;
      aud?: unknown;
    };
    const date = (seconds: unknown): Date | undefined => {
      const found = new Date(typeof seconds === "number" ? seconds * 1000 : Number.NaN);
      // A date beyond the year 275760 can be neither compared nor printed: it says nothing.
      return Number.isNaN(found.getTime()) ? undefined : found;
    };
    const audiences = (Array.isArray(claims.aud) ? claims.aud : [claims.aud]).filter(
      (it) => typeof it === "string",
    );
    return { expiresAt: date(claims.exp), issuedAt: date(claims.iat), audiences };
  } catch (cause) {
    throw new VmmeshError("TOKEN_UNREADABLE", "the token is not a JSON Web Token", {
      cause,
      next: "Copy the file `istio-token` of the bundle again, whole, or make a new bundle.",
    });
  }
}

/** @throws {VmmeshError} TOKEN_AUDIENCE: no CA of Istio would take it; CLOCK_OFF: it was issued in our future */
export function checkToken(facts: TokenFacts, now: Date): void {
  if (!facts.audiences.includes(AUDIENCE)) {
    throw new VmmeshError(
      "TOKEN_AUDIENCE",
      `the token is for ${facts.audiences.join(", ") || "nobody"}, istiod wants ${AUDIENCE}`,
      {
        next: `Make it with \`vmmesh bundle create\`, or \`kubectl create token SA --audience ${AUDIENCE}\`.`,
      },
    );
  }
  const aheadMs = (facts.issuedAt?.getTime() ?? 0) - now.getTime();
  if (aheadMs > 2 * MINUTE_MS) throw clockOff(now, aheadMs, "the token was issued");
}

export function tokenExpired(facts: TokenFacts, now: Date): boolean {
  return facts.expiresAt !== undefined && facts.expiresAt.getTime() <= now.getTime();
}

export function expiredError(facts: TokenFacts, now: Date, cause?: unknown): VmmeshError {
  const ago = formatDuration(now.getTime() - (facts.expiresAt?.getTime() ?? 0));
  return new VmmeshError(
    "TOKEN_EXPIRED",
    `the token expired ${ago} ago (${facts.expiresAt?.toISOString()})`,
    {
      cause,
      next: "Make a new bundle (`vmmesh bundle create`) and join with it, or join with a kubeconfig.",
    },
  );
}

/** @param aheadMs how far the other side's clock is ahead of ours; negative: behind */
export function clockOff(now: Date, aheadMs: number, who: string): VmmeshError {
  const direction = aheadMs > 0 ? "behind" : "ahead of";
  return new VmmeshError(
    "CLOCK_OFF",
    `this machine's clock (${now.toISOString()}) is ${formatDuration(Math.abs(aheadMs))} ${direction} the mesh's: ${who} at ${new Date(now.getTime() + aheadMs).toISOString()}`,
    {
      next: "Set the clock (`timedatectl set-ntp true`), then run the same command again.",
    },
  );
}
