import { type ErrorCode, VmmeshError } from "../core/errors.ts";
import type { Host, Owner } from "../platform/host.ts";
import { tokenOfCommand } from "./command.ts";
import { type Credential, type EnrollOptions, enroll } from "./enroll.ts";
import { BACKDATED_MS } from "./renew.ts";
import { isOfRoots, type Svid } from "./svid.ts";
import { clockOff, readToken, tokenExpired } from "./token.ts";

/** What can prove who we are, in the order in which they are asked. */
const ORDER = ["certificate", "token", "command"] as const;
export type CredentialKind = (typeof ORDER)[number];

const NAMES: Readonly<Record<CredentialKind, string>> = {
  certificate: "by certificate",
  token: "by the token file",
  command: "by the credential command",
};

/** With these the CA has judged this credential; another one may do. Of all others the next one would fail alike. */
const ANOTHER_MAY_DO: ReadonlySet<ErrorCode> = new Set([
  "IDENTITY_REFUSED",
  "CERT_WRONG_ROOT",
  "TOKEN_EXPIRED",
  "TOKEN_AUDIENCE",
  "TOKEN_UNREADABLE",
]);

export interface CredentialSources {
  readonly host: Pick<Host, "files" | "clock" | "run">;
  /** Read anew for each attempt: an operator may put a fresh token there. */
  readonly tokenFile: string;
  /** Absolute path of a program that prints a token. */
  readonly credentialExec: string | undefined;
  /** Whom that program runs as, where we are root. */
  readonly runAs?: Owner;
}

export interface Enrolled {
  readonly svid: Svid;
  readonly by: CredentialKind;
  /** Why the certificate was not accepted, although it looked good. */
  readonly certificateRefused: VmmeshError | undefined;
}

/**
 * An expired, foreign or not yet valid certificate is never presented: istiod would end the handshake even beside a good
 * token.
 *
 * @param roots PEM; undefined: not known, only the dates count
 */
export function presentable(svid: Svid | undefined, roots: string | undefined, now: Date): svid is Svid {
  return (
    svid !== undefined &&
    svid.notAfter > now &&
    svid.notBefore <= now &&
    (roots === undefined || isOfRoots(svid, roots))
  );
}

/** For a stream of configuration: the certificate while it may be presented, else the token. */
export function chooseCredential(
  svid: Svid | undefined,
  token: string | undefined,
  roots: string,
  now: Date,
): Credential | undefined {
  if (presentable(svid, roots, now)) return { kind: "certificate", svid };
  return token === undefined ? undefined : { kind: "token", token };
}

/** Text of the token file; undefined if there is none or it is empty. */
export async function readTokenFile(
  files: Pick<Host["files"], "readText">,
  path: string,
): Promise<string | undefined> {
  return (await files.readText(path))?.trim() || undefined;
}

/**
 * Asks the CA with each credential there is until one is accepted.
 *
 * @throws {VmmeshError} as `enroll` and `tokenOfCommand`; TOKEN_UNREADABLE if there is no credential at all
 */
export async function enrollByAny(
  sources: CredentialSources,
  wish: Omit<EnrollOptions, "credential">,
  held: Svid | undefined,
  signal: AbortSignal,
): Promise<Enrolled> {
  const { host } = sources;
  const failures: { readonly kind: CredentialKind; readonly error: VmmeshError }[] = [];
  for (const kind of ORDER) {
    try {
      const credential = await credentialOf(kind, sources, held, wish.ca.rootCert, signal);
      if (credential === undefined) continue;
      const svid = await enroll(host, { ...wish, credential }, signal);
      const certificateRefused = failures.find((it) => it.kind === "certificate")?.error;
      return { svid, by: kind, certificateRefused };
    } catch (thrown) {
      const error = VmmeshError.from(thrown);
      if (signal.aborted) throw thrown;
      failures.push({ kind, error });
      if (!ANOTHER_MAY_DO.has(error.code)) break;
    }
  }
  const last = failures.at(-1);
  if (last === undefined) {
    const now = host.clock.now();
    const aheadMs = (held?.notBefore.getTime() ?? 0) - now.getTime();
    if (aheadMs > 0)
      throw clockOff(now, aheadMs + BACKDATED_MS, "the CA signed the certificate that it holds");
    throw new VmmeshError(
      "TOKEN_UNREADABLE",
      held === undefined
        ? "this machine has no certificate, and there is no token to ask for one"
        : "the certificate has ended or is of another root, and there is no token to ask for a new one",
      { next: "Make a new bundle: `vmmesh bundle create`." },
    );
  }
  if (failures.length === 1) throw last.error;
  throw new VmmeshError(
    last.error.code,
    failures.map(({ kind, error }) => `${NAMES[kind]}: ${error.message}`).join("; "),
    { cause: last.error, ...(last.error.next === undefined ? {} : { next: last.error.next }) },
  );
}

async function credentialOf(
  kind: CredentialKind,
  { host, tokenFile, credentialExec, runAs }: CredentialSources,
  held: Svid | undefined,
  roots: string,
  signal: AbortSignal,
): Promise<Credential | undefined> {
  const now = host.clock.now();
  if (kind === "certificate")
    return presentable(held, roots, now) ? { kind: "certificate", svid: held } : undefined;
  if (kind === "command") {
    if (credentialExec === undefined) return undefined;
    return { kind: "token", token: await tokenOfCommand(host, credentialExec, runAs, signal) };
  }
  const token = await readTokenFile(host.files, tokenFile);
  if (token === undefined) return undefined;
  // Whether it has ended is for the CA to say, by its clock; where there is something better, it is not bothered.
  if (credentialExec !== undefined && tokenExpired(readToken(token), now)) return undefined;
  return { kind: "token", token };
}

/** Which credential the next attempt would be accepted by, as far as this machine can know. */
export async function nextCredential(
  { host, tokenFile, credentialExec }: CredentialSources,
  held: Svid | undefined,
  roots: string | undefined,
  certificateRefused: boolean,
): Promise<CredentialKind | "none"> {
  const now = host.clock.now();
  if (!certificateRefused && presentable(held, roots, now)) return "certificate";
  const token = await readTokenFile(host.files, tokenFile);
  if (token !== undefined && mayWork(token, now)) return "token";
  return credentialExec === undefined ? "none" : "command";
}

/** It is a token, and has not ended by our clock. */
export function mayWork(token: string, now: Date): boolean {
  try {
    return !tokenExpired(readToken(token), now);
  } catch {
    return false;
  }
}
