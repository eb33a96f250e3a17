import { describe, expect, test } from "vitest";
import { asksForClear, clearAfter } from "./marks.ts";
import { parseRules } from "./parse.ts";

const clearAfterAll = (...lines: string[]): number =>
  parseRules(lines.map((line) => `-A OUTPUT ${line}`).join("\n")).reduce(
    (clear, rule) => clearAfter(rule, clear),
    0,
  );
const asks = (line: string, clear: number): boolean =>
  parseRules(`-A OUTPUT ${line}`).every((rule) => asksForClear(rule, clear));

describe("bits of the mark that are certainly 0", () => {
  test.for([
    { name: "of a packet as it comes: none", lines: [], clear: 0 },
    { name: "cleared for every packet", lines: ["-j MARK --set-xmark 0x0/0xf0000"], clear: 0xf0000 },
    {
      name: "cleared for every packet, with a comment",
      lines: ['-m comment --comment "cali:x" -j MARK --set-xmark 0x0/0xf0000'],
      clear: 0xf0000,
    },
    { name: "cleared for some packets", lines: ["-i eth0 -j MARK --set-xmark 0x0/0xf0000"], clear: 0 },
    {
      name: "set again for some packets",
      lines: ["-j MARK --set-xmark 0x0/0xf0000", "-i cali+ -j MARK --set-xmark 0x40000/0x40000"],
      clear: 0xb0000,
    },
    {
      name: "set whole, so that all other bits are 0",
      lines: ["-j MARK --set-xmark 0x1"],
      clear: 0xfffffffe,
    },
    {
      name: "flipped outside of the mask",
      lines: ["-j MARK --set-xmark 0x0/0x3", "-j MARK --set-xmark 0x1/0x0"],
      clear: 0x2,
    },
    {
      name: "taken from the connection",
      lines: [
        "-j MARK --set-xmark 0x0",
        "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
      ],
      clear: 0,
    },
    {
      name: "of a rule that cannot be read",
      lines: ["-j MARK --set-xmark 0x0", "-j MARK --new 1"],
      clear: 0,
    },
  ])("$name", ({ lines, clear }) => {
    expect(clearAfterAll(...lines)).toBe(clear);
  });
});

describe("a rule asks for a bit that is certainly 0", () => {
  test.for([
    { line: "-m mark --mark 0x10000/0x10000 -j ACCEPT", asks: true },
    { line: "-m mark --mark 0x10001/0x10001 -j ACCEPT", asks: true },
    { line: "-m mark --mark 0x100000/0x100000 -j ACCEPT", asks: false },
    { line: "-m mark ! --mark 0x10000/0x10000 -j ACCEPT", asks: false },
    { line: "-m mark --mark 0x0/0x10000 -j ACCEPT", asks: false },
    { line: "-m mark --mark odd -j ACCEPT", asks: false },
    { line: "-m connmark --mark 0x10000/0x10000 -j ACCEPT", asks: false },
    { line: "-p udp -j ACCEPT", asks: false },
  ])("$line: $asks", ({ line, asks: expected }) => {
    expect(asks(line, 0xf0000)).toBe(expected);
  });
});
