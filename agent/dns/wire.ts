import { ipv4Bytes, ipv6Bytes } from "../core/net.ts";
import { type Answer, type Question, TYPE } from "./answer.ts";

const HEADER = 12;
/** What a UDP client without EDNS can take (RFC 1035, 4.2.1). */
const PLAIN_UDP_BYTES = 512;
/** What we tell who asks with EDNS that we take over UDP: fits any path unfragmented (dnsflagday.net/2020). */
const OWN_UDP_BYTES = 1232;
/** What TCP framing can carry: two bytes of length. */
const TCP_BYTES = 65_535;
/** Seconds a client may keep one of our answers; Istio's number. */
const TTL_SECONDS = 30;

const QR = 0x8000;
const OPCODE = 0x7800;
const AA = 0x0400;
const TC = 0x0200;
const RD = 0x0100;
const RA = 0x0080;
const CD = 0x0010;
const DNSSEC_OK = 0x8000;

/** Response codes that we give ourselves (RFC 1035). */
export const RCODE = { FORMERR: 1, SERVFAIL: 2, NXDOMAIN: 3, NOTIMP: 4, REFUSED: 5 } as const;
/** The upper eight bits of BADVERS (16), which go into the OPT record (RFC 6891, 6.1.3). */
const BADVERS_HIGH = 1;

/** What we must know of a query to answer it or to recognise its reply; the rest of its bytes is only passed on. */
export interface Query {
  readonly id: number;
  readonly flags: number;
  readonly question: Question;
  /** As it came: its copy keeps the client's spelling, which some clients check (0x20). */
  readonly questionBytes: Uint8Array;
  /** Of the client's OPT record, if it sent one. */
  readonly edns:
    | { readonly version: number; readonly udpBytes: number; readonly dnssecOk: boolean }
    | undefined;
}

/**
 * Reads the header and the first question of whatever arrived.
 *
 * @returns `ignore` for what must get no reply (too short to have an id, or itself a reply: two servers would answer
 *   each other for ever), `malformed` for FORMERR (several questions among it, RFC 9619), `no-question` for SERVFAIL as Istio answers it, `foreign` for other
 *   operations than a plain query, which are passed on unread
 */
export function readQuery(bytes: Uint8Array): Query | "ignore" | "malformed" | "no-question" | "foreign" {
  if (bytes.length < HEADER) return "ignore";
  const view = viewOf(bytes);
  const flags = view.getUint16(2);
  if ((flags & QR) !== 0) return "ignore";
  if ((flags & OPCODE) !== 0) return "foreign";
  if (view.getUint16(4) === 0) return "no-question";
  if (view.getUint16(4) > 1) return "malformed";
  const name = readName(bytes, HEADER);
  if (name === undefined || name.end + 4 > bytes.length) return "malformed";
  return {
    id: view.getUint16(0),
    flags,
    question: { name: name.text, type: view.getUint16(name.end), class: view.getUint16(name.end + 2) },
    questionBytes: bytes.subarray(HEADER, name.end + 4),
    edns: readEdns(bytes, name.end + 4),
  };
}

/** A question's name has nothing before it to point to, so a compressed one is malformed. */
function readName(bytes: Uint8Array, start: number): { text: string; end: number } | undefined {
  const labels: string[] = [];
  for (let at = start; at - start < 255; ) {
    const length = bytes[at];
    if (length === undefined || length > 63) return undefined;
    if (length === 0) return { text: `${labels.join(".")}.`, end: at + 1 };
    if (at + 1 + length > bytes.length) return undefined;
    const label = Buffer.from(bytes.buffer, bytes.byteOffset + at + 1, length).toString("latin1");
    // A dot inside a label is no separator: escaped it equals no name of the table.
    labels.push(label.replace(/[.\\]/g, "\\$&").toLowerCase());
    at += 1 + length;
  }
  return undefined;
}

/**
 * The OPT record (RFC 6891, 6.1.2): its class is the size, its TTL holds the flags. Walked here and not with dns-packet,
 * which reads 60,000 records out of 38 bytes if their counts say so; a step of ours goes forward by 11 bytes or ends.
 */
function readEdns(bytes: Uint8Array, afterQuestion: number): Query["edns"] {
  const view = viewOf(bytes);
  let at = afterQuestion;
  for (let left = view.getUint16(6) + view.getUint16(8) + view.getUint16(10); left > 0; left -= 1) {
    const name = endOfName(bytes, at);
    if (name === undefined || name + 10 > bytes.length) return undefined;
    if (view.getUint16(name) === TYPE.OPT)
      return {
        version: view.getUint8(name + 5),
        udpBytes: view.getUint16(name + 2),
        dnssecOk: (view.getUint16(name + 6) & DNSSEC_OK) !== 0,
      };
    at = name + 10 + view.getUint16(name + 8);
  }
  return undefined;
}

