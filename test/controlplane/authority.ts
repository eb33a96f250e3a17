import "reflect-metadata";
import { randomBytes, webcrypto } from "node:crypto";
import * as x509 from "@peculiar/x509";
import { DAY_MS, HOUR_MS, MINUTE_MS } from "../../agent/core/time.ts";

const ALGORITHM = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" } as const;
/** What istiod grants without and with a wish, and its grace for clocks that differ (ch. 3.5 of the VM protocol). */
const DEFAULT_TTL_MS = 24 * HOUR_MS;
const MAX_TTL_MS = 2160 * HOUR_MS;
const GRACE_MS = 2 * MINUTE_MS;

/** A certificate authority with a root of its own, as istiod's self-signed one. */
export class Authority {
  readonly rootPem: string;
  readonly #root: x509.X509Certificate;
  readonly #keys: webcrypto.CryptoKeyPair;

  private constructor(root: x509.X509Certificate, keys: webcrypto.CryptoKeyPair) {
    this.#root = root;
    this.#keys = keys;
    this.rootPem = `${root.toString("pem")}\n`;
  }

  static async create(trustDomain: string): Promise<Authority> {
    const keys = await webcrypto.subtle.generateKey(ALGORITHM, true, ["sign", "verify"]);
    const root = await x509.X509CertificateGenerator.createSelfSigned({
      serialNumber: serial(),
      name: `O=${trustDomain}`,
      keys,
      signingAlgorithm: ALGORITHM,
      notBefore: new Date(Date.now() - GRACE_MS),
      notAfter: new Date(Date.now() + 3650 * DAY_MS),
      extensions: [
        new x509.BasicConstraintsExtension(true, undefined, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
        await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
      ],
    });
    return new Authority(root, keys);
  }

  /**
   * Signs for the identity that the caller has proven; of the request only the key counts.
   *
   * @param ttlMs 0 or less: 24 hours
   * @throws {RangeError} above 2160 hours; {Error} if the request is malformed or not signed by its own key
   */
  async signRequest(csrPem: string, spiffe: string, ttlMs: number): Promise<string> {
    if (ttlMs > MAX_TTL_MS) {
      throw new RangeError(
        `requested TTL ${ttlMs / HOUR_MS}h is greater than the max allowed TTL ${MAX_TTL_MS / HOUR_MS}h`,
      );
    }
    const request = new x509.Pkcs10CertificateRequest(csrPem);
    if (!(await request.verify())) throw new Error("the request is not signed by its own key");
    const san = new x509.SubjectAlternativeNameExtension([{ type: "url", value: spiffe }], true);
    return this.#sign(request.publicKey, san, "", ttlMs > 0 ? ttlMs : DEFAULT_TTL_MS);
  }

  /**
   * A key and a certificate for the control plane's own port.
   * @param shiftMs how much later than now it is made: negative beyond a year, it has ended
   */
  async server(
    names: readonly string[],
    addresses: readonly string[],
    shiftMs = 0,
  ): Promise<{ key: string; cert: string }> {
    const keys = await webcrypto.subtle.generateKey(ALGORITHM, true, ["sign", "verify"]);
    const san = new x509.SubjectAlternativeNameExtension([
      ...names.map((value) => ({ type: "dns" as const, value })),
      ...addresses.map((value) => ({ type: "ip" as const, value })),
    ]);
    const key = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey));
    return {
      key: `-----BEGIN PRIVATE KEY-----\n${key.toString("base64").replaceAll(/.{64}/g, "$&\n").trimEnd()}\n-----END PRIVATE KEY-----\n`,
      cert: await this.#sign(keys.publicKey, san, "CN=istiod", 365 * DAY_MS, shiftMs),
    };
  }

  async #sign(
    publicKey: x509.PublicKeyType,
    san: x509.SubjectAlternativeNameExtension,
    subject: string,
    ttlMs: number,
    shiftMs = 0,
  ): Promise<string> {
    const now = Date.now() + shiftMs;
    const leaf = await x509.X509CertificateGenerator.create({
      serialNumber: serial(),
      subject,
      issuer: this.#root.subject,
      publicKey,
      signingKey: this.#keys.privateKey,
      signingAlgorithm: ALGORITHM,
      notBefore: new Date(now - GRACE_MS),
      notAfter: new Date(Math.min(now + ttlMs, this.#root.notAfter.getTime())),
      extensions: [
        new x509.BasicConstraintsExtension(false, undefined, true),
        new x509.KeyUsagesExtension(
          x509.KeyUsageFlags.digitalSignature | x509.KeyUsageFlags.keyEncipherment,
          true,
        ),
        new x509.ExtendedKeyUsageExtension([
          x509.ExtendedKeyUsage.serverAuth,
          x509.ExtendedKeyUsage.clientAuth,
        ]),
        await x509.AuthorityKeyIdentifierExtension.create(this.#keys.publicKey),
        san,
      ],
    });
    return `${leaf.toString("pem")}\n`;
  }
}

/** 16 random bytes, the first below 0x80: a serial number is positive. */
function serial(): string {
  const bytes = randomBytes(16);
  bytes.writeUInt8((bytes.readUInt8(0) & 0x7f) | 0x01, 0);
  return bytes.toString("hex");
}
