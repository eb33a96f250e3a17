import { BinaryReader, BinaryWriter, put, readMapEntry, readMessage, WireType } from "./wire.ts";

/** istio.v1.auth.IstioCertificateRequest: csr 1 (PEM), validity_duration 3 (seconds), metadata 4 (Struct). */
export function writeCertificateRequest(
  csr: string,
  validitySeconds: number,
  certSigner: string,
): Uint8Array {
  const value = new BinaryWriter();
  // google.protobuf.Value.string_value is a oneof: written even when it is empty.
  value.tag(3, WireType.LengthDelimited).string(certSigner);
  const entry = new BinaryWriter();
  put(entry, 1, "CertSigner");
  put(entry, 2, value.finish());
  const struct = new BinaryWriter();
  put(struct, 1, entry.finish());
  const writer = new BinaryWriter();
  put(writer, 1, csr);
  writer.tag(3, WireType.Varint).int64(validitySeconds);
  put(writer, 4, struct.finish());
  return writer.finish();
}

/** istio.v1.auth.IstioCertificateResponse: PEM texts, leaf first, the root bundle last. */
export function readCertificateResponse(bytes: Uint8Array): string[] {
  const chain: string[] = [];
  readMessage(bytes, (field, reader) => {
    if (field !== 1) return false;
    chain.push(reader.string());
    return true;
  });
  return chain;
}

export interface NameInfo {
  readonly ips: readonly string[];
  readonly registry: string;
  readonly shortname: string;
  readonly namespace: string;
  readonly altHosts: readonly string[];
}

/**
 * istio.networking.nds.v1.NameTable: host → addresses; always the whole table. Read as it is walked, one host at a time:
 * with 10,000 of them it has a megabyte.
 *
 * @throws {Error} where the walk meets a truncated or malformed host; those before it were handed out
 */
export function* readNameTable(bytes: Uint8Array): Generator<readonly [host: string, info: NameInfo]> {
  const reader = new BinaryReader(bytes);
  while (reader.pos < reader.len) {
    const [field, wireType] = reader.tag();
    if (field === 1) {
      const { key, value } = readMapEntry(reader.bytes());
      yield [key, readNameInfo(value)];
    } else reader.skip(wireType, field);
  }
}

function readNameInfo(bytes: Uint8Array): NameInfo {
  const ips: string[] = [];
  const altHosts: string[] = [];
  let [registry, shortname, namespace] = ["", "", ""];
  readMessage(bytes, (field, reader) => {
    if (field === 1) ips.push(reader.string());
    else if (field === 2) registry = reader.string();
    else if (field === 3) shortname = reader.string();
    else if (field === 4) namespace = reader.string();
    else if (field === 5) altHosts.push(reader.string());
    else return false;
    return true;
  });
  return { ips, registry, shortname, namespace, altHosts };
}
