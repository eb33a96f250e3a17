import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { journalSink, Logger, type LogLine, openLog, renderLine, stderrIsJournal } from "./log.ts";
import { redact } from "./redact.ts";

const NOW = new Date("2026-11-23T02:00:00Z");
const PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQ\nabc==\n-----END EC PRIVATE KEY-----";
const JWT = "eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJpc3Rpby1jYSJ9.c2lnbmF0dXJl-_x";

describe("redact", () => {
  test.for([
    { name: "a private key", text: `key ${PEM} end`, want: "key <private key removed> end" },
    { name: "a private key without its end", text: PEM.slice(0, 45), want: "<private key removed>" },
    { name: "a token", text: `token=${JWT}, next`, want: "token=<token removed>, next" },
    { name: "a token cut after its header", text: JWT.slice(0, 20), want: "<token removed>" },
    {
      name: "a bearer credential of any kind",
      text: "Authorization: Bearer abc.def/123==",
      want: "Authorization: Bearer <token removed>",
    },
    { name: "a bearer web token", text: `bearer ${JWT}`, want: "bearer <token removed>" },
    {
      name: "certificates are no secret",
      text: "-----BEGIN CERTIFICATE-----",
      want: "-----BEGIN CERTIFICATE-----",
    },
  ])("$name", ({ text, want }) => {
    expect(redact(text)).toBe(want);
  });
  test("no part of a token survives, wherever it stands", () => {
    fc.assert(
      fc.property(fc.string(), fc.string(), (before, after) => {
        expect(redact(`${before} ${JWT} ${after}`)).not.toContain("c2lnbmF0dXJl");
      }),
    );
  });
});

describe("Logger", () => {
  const collect = (): { lines: LogLine[]; log: Logger } => {
    const lines: LogLine[] = [];
    return { lines, log: new Logger((line) => lines.push(line), "info") };
  };
  test("drops what is below the threshold and undefined fields", () => {
    const { lines, log } = collect();
    log.debug("no");
    log.child("xds").info("yes", { a: 1, b: undefined });
    expect(lines).toEqual([{ level: "info", task: "xds", message: "yes", fields: { a: 1 } }]);
  });
  test("takes secrets out of message and fields", () => {
    const { lines, log } = collect();
    log.error(`bad ${JWT}`, { answer: PEM });
    expect(JSON.stringify(lines)).not.toMatch(/eyJ|MHcCAQ/);
  });
});

describe("renderLine", () => {
  const line: LogLine = {
    level: "warning",
    task: "dns",
    message: "silent\nserver",
    fields: { server: "10.0.0.2", why: 'a "b"', ms: 3 },
  };
  test.for([
    { format: "journal" as const, want: '<4>silent ⏎ server task=dns server=10.0.0.2 why="a \\"b\\"" ms=3' },
    {
      format: "terminal" as const,
      want: '2026-11-23T02:00:00.000Z warning silent ⏎ server task=dns server=10.0.0.2 why="a \\"b\\"" ms=3',
    },
    {
      format: "json" as const,
      want: '{"task":"dns","server":"10.0.0.2","why":"a \\"b\\"","ms":3,"time":"2026-11-23T02:00:00.000Z","level":"warning","message":"silent\\nserver"}',
    },
  ])("$format", ({ format, want }) => {
    expect(renderLine(line, format, NOW)).toBe(want);
  });
  test("is one line, whatever it says", () => {
    fc.assert(
      fc.property(fc.string({ unit: "binary" }), fc.string({ unit: "binary" }), (message, value) => {
        for (const format of ["journal", "terminal", "json"] as const) {
          expect(
            renderLine({ level: "info", task: undefined, message, fields: { value } }, format, NOW),
          ).not.toMatch(/[\r\n]/);
        }
      }),
    );
  });
});

describe("the journal", () => {
  test.for([
    { name: "stderr is the named stream", stream: "8:4711", link: "socket:[4711]", want: true },
    { name: "stderr was redirected since", stream: "8:4711", link: "/tmp/out", want: false },
    { name: "not started by systemd", stream: undefined, link: "socket:[4711]", want: false },
  ])("$name: $want", async ({ stream, link, want }) => {
    expect(await stderrIsJournal({ readLink: async () => link }, stream)).toBe(want);
  });
  test("fields get names of their own", () => {
    const sent: unknown[] = [];
    journalSink((...args) => sent.push(args))({
      level: "error",
      task: "xds",
      message: "m",
      fields: { code: "CLOCK_OFF", waitMs: 3 },
    });
    expect(sent).toEqual([
      ["err", "m", { VMMESH_TASK: "xds", VMMESH_CODE: "CLOCK_OFF", VMMESH_WAIT_MS: "3" }],
    ]);
  });
  test("openLog writes the journal's form when the native package is absent", async () => {
    const out: string[] = [];
    const host = { files: { readLink: async () => "socket:[1]" }, clock: { now: () => NOW } };
    const log = await openLog(
      host as never,
      { level: "info", format: "auto", journalStream: "8:1" },
      (text) => out.push(text),
      async () => undefined,
    );
    log.info("up");
    expect(out).toEqual(["<6>up\n"]);
  });
});
