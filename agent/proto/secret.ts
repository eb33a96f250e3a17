import { BinaryWriter, put } from "./wire.ts";

/** envoy.config.core.v3.DataSource with `inline_bytes` (field 2). */
function inline(text: string): Uint8Array {
  const writer = new BinaryWriter();
  put(writer, 2, Buffer.from(text));
  return writer.finish();
}

/** envoy.extensions.transport_sockets.tls.v3.Secret holding a TlsCertificate (chain 1, key 2). */
export function writeTlsCertificate(name: string, chain: string, key: string): Uint8Array {
  const certificate = new BinaryWriter();
  put(certificate, 1, inline(chain));
  put(certificate, 2, inline(key));
  const secret = new BinaryWriter();
  put(secret, 1, name);
  put(secret, 2, certificate.finish());
  return secret.finish();
}

/** The same message holding a CertificateValidationContext (trusted_ca 1; field 4 of Secret). */
export function writeValidationContext(name: string, roots: string): Uint8Array {
  const context = new BinaryWriter();
  put(context, 1, inline(roots));
  const secret = new BinaryWriter();
  put(secret, 1, name);
  put(secret, 4, context.finish());
  return secret.finish();
}
