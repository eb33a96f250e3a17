import { backoff, uniformFrom } from "../core/backoff.ts";
import { type ErrorCode, messageOf, VmmeshError } from "../core/errors.ts";
import type { Latest } from "../core/signals.ts";
import { formatDuration, MINUTE_MS, SECOND_MS } from "../core/time.ts";
import type { Conditions } from "../health/conditions.ts";
import type { Clock, Host } from "../platform/host.ts";
import { ClockCheck } from "./clockCheck.ts";
import {
  type CredentialKind,
  type CredentialSources,
  enrollByAny,
  mayWork,
  nextCredential,
  readTokenFile,
} from "./credentials.ts";
import type { KeyKind } from "./csr.ts";
import type { CaTarget } from "./enroll.ts";
import { pause } from "./pause.ts";
import { type Accepted, untilRenewal } from "./renew.ts";
import { loadSvid, type Svid, storeSvid } from "./svid.ts";

export interface KeepDeps extends CredentialSources {
  readonly host: Pick<Host, "files" | "clock" | "random" | "run">;
  /** Resolved anew for each attempt: addresses may change. */
  ca(): Promise<CaTarget>;
  readonly spiffe: string;
  readonly ttlMs?: number;
  readonly keyKind?: KeyKind;
  /** Folder of `storeSvid`. */
  readonly folder: string;
  readonly conditions: Conditions;
  /** Does the control plane refuse the certificate where it is presented? Then its time of renewal is not waited for. */
  isRefused?(): boolean;
  /** How often istiod was reached by others: another number, and a failed attempt is made again at once. */
  reached?(): number;
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
/** A machine without a valid certificate is out of the mesh: it asks as often as its stream to istiod is tried. */
const WITHOUT_CAP_MS = 30 * SECOND_MS;
const CONDITION = "identity-not-renewed";
const NOT_STORED = "identity-not-stored";
const TOKENS_ONLY = "identity-by-token-only";
const TOKEN_HELPS: ReadonlySet<ErrorCode> = new Set([
  "TOKEN_EXPIRED",
  "TOKEN_UNREADABLE",
  "IDENTITY_REFUSED",
  "CERT_WRONG_ROOT",
]);
const FRESH_TOKEN =
  "Make a new bundle (`vmmesh bundle create`) and run `vmmesh join --bundle DIR` here once more: it renews the identity and leaves all else as it is.";
/** A certificate that came by a token is tried this soon: while the token still lives it is known whether it is needed again. */
const PROVE_WITHIN_MS = MINUTE_MS;
/** A control plane that refuses each certificate for another reason than its root does not make the CA sign in a loop. */
const REFUSED_AGAIN_MS = 5 * MINUTE_MS;

/**
 * Keeps the machine's certificate fresh until `signal` aborts. The old one stays in use until it really ends; a failed
 * renewal raises a condition that says when the next attempt is and what happens at expiry.
 */
export async function keepIdentity(deps: KeepDeps, svids: Latest<Svid>, signal: AbortSignal): Promise<void> {
  const { clock, files, random } = deps.host;
  const uniform = uniformFrom(random);
  let waits = backoff(uniform, RETRY);
  let jitter = uniform();
  let roots: string | undefined;
  let lastError: string | undefined;
  let certificateRefused = false;
  const check = new ClockCheck(clock, deps.conditions);
  let accepted = svids.value === undefined ? undefined : acceptedNow(svids.value, clock);
  const take = (svid: Svid): void => {
    accepted = acceptedNow(svid, clock);
    svids.set(svid);
  };
  /** Somebody else may have put a certificate there: a join, an operator; or the clock is right again. */
  const takeStored = async (): Promise<boolean> => {
    const held = svids.value;
    if ((await files.readLink(`${deps.folder}/current`)) === held?.serial) return false;
    const stored = await loadSvid(files, deps.folder);
    if (stored === undefined || stored.notAfter <= clock.now() || stored.spiffe !== deps.spiffe) return false;
    // An older one lies there when the newer could not be written.
    if (held !== undefined && stored.notBefore <= held.notBefore) return false;
    take(stored);
    return true;
  };
  /** By this moment of the monotonic clock it is tried whether the certificate is good for the next one. */
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
    await takeStored();
    const held = svids.value;
    if (check.look(held?.notBefore)) proveAt = clock.monotonicMs();
    const heldMs = clock.monotonicMs() - (accepted?.acceptedMs ?? 0);
    if (deps.isRefused?.() === true && heldMs > REFUSED_AGAIN_MS) proveAt = clock.monotonicMs();
    const now = clock.now();
    const dueMs = accepted === undefined ? 0 : untilDue(accepted, now, jitter, proveAt, clock.monotonicMs());
    if (dueMs > 0) {
      // Not by a renewal, but because the clock is right again or a certificate was put there.
      if (lastError !== undefined) {
        lastError = undefined;
        deps.conditions.clear(CONDITION);
      }
      await tell(new Date(now.getTime() + dueMs));
      await clock.sleep(Math.min(dueMs, LOOK_EVERY_MS), signal).catch(() => undefined);
      continue;
    }
    const tokenBefore = await readTokenFile(files, deps.tokenFile);
    const reachedBefore = deps.reached?.();
    try {
      const ca = await deps.ca();
      roots = ca.rootCert;
      const ttl = deps.ttlMs === undefined ? {} : { ttlMs: deps.ttlMs };
      const keyKind = deps.keyKind === undefined ? {} : { keyKind: deps.keyKind };
      const { svid, by, ...judged } = await enrollByAny(
        deps,
        {
          ca,
          spiffe: deps.spiffe,
          ...ttl,
          ...keyKind,
          onSigned: (notBefore) => check.signed(notBefore),
        },
        held,
        signal,
      );
      take(svid);
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
      await store(deps, svid);
      // Whatever dates a CA writes, it is not asked in a loop.
      await clock.sleep(LEAST_PAUSE_MS, signal).catch(() => undefined);
    } catch (thrown) {
      if (signal.aborted) return;
      const error = VmmeshError.from(thrown);
      lastError = messageOf(error);
      // It has been told: until the clock is right, or the certificate due, the CA is not asked again.
      if (error.code === "CLOCK_OFF") proveAt = undefined;
      const left = (held?.notAfter.getTime() ?? 0) - clock.now().getTime();
      const waitMs = Math.min(waits.next().value, Math.max(left, WITHOUT_CAP_MS));
      raiseNotRenewed(deps, held, error, waitMs);
      deps.onFailed();
      await tell(new Date(clock.now().getTime() + waitMs));
      const why = await pause(
        clock,
        waitMs,
        async () => {
          if (deps.reached?.() !== reachedBefore) return true;
          const token = await readTokenFile(files, deps.tokenFile);
          if (token !== undefined && token !== tokenBefore && mayWork(token, clock.now())) return true;
          return takeStored();
        },
        signal,
      );
      if (why !== "over") waits = backoff(uniform, RETRY);
    }
  }
}

