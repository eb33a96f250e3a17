import { describe, expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { VmmeshError } from "../core/errors.ts";
import { Conditions } from "../health/conditions.ts";
import { createMetrics } from "../telemetry/metrics.ts";
import type { RelayEvent } from "../xds/relay.ts";
import { RelayNews } from "./relayNews.ts";

const LDS = "type.googleapis.com/envoy.config.listener.v3.Listener";
const refusal = (reason: string) => ({ typeUrl: LDS, reason });
const unreachable = (code: "IDENTITY_REFUSED" | "CLOCK_OFF"): RelayEvent => ({
  kind: "unreachable",
  error: new VmmeshError(code, "it says no", { next: "Do this." }),
  retryInMs: 1000,
});
const notWritten: RelayEvent = {
  kind: "last-good-failed",
  error: new VmmeshError("STATE_UNWRITABLE", "no space"),
};
const savedAt = new Date(0);

function hear(...events: readonly RelayEvent[]) {
  let now = 0;
  const clock = {
    now: () => {
      now += 1000;
      return new Date(now);
    },
  };
  const conditions = new Conditions(clock.now);
  const metrics = createMetrics({ files: new MemoryFiles() }, { version: "0" });
  const log = { debug: () => undefined, info: () => undefined, warning: () => undefined };
  const news = new RelayNews({ clock, metrics, conditions, log });
  for (const event of events) news.take(event);
  return { news, list: conditions.list() };
}

describe("what stands after each story", () => {
  test.for<{ name: string; events: readonly RelayEvent[]; stands: readonly string[] }>([
    {
      name: "a refusal",
      events: [{ kind: "refusals", standing: [refusal("no")] }],
      stands: ["configuration-rejected"],
    },
    {
      name: "a refusal that is over",
      events: [
        { kind: "refusals", standing: [refusal("no")] },
        { kind: "refusals", standing: [] },
      ],
      stands: [],
    },
    { name: "no control plane", events: [unreachable("CLOCK_OFF")], stands: ["control-plane-unreachable"] },
    {
      name: "a control plane that is back",
      events: [unreachable("CLOCK_OFF"), { kind: "connected", address: "10.0.0.1" }],
      stands: [],
    },
    { name: "from disk", events: [{ kind: "restored", savedAt }], stands: ["configuration-stale"] },
    { name: "from disk, then fresh", events: [{ kind: "restored", savedAt }, { kind: "fresh" }], stands: [] },
    {
      name: "from disk, then another node",
      events: [{ kind: "restored", savedAt }, { kind: "node-changed" }],
      stands: [],
    },
    {
      name: "from disk, then ended",
      events: [{ kind: "restored", savedAt }, { kind: "last-good-ended" }],
      stands: [],
    },
    { name: "a disk that is full", events: [notWritten], stands: ["last-good-failed"] },
    { name: "a disk that was full", events: [notWritten, { kind: "last-good-saved" }], stands: [] },
    {
      name: "a file that could not be read, then a control plane",
      events: [notWritten, { kind: "fresh" }],
      stands: [],
    },
    {
      name: "an Envoy that lacks something",
      events: [{ kind: "stripped", names: ["istio.stats"] }],
      stands: ["extensions-stripped"],
    },
    {
      name: "another Envoy that lacks nothing",
      events: [
        { kind: "stripped", names: ["istio.stats"] },
        { kind: "stripped", names: [] },
      ],
      stands: [],
    },
  ])("$name", ({ events, stands }) => {
    expect(hear(...events).list.map(({ id }) => id)).toEqual(stands);
  });
});

test("several refusals: the first in its words, the others as a number", () => {
  const { list } = hear({
    kind: "refusals",
    standing: [refusal("no such filter"), refusal("b"), refusal("c")],
  });
  expect(list[0]?.message).toContain("Listener: no such filter (and 2 more)");
});

test("only who was judged has to prove himself anew", () => {
  expect(hear(unreachable("IDENTITY_REFUSED")).news.identityRefused).toBe(true);
  expect(hear(unreachable("CLOCK_OFF")).news.identityRefused).toBe(false);
  expect(
    hear(unreachable("IDENTITY_REFUSED"), { kind: "connected", address: "a" }).news.identityRefused,
  ).toBe(false);
});

test("the last refusal is told also when it is over; since when nobody is there, only while it is so", () => {
  const { news } = hear(
    { kind: "connected", address: "a" },
    { kind: "rejected", typeUrl: LDS, reason: "no" },
    { kind: "refusals", standing: [] },
  );
  expect(news).toMatchObject({ lastRejection: "Listener: no", reached: 1, lostAt: undefined });
  expect(
    hear({ kind: "connected", address: "a" }, { kind: "disconnected", address: "a", reason: "it went" }).news
      .lostAt,
  ).toBeInstanceOf(Date);
});
