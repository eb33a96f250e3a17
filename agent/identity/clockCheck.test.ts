import { expect, test } from "vitest";
import { DAY_MS, HOUR_MS, MINUTE_MS } from "../core/time.ts";
import { Conditions } from "../health/conditions.ts";
import { ClockCheck } from "./clockCheck.ts";
import { BACKDATED_MS } from "./renew.ts";

const NOON_MS = Date.UTC(2026, 0, 1, 12);

/** A machine that knows the mesh's time, and what has happened since. */
function machine() {
  const at = { wallMs: NOON_MS, monotonicMs: 5000, meshMs: NOON_MS };
  const clock = { now: () => new Date(at.wallMs), monotonicMs: () => at.monotonicMs };
  const conditions = new Conditions(clock.now);
  const check = new ClockCheck(clock, conditions);
  return {
    at,
    check,
    /** The CA signs by its own clock. */
    sign: () => check.signed(new Date(at.meshMs - BACKDATED_MS)),
    pass: (ms: number, { asleep = false } = {}) => {
      at.wallMs += ms;
      at.meshMs += ms;
      if (!asleep) at.monotonicMs += ms;
    },
    said: () => conditions.list().map(({ id, message }) => `${id}: ${message}`),
  };
}

const AHEAD =
  "clock-wrong: this machine's clock is 1d ahead of the mesh's: to it, certificates that are valid have ended";
const BEHIND =
  "clock-wrong: this machine's clock is 1d behind the mesh's: to it, certificates that are valid are not valid yet";

test.for([
  { what: "right", setMs: 0, asks: false, seen: [], signed: [] },
  { what: "9 minutes ahead", setMs: 9 * MINUTE_MS, asks: false, seen: [], signed: [] },
  { what: "9 minutes behind", setMs: -9 * MINUTE_MS, asks: false, seen: [], signed: [] },
  { what: "a day ahead, which a sleep could be", setMs: DAY_MS, asks: true, seen: [], signed: [AHEAD] },
  { what: "a day behind, which no sleep is", setMs: -DAY_MS, asks: false, seen: [BEHIND], signed: [BEHIND] },
])("a clock that is set while the agent runs, $what", ({ setMs, asks, seen, signed }) => {
  const { at, check, sign, pass, said } = machine();
  sign();
  pass(HOUR_MS);
  at.wallMs += setMs;
  expect(check.look(undefined)).toBe(asks);
  expect(said()).toEqual(seen);
  sign();
  expect(said()).toEqual(signed);
  pass(HOUR_MS);
  expect(check.look(undefined)).toBe(false);
  expect(said()).toEqual(signed);
  at.wallMs -= setMs;
  expect(check.look(undefined)).toBe(false);
  expect(said()).toEqual([]);
});

test("a machine that slept a day asks the CA and says nothing", () => {
  const { check, sign, pass, said } = machine();
  sign();
  pass(DAY_MS, { asleep: true });
  expect(check.look(undefined)).toBe(true);
  sign();
  expect(check.look(undefined)).toBe(false);
  expect(said()).toEqual([]);
});

test.for([
  { what: "a day after the certificate began", sinceMs: DAY_MS, says: [] },
  { what: "5 minutes before it began", sinceMs: -5 * MINUTE_MS, says: [] },
  { what: "a day before it began", sinceMs: -DAY_MS, says: [BEHIND] },
])("before the CA has said anything, the certificate on disk tells: $what", ({ sinceMs, says }) => {
  const { check, said } = machine();
  expect(check.look(new Date(NOON_MS - BACKDATED_MS - sinceMs))).toBe(false);
  expect(said()).toEqual(says);
});

test("a clock that is wrong both ways one after the other is told anew each time", () => {
  const { at, check, sign, said } = machine();
  at.wallMs += DAY_MS;
  sign();
  expect(said()).toEqual([AHEAD]);
  at.wallMs -= 2 * DAY_MS;
  check.look(undefined);
  expect(said()).toEqual([BEHIND]);
});

test("the clocks' little differences do not write the same condition again and again", () => {
  const changes: string[] = [];
  let wallMs = NOON_MS;
  const clock = { now: () => new Date(wallMs), monotonicMs: () => 0 };
  const check = new ClockCheck(clock, new Conditions(clock.now, ({ id }) => changes.push(id)));
  for (const seconds of [0, 50, 100, 150]) {
    wallMs = NOON_MS + seconds * 1000;
    check.signed(new Date(NOON_MS - DAY_MS));
  }
  expect(changes).toEqual(["clock-wrong"]);
});
