import { generateKeyPairSync, type KeyObject, sign, verify } from "node:crypto";

export interface TokenWish {
  readonly namespace: string;
  readonly serviceAccount: string;
  /** Default `istio-ca`, the only one that is accepted. */
  readonly audience?: string;
  /** Seconds from now; negative makes an expired one. Default 3600. */
  readonly seconds?: number;
}

export interface Subject {
  readonly namespace: string;
  readonly serviceAccount: string;
}

/** Makes and checks tokens of the form that Kubernetes gives a service account (RFC 7519, ES256). */
export class Tokens {
  readonly #privateKey: KeyObject;
  readonly #publicKey: KeyObject;

  constructor() {
    const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    this.#privateKey = privateKey;
    this.#publicKey = publicKey;
  }

  mint({ namespace, serviceAccount, audience = "istio-ca", seconds = 3600 }: TokenWish): string {
    const now = Math.floor(Date.now() / 1000);
    const claims = {
      iss: "https://vmmesh.test",
      aud: [audience],
      sub: `system:serviceaccount:${namespace}:${serviceAccount}`,
      iat: now + Math.min(0, seconds) - 60,
      exp: now + seconds,
      "kubernetes.io": { namespace, serviceaccount: { name: serviceAccount } },
    };
    const head = `${encodePart({ alg: "ES256", typ: "JWT" })}.${encodePart(claims)}`;
    const signature = sign("sha256", Buffer.from(head), { key: this.#privateKey, dsaEncoding: "ieee-p1363" });
    return `${head}.${signature.toString("base64url")}`;
  }

  /** Whom a token speaks for; undefined if it is not ours, expired, for another audience, or no service account's. */
  check(token: string): Subject | undefined {
    const [header = "", payload = "", signature = ""] = token.split(".");
    const key = { key: this.#publicKey, dsaEncoding: "ieee-p1363" as const };
    if (!verify("sha256", Buffer.from(`${header}.${payload}`), key, Buffer.from(signature, "base64url")))
      return undefined;
    const claims = JSON.parse(Buffer.from(payload, "base64url").toString()) as {
      aud: string[];
      sub: string;
      exp: number;
    };
    const [, namespace, serviceAccount] = /^system:serviceaccount:([^:]+):([^:]+)$/.exec(claims.sub) ?? [];
    if (!claims.aud.includes("istio-ca") || claims.exp * 1000 <= Date.now()) return undefined;
    return namespace === undefined || serviceAccount === undefined
      ? undefined
      : { namespace, serviceAccount };
  }
}

function encodePart(value: unknown): string {
  return Buffer.from(JSON.stringify(value)).toString("base64url");
}
