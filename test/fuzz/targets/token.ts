import { VmmeshError } from "../../../agent/core/errors.ts";
import { checkToken, expiredError, readToken, tokenExpired } from "../../../agent/identity/token.ts";
import { type Target, unlessRefused } from "../target.ts";

const NOW = new Date("2026-11-23T00:00:00Z");
const refusedAs =
  (...codes: readonly string[]) =>
  (thrown: unknown): boolean =>
    thrown instanceof VmmeshError && codes.includes(thrown.code);

export const target: Target = {
  about: "the claims of a token are refused by name, or tell its audiences and a date that can be printed",
  covers: /\/agent\/identity\//,
  seeds: [
    '{"aud":["istio-ca"],"exp":1795305600,"iat":1763700000}',
    '{"aud":"x","exp":1e15}',
    '{"aud":null,"exp":"1"}',
    "null",
  ],
  words: ['"aud":', '"exp":', '"iat":', "istio-ca", "1e400", "-1", "[]", "{}"],
  run(bytes) {
    // The bytes as claims, and as the token itself.
    for (const token of [
      `e30.${Buffer.from(bytes).toString("base64url")}.c2ln`,
      Buffer.from(bytes).toString(),
    ]) {
      const facts = unlessRefused(() => readToken(token), refusedAs("TOKEN_UNREADABLE"));
      if (facts === undefined) continue;
      unlessRefused(() => checkToken(facts, NOW), refusedAs("TOKEN_AUDIENCE", "CLOCK_OFF"));
      if (facts.expiresAt === undefined && tokenExpired(facts, NOW))
        throw new Error("expired without an end");
      if (facts.expiresAt !== undefined) expiredError(facts, NOW);
    }
  },
};