/** Where a record's name ends: at a pointer (RFC 1035, 4.1.4) or at the root. */
function endOfName(bytes: Uint8Array, start: number): number | undefined {
  for (let at = start; at < bytes.length; ) {
    const length = bytes[at] ?? 0;
    if (length === 0) return at + 1;
    if (length >= 0xc0) return at + 2;
    at += 1 + length;
  }
  return undefined;
}

/** The most bytes that the asker can take over this protocol. */
export function replyLimit(query: Query, protocol: "udp" | "tcp"): number {
  if (protocol === "tcp") return TCP_BYTES;
  return Math.max(query.edns?.udpBytes ?? PLAIN_UDP_BYTES, PLAIN_UDP_BYTES);
}

/**
 * NOERROR with the records of `answer`; what does not fit into `limit` bytes is left out and TC is set. Without addresses
 * an SOA lets caches keep that there are none (RFC 2308, 2.2).
 */
export function writeAnswer(query: Query, answer: Answer, limit: number): Uint8Array {
  const opt = query.edns === undefined ? undefined : optRecord(query.edns.dnssecOk, 0);
  const records: Uint8Array[] = [];
  let size = HEADER + query.questionBytes.length + (opt?.length ?? 0);
  let complete = true;
  const add = (record: Uint8Array): boolean => {
    if (size + record.length > limit) complete = false;
    else {
      records.push(record);
      size += record.length;
    }
    return complete;
  };

  // Owners are pointers: to the question's name, or to the alias' target inside the CNAME record (RFC 1035, 4.1.4).
  let owner = HEADER;
  if (answer.alias !== undefined) {
    owner = HEADER + query.questionBytes.length + 12;
    add(record(HEADER, TYPE.CNAME, encodeName(answer.alias)));
  }
  for (const address of complete ? answer.addresses : []) {
    const data = ipv4Bytes(address) ?? ipv6Bytes(address);
    if (data !== undefined && !add(record(owner, data.length === 4 ? TYPE.A : TYPE.AAAA, data))) break;
  }

  const answers = records.length;
  if (complete && answer.addresses.length === 0) add(record(owner, TYPE.SOA, SOA_DATA));

  return message(query.id, QR | AA | RA | (query.flags & (RD | CD)) | (complete ? 0 : TC), {
    question: query.questionBytes,
    answers: records.slice(0, answers),
    authorities: records.slice(answers),
    additionals: opt === undefined ? [] : [opt],
  });
}

