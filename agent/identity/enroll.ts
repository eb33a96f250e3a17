import { VmmeshError as Failure, type VmmeshError } from "../core/errors.ts";
import { DAY_MS, SECOND_MS } from "../core/time.ts";
import { type GrpcTarget, unary } from "../platform/grpc.ts";
import type { Host } from "../platform/host.ts";
import { readCertificateResponse, writeCertificateRequest } from "../proto/istio.ts";
import { CLOCK_TOLERANCE_MS } from "./clockCheck.ts";
import { type KeyKind, makeCsr, makeKey } from "./csr.ts";
import { BACKDATED_MS } from "./renew.ts";
import { type Svid, svidFrom } from "./svid.ts";
import { checkToken, clockOff, expiredError, readToken, tokenExpired } from "./token.ts";

const CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const TIMEOUT_MS = 15 * SECOND_MS;

/** Where the CA is, without credentials. */
export interface CaTarget {
  readonly addresses: readonly string[];
  readonly port: number;
  readonly serverName: string;
  /** PEM; what the server's certificate must lead to. */
  readonly rootCert: string;
  readonly clusterId: string;
}

export type Credential =
  | { readonly kind: "certificate"; readonly svid: Svid }
  | { readonly kind: "token"; readonly token: string };

export interface EnrollOptions {
  readonly ca: CaTarget;
  readonly spiffe: string;
  readonly credential: Credential;
  /** Lifetime to ask for, milliseconds; the CA may grant less, and refuses more than it allows. Default one day. */
  readonly ttlMs?: number;
  readonly keyKind?: KeyKind;
  /** Told when the CA has signed, whatever becomes of the certificate: its dates are by the CA's clock. */
  readonly onSigned?: (notBefore: Date) => void;
}

/**
 * Makes a key and asks istiod's CA for a certificate, trying each address in order.
 *
 * @throws {VmmeshError} TOKEN_UNREADABLE, TOKEN_AUDIENCE, TOKEN_EXPIRED, CLOCK_OFF, ISTIOD_UNREACHABLE, ISTIOD_UNTRUSTED,
 * CERT_WRONG_ROOT, IDENTITY_REFUSED, CERT_NOT_VALID
 */
export async function enroll(
  host: Pick<Host, "clock">,
  options: EnrollOptions,
  signal: AbortSignal,
): Promise<Svid> {
  const { ca, credential } = options;
  const facts = credential.kind === "token" ? readToken(credential.token) : undefined;
  if (facts !== undefined) checkToken(facts, host.clock.now());

  const key = makeKey(options.keyKind ?? "ecdsa-p256");
  const request = writeCertificateRequest(
    makeCsr(key, options.spiffe),
    (options.ttlMs ?? DAY_MS) / SECOND_MS,
    "",
  );
  const answer = await firstThatAnswers(ca.addresses, (address) =>
    unary(targetOf(ca, address, credential), CREATE_CERTIFICATE, request, TIMEOUT_MS, signal),
  ).catch((thrown: unknown) => {
    const now = host.clock.now();
    if (facts !== undefined && tokenExpired(facts, now) && Failure.from(thrown).code === "IDENTITY_REFUSED")
      throw expiredError(facts, now, thrown);
    throw thrown;
  });
  const svid = svidFrom(key, readCertificateResponse(answer), options.spiffe);
  options.onSigned?.(svid.notBefore);
  const now = host.clock.now();
  const aheadMs = svid.notBefore.getTime() + BACKDATED_MS - now.getTime();
  if (Math.abs(aheadMs) > CLOCK_TOLERANCE_MS) throw clockOff(now, aheadMs, "the CA signed");
  return svid;
}

/** A gRPC target with the credentials of this moment. The token goes along only where it is the credential. */
export function targetOf(ca: CaTarget, address: string, credential: Credential | undefined): GrpcTarget {
  const metadata: Record<string, string> = { clusterid: ca.clusterId };
  if (credential?.kind === "token") metadata["authorization"] = `Bearer ${credential.token.trim()}`;
  return {
    address,
    port: ca.port,
    serverName: ca.serverName,
    rootCert: ca.rootCert,
    metadata,
    ...(credential?.kind === "certificate"
      ? { client: { key: credential.svid.key, chain: credential.svid.chain } }
      : {}),
  };
}

async function firstThatAnswers<T>(
  addresses: readonly string[],
  ask: (address: string) => Promise<T>,
): Promise<T> {
  let failure: VmmeshError = new Failure("ISTIOD_UNREACHABLE", "istiod has no address", {
    next: "Give one with --istiod-address.",
  });
  for (const address of addresses) {
    try {
      return await ask(address);
    } catch (thrown) {
      failure = Failure.from(thrown);
      if (failure.code !== "ISTIOD_UNREACHABLE") break;
    }
  }
  throw failure;
}
