import { decode, encode } from "dns-packet";
import {
  Deframer,
  frame,
  isReplyTo,
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
  covers: /\/agent\/dns\/|node_modules\/dns-packet\//,
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
    const theirs = unlessRefused(
      () => decode(Buffer.from(bytes)),
      () => true,
    )?.questions?.[0];
    // dns-packet reads names as UTF-8 and knows a label that holds a dot no more.
    if (theirs !== undefined && /^[\x21-\x7e]*$/.test(theirs.name) && !read.question.name.includes("\\"))
      if (`${theirs.name.toLowerCase().replace(/^\.$/, "")}.` !== read.question.name)
        throw new Error(`dns-packet reads ${theirs.name}, we ${read.question.name}`);
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
