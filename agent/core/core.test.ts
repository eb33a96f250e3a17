import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { backoff } from "./backoff.ts";
import { describeError, VmmeshError } from "./errors.ts";
import { ipFamily, isRoutable, parseCidr, parseHostPort, whyNotCidr } from "./net.ts";
import { Latest } from "./signals.ts";
import { inSlices } from "./slices.ts";
import { formatSpiffe, parseSpiffe } from "./spiffe.ts";
import { supervise } from "./supervise.ts";
import { formatDuration, parseDuration } from "./time.ts";

describe("errors", () => {
  test.for([
    ["EROFS", "read-only"],
    ["ENOSPC", "full"],
  ] as const)("a file that cannot be written (%s) is the machine's fault, with its path", ([code, says]) => {
    const thrown = Object.assign(new Error(`${code}: no`), { code, path: "/var/lib/vmmesh-host/x" });
    expect(VmmeshError.from(thrown)).toMatchObject({
      code: "STATE_UNWRITABLE",
      message: expect.stringMatching(new RegExp(`^/var/lib/vmmesh-host/x cannot be written: .*${says}`)),
      cause: thrown,
    });
  });

  test("name the thing, the reason and the next step, each once", () => {
    const error = new VmmeshError("RULES_REJECTED", "the kernel refused rule `-A NOPE` (line 2)", {
      cause: new Error("iptables-restore: line 2 failed"),
      next: "Run `vmmesh iptables audit`.",
    });
    expect(describeError(error)).toBe(
      [
        "vmmesh: RULES_REJECTED: the kernel refused rule `-A NOPE` (line 2)",
        "  because: iptables-restore: line 2 failed",
        "  next:    Run `vmmesh iptables audit`.",
      ].join("\n"),
    );
    expect(error.exitCode).toBe(7);
  });

  test("anything thrown becomes ours and keeps its words", () => {
    expect(VmmeshError.from("odd").message).toBe("odd");
    expect(VmmeshError.from(new TypeError("x")).code).toBe("INTERNAL");
  });
});

describe("addresses", () => {
  test.for([
    ["10.0.0.1", 4],
    ["010.0.0.1", undefined],
    ["256.0.0.1", undefined],
    ["1.2.3", undefined],
    ["::", 6],
    ["::1", 6],
    ["fe80::1%eth0", undefined],
    ["2001:db8::10.0.0.1", 6],
    ["1:2:3:4:5:6:7:8", 6],
    ["1:2:3:4:5:6:7", undefined],
    ["1::2::3", undefined],
    ["", undefined],
  ] as const)("%s is of family %s", ([text, family]) => {
    expect(ipFamily(text)).toBe(family);
  });

  test.for([
    ["10.0.0.0/8", { family: 4, address: "10.0.0.0", bits: 8 }],
    ["10.0.0.1", { family: 4, address: "10.0.0.1", bits: 32 }],
    ["::1/128", { family: 6, address: "::1", bits: 128 }],
    ["10.0.0.0/33", undefined],
    ["10.0.0.0/8/8", undefined],
    ["*", undefined],
  ] as const)("%s as a prefix", ([text, want]) => {
    expect(parseCidr(text)).toEqual(want);
  });

  test("loopback, link-local and unspecified are nobody's registered address", () => {
    expect(
      ["127.0.0.1", "169.254.1.1", "0.0.0.0", "::", "::1", "fe80::1", "febf::1", "::6"].filter(isRoutable),
    ).toEqual([]);
    expect(["10.0.0.1", "fd00::1", "2001:db8::1"].filter(isRoutable)).toHaveLength(3);
  });

  test("host and port, also of IPv6", () => {
    expect(parseHostPort("istiod.istio-system.svc:15012")).toEqual({
      host: "istiod.istio-system.svc",
      port: 15012,
    });
    expect(parseHostPort("[::1]:80")).toEqual({ host: "::1", port: 80 });
    for (const bad of ["a", "a:0", "a:65536", "::1:80x", ":80"]) expect(parseHostPort(bad)).toBeUndefined();
  });

  test("no text makes the parsers throw", () => {
    fc.assert(
      fc.property(fc.string(), (text) => {
        ipFamily(text);
        parseCidr(text);
        parseHostPort(text);
        parseSpiffe(text);
        parseDuration(text);
      }),
    );
  });
});

