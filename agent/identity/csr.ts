import { createPrivateKey, createPublicKey, generateKeyPairSync, sign } from "node:crypto";

/**
 * A PKCS#10 request (RFC 2986) is six nested DER values; written out here because the library that makes them costs a
 * resident process 16 MB (DECISIONS.md). The tests read it back with that library and with OpenSSL.
 */
export type KeyKind = "ecdsa-p256" | "rsa-2048";

/** A fresh private key, PKCS#8 PEM. */
export function makeKey(kind: KeyKind): string {
  const { privateKey } =
    kind === "rsa-2048"
      ? generateKeyPairSync("rsa", { modulusLength: 2048 })
      : generateKeyPairSync("ec", { namedCurve: "P-256" });
  return privateKey.export({ type: "pkcs8", format: "pem" }).toString();
}

/** DER: identifier octet, length, content (X.690, 8.1). */
function der(tag: number, ...content: Uint8Array[]): Buffer {
  const body = Buffer.concat(content);
  if (body.length < 0x80) return Buffer.concat([Buffer.from([tag, body.length]), body]);
  const size = [
    ...Buffer.from(
      body.length.toString(16).padStart(body.length > 0xffff ? 6 : body.length > 0xff ? 4 : 2, "0"),
      "hex",
    ),
  ];
  return Buffer.concat([Buffer.from([tag, 0x80 | size.length, ...size]), body]);
}

const SEQUENCE = 0x30;
const SET = 0x31;
const OID = {
  subjectAltName: der(0x06, Buffer.from([0x55, 0x1d, 0x11])),
  extensionRequest: der(0x06, Buffer.from([0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e])),
  ecdsaWithSha256: der(0x06, Buffer.from([0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02])),
  sha256WithRsa: der(0x06, Buffer.from([0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b])),
};
const NULL = der(0x05);
const TRUE = der(0x01, Buffer.from([0xff]));

/**
 * A certificate request for one SPIFFE id: empty subject, critical URI SAN, as Istio's agent asks (istiod signs for the
 * identity that it authenticated and ignores both).
 *
 * @param key private key, PEM
 * @returns PEM
 */
export function makeCsr(key: string, spiffe: string): string {
  const privateKey = createPrivateKey(key);
  const publicKey = createPublicKey(privateKey).export({ type: "spki", format: "der" });
  const names = der(SEQUENCE, der(0x86, Buffer.from(spiffe, "ascii")));
  const extension = der(SEQUENCE, OID.subjectAltName, TRUE, der(0x04, names));
  const attribute = der(SEQUENCE, OID.extensionRequest, der(SET, der(SEQUENCE, extension)));
  const info = der(SEQUENCE, der(0x02, Buffer.from([0])), der(SEQUENCE), publicKey, der(0xa0, attribute));
  const algorithm =
    privateKey.asymmetricKeyType === "rsa"
      ? der(SEQUENCE, OID.sha256WithRsa, NULL)
      : der(SEQUENCE, OID.ecdsaWithSha256);
  const signature = der(0x03, Buffer.from([0]), sign("sha256", info, privateKey));
  const lines =
    der(SEQUENCE, info, algorithm, signature)
      .toString("base64")
      .match(/.{1,64}/g) ?? [];
  return `-----BEGIN CERTIFICATE REQUEST-----\n${lines.join("\n")}\n-----END CERTIFICATE REQUEST-----\n`;
}
