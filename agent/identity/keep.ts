import { backoff, uniformFrom } from "../core/backoff.ts";
import { messageOf, VmmeshError } from "../core/errors.ts";
import type { Latest } from "../core/signals.ts";
import { formatDuration, MINUTE_MS, SECOND_MS } from "../core/time.ts";
import type { Conditions } from "../health/conditions.ts";
import type { Host } from "../platform/host.ts";
import { type CredentialKind, type CredentialSources, enrollByAny, nextCredential } from "./credentials.ts";
import type { CaTarget } from "./enroll.ts";
import { renewIn } from "./renew.ts";
import { loadSvid, type Svid, storeSvid } from "./svid.ts";

export interface KeepDeps extends CredentialSources {
  readonly host: Pick<Host, "files" | "clock" | "random" | "run">;
  /** Resolved anew for each attempt: addresses may change. */
  ca(): Promise<CaTarget>;
  readonly spiffe: string;
  readonly ttlMs?: number;
  /** Folder of `storeSvid`. */
  readonly folder: string;
  readonly conditions: Conditions;
  onRenewed(svid: Svid, by: CredentialKind): void;
  onFailed(): void;
  onStatus(status: IdentityStatus): void;
}

export interface IdentityStatus {
  readonly spiffe: string;
  readonly serial: string | undefined;
  readonly notAfter: Date | undefined;
  readonly nextRenewal: Date | undefined;
  /** What will prove who we are at the next renewal. */
  readonly nextCredential: CredentialKind | "none";
  readonly lastError: string | undefined;
}

/** The wall clock may jump and the machine may sleep: how long a wait goes on without looking at it. */
const LOOK_EVERY_MS = 15 * SECOND_MS;
const LEAST_PAUSE_MS = 5 * SECOND_MS;
const RETRY = { firstMs: SECOND_MS, capMs: 5 * MINUTE_MS, factor: 2, jitter: 0.3 };
const CONDITION = "identity-not-renewed";
const TOKENS_ONLY = "identity-by-token-only";
/** A certificate that came by a token is tried this soon: while the token still lives it is known whether it is needed again. */
const PROVE_WITHIN_MS = MINUTE_MS;

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
  let roots: string | undefined;
  let lastError: string | undefined;
  let certificateRefused = false;
  /** Before this moment of the monotonic clock it is tried whether the certificate is good for the next one. */
  let proveAt: number | undefined = clock.monotonicMs() + PROVE_WITHIN_MS * uniform();
  const tell = async (nextRenewal: Date): Promise<void> => {
    const svid = svids.value;
    deps.onStatus({
      spiffe: deps.spiffe,
      serial: svid?.serial,
      notAfter: svid?.notAfter,
      nextRenewal,
      nextCredential: await nextCredential(deps, svid, roots, certificateRefused),
      lastError,
    });
  };

  while (!signal.aborted) {
    const held = svids.value;
    const now = clock.now();
    const dueMs = held === undefined ? 0 : untilDue(held, now, jitter, proveAt, clock.monotonicMs());
    if (dueMs > 0) {
      await tell(new Date(now.getTime() + dueMs));
      await clock.sleep(Math.min(dueMs, LOOK_EVERY_MS), signal).catch(() => undefined);
      continue;
    }
    try {
      const ca = await deps.ca();
      roots = ca.rootCert;
      const ttl = deps.ttlMs === undefined ? {} : { ttlMs: deps.ttlMs };
      const { svid, by, ...judged } = await enrollByAny(
        deps,
        { ca, spiffe: deps.spiffe, ...ttl },
        held,
        signal,
      );
      await storeSvid(files, deps.folder, svid);
      svids.set(svid);
      lastError = undefined;
      deps.conditions.clear(CONDITION);
      waits = backoff(uniform, RETRY);
      jitter = uniform();
      certificateRefused = judged.certificateRefused !== undefined;
      proveAt =
        by === "certificate" || certificateRefused
          ? undefined
          : clock.monotonicMs() + PROVE_WITHIN_MS * uniform();
      if (judged.certificateRefused !== undefined) raiseTokensOnly(deps, judged.certificateRefused);
      else if (by === "certificate") deps.conditions.clear(TOKENS_ONLY);
      deps.onRenewed(svid, by);
      // Whatever dates a CA writes, it is not asked in a loop.
      await clock.sleep(LEAST_PAUSE_MS, signal).catch(() => undefined);
    } catch (thrown) {
      if (signal.aborted) return;
      const error = VmmeshError.from(thrown);
      lastError = messageOf(error);
      const waitMs = waits.next().value;
      raiseNotRenewed(deps, held, error, waitMs);
      deps.onFailed();
      await tell(new Date(clock.now().getTime() + waitMs));
      await clock.sleep(waitMs, signal).catch(() => undefined);
    }
  }
}

/** Milliseconds to the next attempt: at its time in the certificate's life, or sooner while the certificate is unproven. */
function untilDue(
  held: Svid,
  now: Date,
  jitter: number,
  proveAt: number | undefined,
  monotonicMs: number,
): number {
  const renewMs = renewIn(held, now, () => jitter);
  return proveAt === undefined ? renewMs : Math.max(0, Math.min(renewMs, proveAt - monotonicMs));
}

function raiseNotRenewed(
  { host, conditions }: KeepDeps,
  held: Svid | undefined,
  error: VmmeshError,
  waitMs: number,
): void {
  const left = (held?.notAfter.getTime() ?? 0) - host.clock.now().getTime();
  const until =
    left > 0
      ? `the present certificate is good for another ${formatDuration(left)}`
      : "there is no valid certificate: mutual TLS fails";
  conditions.raise(
    CONDITION,
    left > 0 ? "warning" : "error",
    `${error.message}; ${until}`,
    error.next ?? `The next attempt is in ${formatDuration(waitMs)}.`,
  );
}

/** With a command that prints tokens it does not matter: status says that the command is next. */
function raiseTokensOnly({ conditions, credentialExec, tokenFile }: KeepDeps, refusal: VmmeshError): void {
  if (credentialExec !== undefined) return;
  conditions.raise(
    TOKENS_ONLY,
    "warning",
    `the CA takes this machine's token but not its certificate: ${refusal.message}`,
    `Each renewal needs a living token: keep ${tokenFile} fresh, or set VMMESH_CREDENTIAL_EXEC in sidecar.env.`,
  );
}
