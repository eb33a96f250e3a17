import { decode, encode } from "dns-packet";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { LEASE_NAME } from "./answer.ts";
import {
  Deframer,
  fitted,
  frame,
  isReplyTo,
  type Query,
  readQuery,
  replyLimit,
  withId,
  writeAnswer,
  writeBadVersion,
  writeError,
  writeQuery,
} from "./wire.ts";

const question = (name: string, more: object = {}): Buffer =>
  encode({ type: "query", id: 7, flags: 0x100, questions: [{ type: "A", name }], ...more });

function read(bytes: Uint8Array): Query {
  const query = readQuery(bytes);
  if (typeof query === "string") throw new Error(`not a query: ${query}`);
  return query;
}

describe("readQuery", () => {
  test("name in lower case, type, class, id", () => {
    const query = read(question("WWW.Example.com"));
    expect(query.id).toBe(7);
    expect(query.question).toEqual({ name: "www.example.com.", type: 1, class: 1 });
    expect(query.edns).toBeUndefined();
  });
  test("EDNS size and DO bit", () => {
    const opt = { type: "OPT", name: ".", udpPayloadSize: 1232, flags: 0x8000, options: [] };
    expect(read(question("a.b", { additionals: [opt] })).edns).toEqual({
      version: 0,
      udpBytes: 1232,
      dnssecOk: true,
    });
  });
  test("EDNS behind other records, with their names compressed", () => {
    const additionals = [
      { type: "A", name: "a.b", data: "10.0.0.1" },
      { type: "OPT", name: ".", udpPayloadSize: 4096, flags: 0, options: [] },
    ];
    const bytes = question("a.b", { additionals });
    expect(read(bytes).edns).toEqual({ version: 0, udpBytes: 4096, dnssecOk: false });
    // The first record's name as a pointer to the question's.
    const [asked, rest] = [bytes.subarray(0, 21), bytes.subarray(21 + 5)];
    const compressed = Buffer.concat([asked, Buffer.from([0xc0, 12]), rest]);
    expect(read(compressed).edns).toEqual({ version: 0, udpBytes: 4096, dnssecOk: false });
  });
  test.for([
    { name: "counts of 60,000 records in 38 bytes", tail: Buffer.alloc(17) },
    { name: "a name that leads past the end", tail: Buffer.from([0x3f, 0x61]) },
    { name: "a record that leads past the end", tail: Buffer.from("000001000100000000ffff", "hex") },
  ])("$name is a query without EDNS", ({ tail }) => {
    const bytes = Buffer.concat([question("a.b"), tail]);
    bytes.writeUInt16BE(0x2904, 8);
    bytes.writeUInt16BE(0xd000, 10);
    expect(read(bytes).edns).toBeUndefined();
  });
  test("a dot inside a label matches no name of ours", () => {
    const bytes = writeQuery(1, "aXb.c", 1);
    bytes[14] = 0x2e;
    expect(read(bytes).question.name).toBe("a\\.b.c.");
  });
  test.for([
    { name: "too short", bytes: new Uint8Array(11), want: "ignore" },
    { name: "a reply", bytes: encode({ type: "response", id: 1 }), want: "ignore" },
    { name: "no question", bytes: encode({ type: "query", id: 1 }), want: "no-question" },
    { name: "an update", bytes: encode({ type: "query", id: 1, flags: 5 << 11 }), want: "foreign" },
    {
      name: "two questions",
      bytes: encode({
        type: "query",
        id: 1,
        questions: ["a.test", "b.test"].map((name) => ({ type: "A" as const, name })),
      }),
      want: "malformed",
    },
    { name: "cut in the name", bytes: question("example.com").subarray(0, 20), want: "malformed" },
    {
      name: "a name that points to itself",
      bytes: Buffer.from("000100000001000000000000c00c00010001", "hex"),
      want: "malformed",
    },
  ])("$name → $want", ({ bytes, want }) => {
    expect(readQuery(bytes)).toBe(want);
  });
});

