import { VmmeshError } from "../core/errors.ts";
import type { KubeAccess } from "./kubeconfig.ts";

interface Reason {
  readonly says: string;
  readonly next: string;
}

const WRONG_ROOT: Reason = {
  says: "its certificate is not signed by the root in the kubeconfig",
  next: "Take a kubeconfig from this very cluster, or correct `certificate-authority-data`; if neither helps, somebody stands between.",
};

const CHECK_NETWORK =
  "Look whether this machine reaches it (`curl -k SERVER/version`), and whether the kubeconfig names the right server.";

/** Codes of Node's TLS, sockets and resolver, and of undici, in words. */
const REASONS: Readonly<Record<string, Reason>> = {
  SELF_SIGNED_CERT_IN_CHAIN: WRONG_ROOT,
  DEPTH_ZERO_SELF_SIGNED_CERT: WRONG_ROOT,
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: WRONG_ROOT,
  UNABLE_TO_GET_ISSUER_CERT: WRONG_ROOT,
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: WRONG_ROOT,
  CERT_SIGNATURE_FAILURE: WRONG_ROOT,
  CERT_HAS_EXPIRED: {
    says: "its certificate has expired, or this machine's clock is ahead",
    next: "Compare `date` here and there; if both are right, renew the API server's certificate.",
  },
  CERT_NOT_YET_VALID: {
    says: "its certificate is not valid yet, so this machine's clock is behind",
    next: "Set the clock (`timedatectl set-ntp true`), then run the same command again.",
  },
  ERR_TLS_CERT_ALTNAME_INVALID: {
    says: "its certificate is for other names",
    next: "Use a name or address that the certificate has, or say the name with `tls-server-name` in the kubeconfig.",
  },
  ERR_SSL_WRONG_VERSION_NUMBER: {
    says: "what answers there does not speak TLS",
    next: "Look at the port in the kubeconfig's `server`.",
  },
  EPROTO: { says: "the TLS handshake failed", next: CHECK_NETWORK },
  ECONNREFUSED: { says: "nothing listens there", next: CHECK_NETWORK },
  ECONNRESET: { says: "the connection was cut", next: CHECK_NETWORK },
  EHOSTUNREACH: { says: "there is no route to it", next: CHECK_NETWORK },
  ENETUNREACH: { says: "there is no route to it", next: CHECK_NETWORK },
  ETIMEDOUT: { says: "nothing answers", next: CHECK_NETWORK },
  UND_ERR_CONNECT_TIMEOUT: { says: "nothing answers", next: CHECK_NETWORK },
  UND_ERR_HEADERS_TIMEOUT: { says: "it accepts the connection and then says nothing", next: CHECK_NETWORK },
  UND_ERR_BODY_TIMEOUT: { says: "it stopped in the middle of an answer", next: CHECK_NETWORK },
  UND_ERR_SOCKET: { says: "the connection was cut", next: CHECK_NETWORK },
  ENOTFOUND: { says: "its name has no address", next: CHECK_NETWORK },
  EAI_AGAIN: { says: "this machine's resolver does not answer", next: CHECK_NETWORK },
};

/** What went wrong between us and the API server, as KUBE_UNREACHABLE in words; the library's own text stays as the cause. */
export function whyUnreachable(cause: unknown, access: Pick<KubeAccess, "server" | "source">): VmmeshError {
  const reason = codesOf(cause)
    .map((code) => REASONS[code])
    .find((known) => known !== undefined);
  const what = `the API server ${access.server} (${access.source}) cannot be used`;
  return new VmmeshError("KUBE_UNREACHABLE", reason === undefined ? what : `${what}: ${reason.says}`, {
    cause,
    next: (reason?.next ?? CHECK_NETWORK).replace("SERVER", access.server),
  });
}

/** Codes of an error, its causes and (several addresses were tried) its parts. */
function codesOf(thrown: unknown): string[] {
  if (!(thrown instanceof Error)) return [];
  const { code } = thrown as NodeJS.ErrnoException;
  const parts = thrown instanceof AggregateError ? thrown.errors : [];
  return [...(code === undefined ? [] : [code]), ...[thrown.cause, ...parts].flatMap(codesOf)];
}
