import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { ERROR_CODES } from "../core/errors.ts";
import { VERSION } from "../core/version.ts";
import { COMMANDS } from "./commands.ts";
import { EXIT_STATUSES, manPage } from "./man.ts";
import { helpOf, parse } from "./parse.ts";

async function failure(argv: string[]): Promise<{ code: string; message: string; next: string }> {
  return (await parse(argv).then(
    () => ({ code: "none", message: "", next: "" }),
    (thrown: unknown) => thrown,
  )) as { code: string; message: string; next: string };
}

describe("the command line", () => {
  test("options come with their defaults", async () => {
    const parsed = await parse([
      "join",
      "--namespace",
      "default",
      "--port",
      "http:9080",
      "--port",
      "tcp:3306,grpc:7070",
    ]);
    if (!("command" in parsed)) throw new Error("no command");
    expect(parsed.command.words).toBe("join");
    expect(parsed.options).toMatchObject({
      namespace: "default",
      port: ["http:9080", "tcp:3306", "grpc:7070"],
      "confirm-within": 30,
      output: "text",
      root: "/",
    });
  });

  test.for([
    {
      name: "an unknown command lists the known ones",
      argv: ["jion"],
      says: "there is no command `vmmesh jion`",
    },
    {
      name: "half of a command is no command",
      argv: ["iptables"],
      says: "there is no command `vmmesh iptables`",
    },
    { name: "an unknown option is named", argv: ["join", "--namspace", "x"], says: "namspace" },
    { name: "a word too many is named", argv: ["leave", "now"], says: "now" },
    { name: "an option without its value", argv: ["join", "--namespace"], says: "namespace" },
    {
      name: "a number that is none",
      argv: ["join", "--confirm-within", "soon"],
      says: "--confirm-within takes a number, not `soon`",
    },
    { name: "a value outside the choices", argv: ["status", "--output", "xml"], says: "xml" },
    {
      name: "an option given twice",
      argv: ["join", "--namespace", "a", "--namespace", "b"],
      says: "--namespace was given 2 times",
    },
    { name: "a required option that is missing", argv: ["bundle", "create"], says: "o" },
  ])("$name", async ({ argv, says }) => {
    const error = await failure(argv);
    expect(error.code).toBe("USAGE");
    expect(error.message).toContain(says);
    expect(error.next).not.toBe("");
  });

  test.for([
    { argv: ["--compat", "istio", "-p", "15001", "-b", "*"], words: ["-p", "15001", "-b", "*"] },
    { argv: ["--family", "ipv6", "--compat=istio", "-np1"], words: ["--family", "ipv6", "-np1"] },
    { argv: ["--compat", "istio"], words: [] },
    { argv: ["--rules"], words: undefined },
  ])("$argv of `iptables plan` leave $words to the peer's rules", async ({ argv, words }) => {
    const parsed = await parse(["iptables", "plan", ...argv]);
    if (!("command" in parsed)) throw new Error("no command");
    expect(parsed.options["words"]).toEqual(words);
    expect(parsed.options["compat"]).toBe(words === undefined ? undefined : "istio");
  });

  test("another program's name after --compat is refused", async () => {
    const error = await failure(["iptables", "plan", "--compat", "kuma", "-p1"]);
    expect(error.code).toBe("USAGE");
    expect(error.message).toContain("kuma");
  });

  test.for([[], ["--help"], ["help"], ["-h"]])("%j prints the overview", async (argv) => {
    const parsed = await parse(argv);
    expect("print" in parsed && parsed.print).toContain("vmmesh join");
  });

  test("every command has a help text that names each option", () => {
    for (const command of COMMANDS)
      for (const option of command.options) expect(helpOf(command)).toContain(option.name);
  });
});

describe("the documents say what the program does", () => {
  test("vmmesh(1) is the one made from the command table (npm run gen)", () => {
    expect(readFileSync("packaging/man/vmmesh.1", "utf8")).toBe(manPage(VERSION));
  });

  test("README names every error code, and none that does not exist", () => {
    const readme = readFileSync("README.md", "utf8");
    const named = new Set(
      [...readme.matchAll(/`([A-Z][A-Z]+(?:_[A-Z]+)+|INTERNAL|USAGE|BUSY)`/g)].map(([, code]) => code),
    );
    expect(Object.keys(ERROR_CODES).filter((code) => !named.has(code))).toEqual([]);
  });

  test("every exit status of an error code has its meaning", () => {
    const known = EXIT_STATUSES.map(([status]) => status);
    expect(Object.values(ERROR_CODES).filter((status) => !known.includes(status))).toEqual([]);
  });

  test("one version", () => {
    expect((JSON.parse(readFileSync("package.json", "utf8")) as { version: string }).version).toBe(VERSION);
  });
});
