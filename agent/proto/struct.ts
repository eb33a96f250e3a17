import { readMapEntry, readMessage } from "./wire.ts";

/** A value of google.protobuf.Struct. */
export type StructValue = null | string | number | boolean | readonly StructValue[] | Struct;
export type Struct = { readonly [key: string]: StructValue };

export function isStruct(value: StructValue | undefined): value is Struct {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Deeper than anything that Istio writes; what comes from the network must not exhaust the stack. */
const MAX_DEPTH = 16;

/**
 * google.protobuf.Struct: fields 1; Value: null 1, number 2, string 3, bool 4, struct 5, list 6; ListValue: values 1.
 * @throws {Error} on malformed bytes, and on nesting deeper than 16
 */
export function readStruct(bytes: Uint8Array, depth = 0): Struct {
  if (depth > MAX_DEPTH) throw new Error(`a struct is nested deeper than ${MAX_DEPTH}`);
  const members: [string, StructValue][] = [];
  readMessage(bytes, (field, reader) => {
    if (field !== 1) return false;
    const { key, value } = readMapEntry(reader.bytes());
    const read = readValue(value, depth);
    if (read !== undefined) members.push([key, read]);
    return true;
  });
  return Object.fromEntries(members);
}

function readValue(bytes: Uint8Array, depth: number): StructValue | undefined {
  let value: StructValue | undefined;
  readMessage(bytes, (field, reader) => {
    if (field === 1) {
      reader.int32();
      value = null;
    } else if (field === 2) value = reader.double();
    else if (field === 3) value = reader.string();
    else if (field === 4) value = reader.bool();
    else if (field === 5) value = readStruct(reader.bytes(), depth + 1);
    else if (field === 6) value = readList(reader.bytes(), depth + 1);
    else return false;
    return true;
  });
  return value;
}

function readList(bytes: Uint8Array, depth: number): StructValue[] {
  if (depth > MAX_DEPTH) throw new Error(`a struct is nested deeper than ${MAX_DEPTH}`);
  const values: StructValue[] = [];
  readMessage(bytes, (field, reader) => {
    if (field !== 1) return false;
    values.push(readValue(reader.bytes(), depth) ?? null);
    return true;
  });
  return values;
}