const acceptedNow = ({ notBefore, notAfter }: Svid, clock: Clock): Accepted => ({
  notBefore,
  notAfter,
  acceptedAt: clock.now(),
  acceptedMs: clock.monotonicMs(),
});

/** A full disk is no reason to go without: the certificate is in use already, only the next start would not find it. */
async function store({ host, folder, conditions }: KeepDeps, svid: Svid): Promise<void> {
  try {
    await storeSvid(host.files, folder, svid);
    conditions.clear(NOT_STORED);
  } catch (thrown) {
    conditions.raise(
      NOT_STORED,
      "warning",
      `the new certificate is in use but could not be written to ${folder}: ${messageOf(thrown)}`,
      "Make room on that disk; the next renewal writes again.",
    );
  }
}

/** Milliseconds to the next attempt: at its time in the certificate's life, or sooner while the certificate is unproven. */
function untilDue(
  accepted: Accepted,
  now: Date,
  jitter: number,
  proveAt: number | undefined,
  monotonicMs: number,
): number {
  const renewMs = untilRenewal(accepted, now, monotonicMs, () => jitter);
  return proveAt === undefined ? renewMs : Math.max(0, Math.min(renewMs, proveAt - monotonicMs));
}

function raiseNotRenewed(
  { host, conditions }: KeepDeps,
  held: Svid | undefined,
  error: VmmeshError,
  waitMs: number,
): void {
  const now = host.clock.now();
  const left = (held?.notAfter.getTime() ?? 0) - now.getTime();
  const early = (held?.notBefore.getTime() ?? 0) - now.getTime();
  const until =
    left <= 0
      ? "there is no valid certificate: mutual TLS fails"
      : early > 0
        ? `by this machine's clock the present certificate is not valid for another ${formatDuration(early)}`
        : `the present certificate is good for another ${formatDuration(left)}`;
  conditions.raise(
    CONDITION,
    left > 0 && early <= 0 ? "warning" : "error",
    `${error.message}; ${until}`,
    TOKEN_HELPS.has(error.code)
      ? FRESH_TOKEN
      : (error.next ?? `The next attempt is in ${formatDuration(waitMs)}.`),
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
