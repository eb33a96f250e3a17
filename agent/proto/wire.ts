import { BinaryReader, BinaryWriter, WireType } from "@bufbuild/protobuf/wire";

export { BinaryReader, BinaryWriter, WireType };

/**
 * Walks a message field by field. `onField` reads the value of the fields it knows and returns true; the others are
 * skipped. What is only passed on stays bytes.
 *
 * @throws {Error} on a truncated or malformed message
 */
export function readMessage(
  bytes: Uint8Array,
  onField: (field: number, reader: BinaryReader) => boolean,
): void {
  const reader = new BinaryReader(bytes);
  while (reader.pos < reader.len) {
    const [field, wireType] = reader.tag();
    if (!onField(field, reader)) reader.skip(wireType, field);
  }
}

/** Writes a length-delimited field if there is something to write: proto3 leaves defaults out. */
export function put(writer: BinaryWriter, field: number, value: string | Uint8Array | undefined): void {
  if (value !== undefined && value.length > 0) putPresent(writer, field, value);
}

/** Writes it also if it is empty: an item of a repeated field, or a message whose presence says something (a refusal). */
export function putPresent(writer: BinaryWriter, field: number, value: string | Uint8Array): void {
  writer.tag(field, WireType.LengthDelimited);
  if (typeof value === "string") writer.string(value);
  else writer.bytes(value);
}

/** google.protobuf.Any, put together around bytes that stay as they are. */
export function writeAny(typeUrl: string, value: Uint8Array): Uint8Array {
  const writer = new BinaryWriter();
  put(writer, 1, typeUrl);
  put(writer, 2, value);
  return writer.finish();
}

/** google.protobuf.Any. */
export function readAny(bytes: Uint8Array): { typeUrl: string; value: Uint8Array } {
  let typeUrl = "";
  let value: Uint8Array = new Uint8Array();
  readMessage(bytes, (field, reader) => {
    if (field === 1) typeUrl = reader.string();
    else if (field === 2) value = reader.bytes();
    else return false;
    return true;
  });
  return { typeUrl, value };
}

/** google.rpc.Status: a gRPC code and a sentence. */
export interface RpcStatus {
  readonly code: number;
  readonly message: string;
}

export function writeStatus(status: RpcStatus): Uint8Array {
  const writer = new BinaryWriter();
  if (status.code !== 0) writer.tag(1, WireType.Varint).int32(status.code);
  put(writer, 2, status.message);
  return writer.finish();
}

export function readStatus(bytes: Uint8Array): RpcStatus {
  let code = 0;
  let message = "";
  readMessage(bytes, (field, reader) => {
    if (field === 1) code = reader.int32();
    else if (field === 2) message = reader.string();
    else return false;
    return true;
  });
  return { code, message };
}

/** One `map<string, bytes>` entry; every map in the messages that we touch has string keys. */
export function readMapEntry(bytes: Uint8Array): { key: string; value: Uint8Array } {
  let key = "";
  let value: Uint8Array = new Uint8Array();
  readMessage(bytes, (field, reader) => {
    if (field === 1) key = reader.string();
    else if (field === 2) value = reader.bytes();
    else return false;
    return true;
  });
  return { key, value };
}