describe("writeAnswer, read back by dns-packet", () => {
  test("addresses with the question as owner", () => {
    const query = read(question("Api.Example.com"));
    const packet = decode(Buffer.from(writeAnswer(query, { addresses: ["10.0.0.1", "10.0.0.2"] }, 512)));
    expect(packet).toMatchObject({
      id: 7,
      type: "response",
      rcode: "NOERROR",
      flag_aa: true,
      flag_rd: true,
      flag_tc: false,
    });
    expect(packet.questions).toEqual([{ name: "Api.Example.com", type: "A", class: "IN" }]);
    expect(packet.answers).toMatchObject([
      { name: "Api.Example.com", type: "A", ttl: 30, data: "10.0.0.1" },
      { name: "Api.Example.com", type: "A", ttl: 30, data: "10.0.0.2" },
    ]);
  });
  test("an alias: CNAME first, then the addresses of its target", () => {
    const query = read(question("api.corp.test"));
    const packet = decode(Buffer.from(writeAnswer(query, { alias: "api.", addresses: ["fd00::1"] }, 512)));
    expect(packet.answers).toMatchObject([
      { name: "api.corp.test", type: "CNAME", data: "api" },
      { name: "api", type: "AAAA", data: "fd00::1" },
    ]);
  });
  test("what does not fit is left out and TC says so; EDNS and TCP take more", () => {
    const addresses = Array.from({ length: 100 }, (_, index) => `10.0.0.${index}`);
    const plain = read(question("many.test"));
    const cut = writeAnswer(plain, { addresses }, replyLimit(plain, "udp"));
    expect(cut.length).toBeLessThanOrEqual(512);
    expect(decode(Buffer.from(cut)).flag_tc).toBe(true);
    expect(
      decode(Buffer.from(writeAnswer(plain, { addresses }, replyLimit(plain, "tcp")))).answers,
    ).toHaveLength(100);
    const opt = { type: "OPT", name: ".", udpPayloadSize: 4096, flags: 0, options: [] };
    const edns = read(question("many.test", { additionals: [opt] }));
    const whole = decode(Buffer.from(writeAnswer(edns, { addresses }, replyLimit(edns, "udp"))));
    expect(whole.answers).toHaveLength(100);
    expect(whole.additionals).toMatchObject([{ type: "OPT", udpPayloadSize: 1232 }]);
  });
  test("an EDNS size below 512 counts as 512", () => {
    const opt = { type: "OPT", name: ".", udpPayloadSize: 20, flags: 0, options: [] };
    expect(replyLimit(read(question("a.test", { additionals: [opt] })), "udp")).toBe(512);
  });
  test.for([{}, { alias: "api." }])("no address: an SOA says how long that may be kept (%j)", (more) => {
    const packet = decode(
      Buffer.from(writeAnswer(read(question("api.corp.test")), { ...more, addresses: [] }, 512)),
    );
    expect(packet.answers).toHaveLength("alias" in more ? 1 : 0);
    expect(packet.authorities).toMatchObject([
      { type: "SOA", name: "alias" in more ? "api" : "api.corp.test", ttl: 30, data: { minimum: 30 } },
    ]);
  });
  test("an EDNS that we do not know: BADVERS with the version that we know", () => {
    const opt = { type: "OPT", name: ".", ednsVersion: 1, udpPayloadSize: 1232, flags: 0, options: [] };
    const packet = decode(Buffer.from(writeBadVersion(read(question("a.test", { additionals: [opt] })))));
    expect(packet).toMatchObject({
      rcode: "NOERROR",
      questions: [{ name: "a.test" }],
      additionals: [{ type: "OPT", extendedRcode: 1, ednsVersion: 0 }],
    });
  });
  test("a resolver's reply that the asker cannot take becomes its question with TC", () => {
    const query = read(question("Many.test"));
    const reply = encode({
      type: "response",
      id: 7,
      flags: 0x180,
      questions: [{ type: "A", name: "Many.test" }],
      answers: Array.from({ length: 40 }, () => ({ type: "A", name: "Many.test", data: "10.0.0.1" })),
    });
    expect(fitted(reply, query, reply.length)).toBe(reply);
    expect(decode(Buffer.from(fitted(reply, query, 512)))).toMatchObject({
      id: 7,
      flag_tc: true,
      flag_ra: true,
      rcode: "NOERROR",
      questions: [{ name: "Many.test" }],
      answers: [],
    });
  });
  test("an error keeps id and question", () => {
    expect(decode(Buffer.from(writeError(question("a.test"), 2)))).toMatchObject({
      id: 7,
      rcode: "SERVFAIL",
      questions: [{ name: "a.test" }],
    });
  });
});

describe("isReplyTo", () => {
  const sent = question("a.test");
  const reply = encode({ type: "response", id: 7, questions: [{ type: "A", name: "A.TEST" }] });
  test.for([
    { name: "same id and question in another spelling", bytes: reply, want: true },
    { name: "another id", bytes: Buffer.from(withId(reply, 8)), want: false },
    {
      name: "another question",
      bytes: encode({ type: "response", id: 7, questions: [{ type: "A", name: "b.test" }] }),
      want: false,
    },
    {
      name: "another type",
      bytes: encode({ type: "response", id: 7, questions: [{ type: "AAAA", name: "a.test" }] }),
      want: false,
    },
    { name: "our own query come back", bytes: sent, want: false },
    { name: "an error without question", bytes: encode({ type: "response", id: 7, flags: 1 }), want: true },
    { name: "a success without question", bytes: encode({ type: "response", id: 7 }), want: false },
  ])("$name: $want", ({ bytes, want }) => {
    expect(isReplyTo(bytes, sent)).toBe(want);
  });
});

describe("random bytes", () => {
  const wild = fc.oneof(
    fc.uint8Array({ maxLength: 600 }),
    // A valid beginning reaches deeper.
    fc
      .uint8Array({ maxLength: 64 })
      .map((tail) => Uint8Array.from([...writeQuery(3, LEASE_NAME, 1), ...tail])),
    fc
      .tuple(fc.uint8Array({ minLength: 4, maxLength: 60 }), fc.nat(3))
      .map(([name, more]) => Uint8Array.from([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, more, ...name])),
  );
  test("never throw, never hang, and an error reply is always readable", () => {
    fc.assert(
      fc.property(wild, (bytes) => {
        const query = readQuery(bytes);
        if (query === "ignore") return;
        expect(() => decode(Buffer.from(writeError(bytes, 2)))).not.toThrow();
        if (typeof query === "object") {
          const limit = replyLimit(query, "udp");
          const reply = writeAnswer(query, { addresses: ["10.0.0.1"] }, limit);
          expect(reply.length).toBeLessThanOrEqual(limit);
          expect(isReplyTo(reply, bytes)).toBe(true);
        }
        isReplyTo(bytes, bytes);
      }),
      { numRuns: 3000 },
    );
  });
  test("framing gives back every message however the stream is cut", () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 300 }), { maxLength: 8 }),
        fc.integer({ min: 1, max: 50 }),
        (messages, cut) => {
          const stream = Buffer.concat(messages.map(frame));
          const deframer = new Deframer();
          const got: Uint8Array[] = [];
          for (let at = 0; at < stream.length; at += cut)
            got.push(...deframer.push(stream.subarray(at, at + cut)));
          expect(got.map((it) => [...it])).toEqual(messages.map((it) => [...it]));
        },
      ),
    );
  });
});
