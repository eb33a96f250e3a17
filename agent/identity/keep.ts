import { backoff, uniformFrom } from "../core/backoff.ts";
import { messageOf, VmmeshError } from "../core/errors.ts";
import type { Latest } from "../core/signals.ts";
import { formatDuration, MINUTE_MS, SECOND_MS } from "../core/time.ts";
import type { Conditions } from "../health/conditions.ts";
import type { Host } from "../platform/host.ts";
import { type CaTarget, type Credential, enroll } from "./enroll.ts";
import { renewIn } from "./renew.ts";
import { isOfRoots, loadSvid, type Svid, storeSvid } from "./svid.ts";
import { readToken, tokenExpired } from "./token.ts";

export interface KeepDeps {
  readonly host: Pick<Host, "files" | "clock" | "random">;
  /** Resolved anew for each attempt: addresses may change. */
  ca(): Promise<CaTarget>;
  readonly spiffe: string;
  readonly ttlMs?: number;
  /** Folder of `storeSvid`. */
  readonly folder: string;
  /** Read anew for each attempt: an operator may put a fresh token there. */
  readonly tokenFile: string;
  readonly conditions: Conditions;
  onRenewed(svid: Svid): void;
  onStatus(status: IdentityStatus): void;
}

export interface IdentityStatus {
  readonly spiffe: string;
  readonly serial: string | undefined;
  readonly notAfter: Date | undefined;
  readonly nextRenewal: Date | undefined;
  /** What will prove who we are at the next renewal. */
  readonly nextCredential: Credential["kind"] | "none";
  readonly lastError: string | undefined;
}

/** The wall clock may jump and the machine may sleep: how long a wait goes on without looking at it. */
const LOOK_EVERY_MS = 15 * SECOND_MS;
const LEAST_PAUSE_MS = 5 * SECOND_MS;
const RETRY = { firstMs: SECOND_MS, capMs: 5 * MINUTE_MS, factor: 2, jitter: 0.3 };
const CONDITION = "identity-not-renewed";

/**
 * Which credential to use: the certificate while it lives and is of a root that the mesh still has, else the token.
 * An expired or foreign certificate is never presented: istiod would end the handshake even beside a good token.
 */
export function chooseCredential(
  svid: Svid | undefined,
  token: string | undefined,
  roots: string,
  now: Date,
): Credential | undefined {
  if (svid !== undefined && svid.notAfter > now && svid.notBefore <= now && isOfRoots(svid, roots)) {
    return { kind: "certificate", svid };
  }
  if (token === undefined) return undefined;
  return { kind: "token", token };
}

/**
 * Keeps the machine's certificate fresh until `signal` aborts. The old one stays in use until it really ends; a failed
 * renewal raises a condition that says when the next attempt is and what happens at expiry.
 */
export async function keepIdentity(deps: KeepDeps, svids: Latest<Svid>, signal: AbortSignal): Promise<void> {
  const { clock, files, random } = deps.host;
  const uniform = uniformFrom(random);
  const stored = await loadSvid(files, deps.folder);
  if (stored !== undefined && stored.notAfter > clock.now() && stored.spiffe === deps.spiffe)
    svids.set(stored);

  let waits = backoff(uniform, RETRY);
  let jitter = uniform();
  let lastError: string | undefined;
  const tell = (nextRenewal: Date | undefined, nextCredential: IdentityStatus["nextCredential"]): void => {
    const svid = svids.value;
    deps.onStatus({
      spiffe: deps.spiffe,
      serial: svid?.serial,
      notAfter: svid?.notAfter,
      nextRenewal,
      nextCredential,
      lastError,
    });
  };

  while (!signal.aborted) {
    const held = svids.value;
    const dueMs = held === undefined ? 0 : renewIn(held, clock.now(), () => jitter);
    if (dueMs > 0) {
      const at = new Date(clock.now().getTime() + dueMs);
      tell(at, "certificate");
      await clock.sleep(Math.min(dueMs, LOOK_EVERY_MS), signal).catch(() => undefined);
      continue;
    }
    try {
      const svid = await attempt(deps, held, signal);
      await storeSvid(files, deps.folder, svid);
      svids.set(svid);
      lastError = undefined;
      deps.conditions.clear(CONDITION);
      deps.onRenewed(svid);
      waits = backoff(uniform, RETRY);
      jitter = uniform();
      // Whatever dates a CA writes, it is not asked in a loop.
      await clock.sleep(LEAST_PAUSE_MS, signal).catch(() => undefined);
    } catch (thrown) {
      if (signal.aborted) return;
      const error = VmmeshError.from(thrown);
      lastError = messageOf(error);
      const waitMs = waits.next().value;
      const left = (held?.notAfter.getTime() ?? 0) - clock.now().getTime();
      const until =
        left > 0
          ? `the present certificate is good for another ${formatDuration(left)}`
          : "there is no valid certificate: mutual TLS fails";
      deps.conditions.raise(
        CONDITION,
        left > 0 ? "warning" : "error",
        `${error.message}; ${until}`,
        error.next ?? `The next attempt is in ${formatDuration(waitMs)}.`,
      );
      tell(
        new Date(clock.now().getTime() + waitMs),
        error.code === "TOKEN_UNREADABLE" ? "none" : held === undefined ? "token" : "certificate",
      );
      await clock.sleep(waitMs, signal).catch(() => undefined);
    }
  }
}

async function attempt(deps: KeepDeps, held: Svid | undefined, signal: AbortSignal): Promise<Svid> {
  const ca = await deps.ca();
  const now = deps.host.clock.now();
  const token = (await deps.host.files.readText(deps.tokenFile))?.trim();
  const credential = chooseCredential(held, token === "" ? undefined : token, ca.rootCert, now);
  if (credential === undefined) {
    throw new VmmeshError(
      "TOKEN_UNREADABLE",
      "the certificate has ended or is of another root, and there is no token to ask for a new one",
      {
        next: "Make a new bundle (`vmmesh bundle create`), then run `vmmesh leave` and `vmmesh join --bundle …`.",
      },
    );
  }
  if (credential.kind === "token" && tokenExpired(readToken(credential.token), now) && held === undefined) {
    throw new VmmeshError("TOKEN_EXPIRED", "token and certificate have both ended", {
      next: "Make a new bundle (`vmmesh bundle create`), then run `vmmesh leave` and `vmmesh join --bundle …`.",
    });
  }
  const ttl = deps.ttlMs === undefined ? {} : { ttlMs: deps.ttlMs };
  return enroll(deps.host, { ca, spiffe: deps.spiffe, credential, ...ttl }, signal);
}
