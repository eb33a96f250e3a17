import { BinaryReader, BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { below } from "./engine.ts";

interface Field {
  readonly number: number;
  readonly type: WireType;
  /** Of a length-delimited field without its length; of others as it stands. */
  readonly body: Uint8Array;
}

/** Changes one field somewhere in a protobuf message, whose lengths stay right: chance would break them nearly always. */
export function mutateMessage(bytes: Uint8Array): Uint8Array {
  const fields = fieldsOf(bytes);
  const at = below(fields?.length ?? 0);
  const field = fields?.[at];
  if (fields === undefined || field === undefined) return mutateValue(bytes);
  const other = fields[below(fields.length)] ?? field;
  switch (below(8)) {
    case 0:
      return write(fields.toSpliced(at, 1));
    case 1:
      return write(fields.toSpliced(at, 0, ...new Array<Field>(1 + below(below(20) + 1)).fill(other)));
    case 2:
      return write(fields.with(at, { ...field, number: 1 + below(30) }));
    case 3:
      return write(fields.with(at, { ...other, number: field.number }));
    case 4:
      // A message within itself.
      return write(fields.with(at, { number: field.number, type: WireType.LengthDelimited, body: bytes }));
    default: {
      const change = field.type === WireType.LengthDelimited ? mutateMessage : mutateValue;
      return write(fields.with(at, { ...field, body: change(field.body) }));
    }
  }
}

function mutateValue(bytes: Uint8Array): Uint8Array {
  const copy = Uint8Array.from(bytes);
  if (copy.length === 0) return Uint8Array.of(below(256));
  copy[below(copy.length)] = below(256);
  return below(4) === 0 ? copy.subarray(0, below(copy.length)) : copy;
}

/** undefined if it is no message. */
function fieldsOf(bytes: Uint8Array): Field[] | undefined {
  const fields: Field[] = [];
  try {
    for (const reader = new BinaryReader(bytes); reader.pos < reader.len; ) {
      const [number, type] = reader.tag();
      // What it steps over, it returns.
      const body = type === WireType.LengthDelimited ? reader.bytes() : reader.skip(type, number);
      fields.push({ number, type, body });
    }
  } catch {
    return undefined;
  }
  return fields;
}

function write(fields: readonly Field[]): Uint8Array {
  const writer = new BinaryWriter();
  for (const { number, type, body } of fields) {
    writer.tag(number, type);
    if (type === WireType.LengthDelimited) writer.bytes(body);
    else writer.raw(body);
  }
  return writer.finish();
}

/** How @bufbuild/protobuf's reader says that bytes are no message; a full stack is none of it. */
export function isMalformed(thrown: unknown): boolean {
  return (
    thrown instanceof Error &&
    /^(premature EOF|invalid|illegal|cant skip|can't skip|The encoded data was not valid|maximum recursion depth)/.test(
      thrown.message,
    )
  );
}