/** A whole message; the counts are those of what is given. */
function message(
  id: number,
  flags: number,
  sections: {
    /** Empty: none. */
    readonly question: Uint8Array;
    readonly answers?: readonly Uint8Array[];
    readonly authorities?: readonly Uint8Array[];
    readonly additionals?: readonly Uint8Array[];
  },
): Uint8Array {
  const { question, answers = [], authorities = [], additionals = [] } = sections;
  const parts = [question, ...answers, ...authorities, ...additionals];
  const bytes = new Uint8Array(parts.reduce((size, part) => size + part.length, HEADER));
  const view = viewOf(bytes);
  view.setUint16(0, id);
  view.setUint16(2, flags);
  view.setUint16(4, question.length === 0 ? 0 : 1);
  view.setUint16(6, answers.length);
  view.setUint16(8, authorities.length);
  view.setUint16(10, additionals.length);
  let at = HEADER;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

function record(owner: number, type: number, data: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(12 + data.length);
  const view = viewOf(bytes);
  view.setUint16(0, 0xc000 | owner);
  view.setUint16(2, type);
  view.setUint16(4, 1);
  view.setUint32(6, TTL_SECONDS);
  view.setUint16(10, data.length);
  bytes.set(data, 12);
  return bytes;
}

/** Who sent OPT gets one back (RFC 6891, 6.1.1); without it systemd-resolved takes us for a server of the nineties. */
function optRecord(dnssecOk: boolean, rcodeHigh: number): Uint8Array {
  const bytes = new Uint8Array(11);
  const view = viewOf(bytes);
  view.setUint16(1, TYPE.OPT);
  view.setUint16(3, OWN_UDP_BYTES);
  view.setUint8(5, rcodeHigh);
  view.setUint16(7, dnssecOk ? DNSSEC_OK : 0);
  return bytes;
}

function encodeName(name: string): Uint8Array {
  const bytes: number[] = [];
  for (const label of name.split(".")) {
    if (label === "") continue;
    const raw = Buffer.from(label, "latin1").subarray(0, 63);
    bytes.push(raw.length, ...raw);
  }
  return Uint8Array.from([...bytes, 0]);
}

/** Server and mailbox that nobody has (RFC 6761), then serial, refresh, retry, expire and the seconds to keep it. */
const SOA_DATA = Uint8Array.from(
  Buffer.concat([
    encodeName("vmmesh.invalid"),
    encodeName("nobody.invalid"),
    ...[1, TTL_SECONDS, TTL_SECONDS, TTL_SECONDS, TTL_SECONDS].map((value) => {
      const bytes = Buffer.alloc(4);
      bytes.writeUInt32BE(value);
      return bytes;
    }),
  ]),
);

/** BADVERS: the asker speaks an EDNS that we do not know, the answer says which we know (RFC 6891, 6.1.3). */
export function writeBadVersion(query: Query): Uint8Array {
  const opt = optRecord(query.edns?.dnssecOk ?? false, BADVERS_HIGH);
  return message(query.id, QR | RA | (query.flags & (RD | CD)), {
    question: query.questionBytes,
    additionals: [opt],
  });
}

/** A resolver's reply as it is if it fits into `limit` bytes, else its header and question with TC set: ask again by TCP. */
export function fitted(reply: Uint8Array, query: Query, limit: number): Uint8Array {
  if (reply.length <= limit) return reply;
  return message(query.id, viewOf(reply).getUint16(2) | TC, { question: query.questionBytes });
}

/** The response code of a message with a whole header, without the bits that an OPT record may add. */
export function rcodeOf(message: Uint8Array): number {
  return viewOf(message).getUint16(2) & 0xf;
}

/** The query's header and question with an error code and nothing else. */
export function writeError(query: Uint8Array, rcode: number): Uint8Array {
  const read = readQuery(query);
  const question = typeof read === "object" ? read.questionBytes : new Uint8Array();
  const flags = viewOf(query).getUint16(2) & (OPCODE | RD | CD);
  return message(idOf(query), QR | RA | flags | rcode, { question });
}

/** A query for one name. */
export function writeQuery(
  id: number,
  name: string,
  type: number,
  desired: "recursion" | "no-recursion" = "no-recursion",
): Uint8Array {
  const encoded = encodeName(name);
  const question = new Uint8Array(encoded.length + 4);
  question.set(encoded);
  viewOf(question).setUint16(encoded.length, type);
  viewOf(question).setUint16(encoded.length + 2, 1);
  return message(id, desired === "recursion" ? RD : 0, { question });
}

/** The same message under another id. */
export function withId(message: Uint8Array, id: number): Uint8Array {
  const copy = Uint8Array.from(message);
  viewOf(copy).setUint16(0, id);
  return copy;
}

/** The id of a message of at least two bytes. */
export function idOf(message: Uint8Array): number {
  return viewOf(message).getUint16(0);
}

/**
 * Whether `reply` answers exactly `sent`: same id, marked as a reply, same question in any spelling. A reply without
 * question is believed only when it reports an error, as servers that could not read the query do.
 */
export function isReplyTo(reply: Uint8Array, sent: Uint8Array): boolean {
  if (reply.length < HEADER || sent.length < HEADER) return false;
  const [got, asked] = [viewOf(reply), viewOf(sent)];
  if (got.getUint16(0) !== asked.getUint16(0) || (got.getUint16(2) & QR) === 0) return false;
  if (got.getUint16(4) === 0) return rcodeOf(reply) !== 0 || asked.getUint16(4) === 0;
  const name = readName(sent, HEADER);
  // Not a form that we can read (a foreign operation): id and source have to do.
  if (name === undefined) return true;
  const end = name.end + 4;
  if (reply.length < end) return false;
  const echoed = readName(reply, HEADER);
  return (
    echoed?.end === name.end &&
    echoed.text === name.text &&
    Buffer.compare(reply.subarray(name.end, end), sent.subarray(name.end, end)) === 0
  );
}

/** A message as TCP carries it: its length in two bytes, then itself (RFC 1035, 4.2.2). */
export function frame(message: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(2 + message.length);
  viewOf(bytes).setUint16(0, message.length);
  bytes.set(message, 2);
  return bytes;
}

/** Cuts a TCP byte stream into messages. Holds at most one unfinished message: 64 KiB and two bytes. */
export class Deframer {
  #rest: Buffer = Buffer.alloc(0);

  /** The messages that `chunk` completes. */
  push(chunk: Uint8Array): Uint8Array[] {
    let bytes = this.#rest.length === 0 ? Buffer.from(chunk) : Buffer.concat([this.#rest, chunk]);
    const messages: Uint8Array[] = [];
    while (bytes.length >= 2 && bytes.length >= 2 + bytes.readUInt16BE(0)) {
      const end = 2 + bytes.readUInt16BE(0);
      messages.push(bytes.subarray(2, end));
      bytes = bytes.subarray(end);
    }
    this.#rest = bytes;
    return messages;
  }
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