describe("durations", () => {
  test.for([
    [0, "0ms"],
    [999, "999ms"],
    [61_000, "1m1s"],
    [93_784_000, "1d2h"],
    [-5000, "-5s"],
  ] as const)("%d ms reads %s", ([ms, text]) => {
    expect(formatDuration(ms)).toBe(text);
  });
  test.for([
    ["45s", 45_000],
    ["1h5m", 3_900_000],
    ["0.5s", 500],
    ["150ms", 150],
    ["", undefined],
    ["5", undefined],
  ] as const)("%s parses as %s", ([text, ms]) => {
    expect(parseDuration(text)).toBe(ms);
  });
});

test("a SPIFFE id survives its text", () => {
  const id = { trustDomain: "cluster.local", namespace: "default", serviceAccount: "details" };
  expect(parseSpiffe(formatSpiffe(id))).toEqual(id);
});

test("waits grow to the cap and stay within the jitter", () => {
  const series = backoff(() => 0.5, { firstMs: 100, capMs: 400, factor: 2, jitter: 0.5 });
  expect(Array.from({ length: 4 }, () => series.next().value)).toEqual([100, 200, 400, 400]);
});

describe("supervise", () => {
  const deps = { sleep: async () => undefined, random: () => 0.5, onRestart: () => undefined };

  test("a restarting task runs again and the others go on", async () => {
    const stop = new AbortController();
    let runs = 0;
    await supervise(
      [
        {
          name: "flaky",
          onFailure: "restart",
          async run() {
            runs += 1;
            if (runs === 3) stop.abort();
            throw new Error("again");
          },
        },
      ],
      deps,
      stop.signal,
    );
    expect(runs).toBe(3);
  });

  test("a stop-all task ends the rest, and its name is in the error", async () => {
    let ended = false;
    const work = supervise(
      [
        { name: "sds", onFailure: "stop-all", run: () => Promise.reject(new Error("socket in use")) },
        {
          name: "dns",
          onFailure: "restart",
          run: (signal) =>
            new Promise<void>((resolve) =>
              signal.addEventListener("abort", () => {
                ended = true;
                resolve();
              }),
            ),
        },
      ],
      deps,
      new AbortController().signal,
    );
    await expect(work).rejects.toThrow("sds: socket in use");
    expect(ended).toBe(true);
  });
});

test("Latest gives the present value to who comes late, and the next to who waits", async () => {
  const latest = new Latest<number>();
  const waiting = latest.next(new AbortController().signal);
  latest.set(1);
  expect(await waiting).toBe(1);
  const seen: number[] = [];
  const scope = new AbortController();
  latest.subscribe((value) => seen.push(value), scope.signal);
  latest.set(2);
  scope.abort();
  latest.set(3);
  expect(seen).toEqual([1, 2]);
});

test("work in slices lets others have their turn, and gives its result or its error", async () => {
  let nowMs = 0;
  let turns = 0;
  const clock = {
    monotonicMs: () => nowMs,
    sleep: async () => {
      turns += 1;
    },
  };
  function* work(broken: boolean): Generator<undefined, string> {
    for (let step = 0; step < 20; step += 1) {
      nowMs += 1;
      yield;
    }
    if (broken) throw new Error("malformed");
    return "done";
  }
  expect(await inSlices(work(false), clock)).toBe("done");
  expect(turns).toBe(4);
  await expect(inSlices(work(true), clock)).rejects.toThrow("malformed");
});

test.for([
  ["10.0.0.0/8", undefined],
  ["::/0", undefined],
  ["::ffff:0:0/95", undefined],
  ["10.0.0.0/33", "is not an IP prefix"],
  ["::ffff:10.96.0.0/108", "is IPv4 in IPv6's notation, which no packet carries: write it as 10.96.0.0/12"],
  ["::FFFF:a00:1", "is IPv4 in IPv6's notation, which no packet carries: write it as 10.0.0.1/32"],
] as const)("why %s is no network: %s", ([text, why]) => {
  expect(whyNotCidr(text)).toBe(why);
});
