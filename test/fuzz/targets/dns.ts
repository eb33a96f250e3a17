import { decode, encode } from "dns-packet";
import {
  Deframer,
  frame,
  isReplyTo,
  type Query,
  readQuery,
  replyLimit,
  withId,
  writeAnswer,
  writeError,
} from "../../../agent/dns/wire.ts";
import { type Target, unlessRefused } from "../target.ts";

const question = (name: string, type: "A" | "AAAA" | "TXT") => ({ name, type, class: "IN" as const });
const query = { type: "query" as const, id: 7, flags: 0x100 };
const addresses = Array.from({ length: 60 }, (_, at) => `10.0.0.${at}`);

export const target: Target = {
  about:
    "a DNS message is passed over, or its answer fits the asker, is its answer and says so to dns-packet too",
  seeds: [
    encode({ ...query, questions: [question("a.b.example.com", "A")] }),
    encode({
      ...query,
      questions: [question("x", "AAAA")],
      additionals: [
        {
          type: "OPT",
          name: ".",
          udpPayloadSize: 1232,
          extendedRcode: 0,
          ednsVersion: 0,
          flags: 0x8000,
          flag_do: true,
          options: [],
        },
      ],
    }),
    encode({
      ...query,
      type: "response",
      questions: [question("x", "A")],
      answers: [{ type: "A", name: "x", data: "10.0.0.1" }],
    }),
    encode({ ...query, questions: [] }),
  ],
  run(bytes) {
    frames(bytes);
    const read = readQuery(bytes);
    if (read === "ignore") return;
    const error = writeError(bytes, 2);
    if (!isReplyTo(error, bytes)) throw new Error("the error is no reply to it");
    if (typeof read === "string") return;
    againstDnsPacket(bytes, read);
    for (const protocol of ["udp", "tcp"] as const) {
      const limit = replyLimit(read, protocol);
      for (const answer of [{ addresses }, { addresses: ["::1"], alias: "b.example.com." }]) {
        const reply = writeAnswer(read, answer, limit);
        if (reply.length > limit) throw new Error(`${reply.length} bytes are more than ${limit}`);
        if (!isReplyTo(reply, bytes)) throw new Error("the answer is no reply to it");
        if (isReplyTo(withId(reply, (read.id + 1) & 0xffff), bytes))
          throw new Error("a reply of another id is taken");
        const { answers, flag_tc } = decode(Buffer.from(reply));
        const all = answer.addresses.length + Number("alias" in answer);
        if (flag_tc ? (answers?.length ?? 0) >= all : answers?.length !== all)
          throw new Error(`${answers?.length} of ${all} records, truncated: ${flag_tc}`);
      }
    }
  },
};

/** What dns-packet reads in its own way is left out: more records than there are bytes for, names that are no ASCII or hold a dot. */
function againstDnsPacket(bytes: Uint8Array, read: Query): void {
  const counts = [4, 6, 8, 10].map((at) => Buffer.from(bytes).readUInt16BE(at));
  if (counts.some((count) => count > 5) || read.question.name.includes("\\")) return;
  const theirs = unlessRefused(
    () => decode(Buffer.from(bytes)),
    () => true,
  );
  const name = theirs?.questions?.[0]?.name;
  if (theirs === undefined || name === undefined || !/^[\x21-\x7e]*$/.test(name)) return;
  if (`${name.toLowerCase().replace(/^\.$/, "")}.` !== read.question.name)
    throw new Error(`dns-packet reads ${name}, we ${read.question.name}`);
  const opt = theirs.additionals?.find((record) => record.type === "OPT");
  if (counts[0] === 1 && opt?.type === "OPT" && opt.udpPayloadSize !== read.edns?.udpBytes)
    throw new Error(`dns-packet reads a size of ${opt.udpPayloadSize}, we ${read.edns?.udpBytes}`);
}

/** Cut anywhere, a stream gives the same messages. */
function frames(bytes: Uint8Array): void {
  const whole = new Deframer().push(bytes);
  const deframer = new Deframer();
  const middle = bytes.length >> 1;
  const parts = [...deframer.push(bytes.subarray(0, middle)), ...deframer.push(bytes.subarray(middle))];
  if (Buffer.compare(Buffer.concat(whole), Buffer.concat(parts)) !== 0 || whole.length !== parts.length)
    throw new Error("where a stream is cut changes its messages");
  const sent = Buffer.concat(whole.map(frame));
  if (Buffer.compare(sent, bytes.subarray(0, sent.length)) !== 0) throw new Error("framing is no inverse");
}
