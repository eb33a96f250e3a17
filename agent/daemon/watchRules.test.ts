import { describe, expect, test } from "vitest";
import { PACE } from "../iptables/watch.ts";
import type { Logger } from "../telemetry/log.ts";
import { watchRules } from "./watchRules.ts";

const KUBE = "insert rule ip nat OUTPUT  counter packets 0 bytes 0 jump KUBE-SERVICES";
const OURS = "insert rule ip nat OUTPUT  counter packets 0 bytes 0 jump ISTIO_OUTPUT";
const by = (comm: string, pid = 4711): string => `# new generation 3 by process ${pid} (${comm})`;
const DISPLACED = [KUBE, by("iptables-nft-re")];
const PUT_RIGHT = [OURS, by("iptables-nft-re", 4712)];

/** The kernel's events at their times (ms), a clock that jumps to what is next, and what the agent made of them. */
async function watch(events: readonly (readonly [at: number, lines: readonly string[]])[]) {
  let now = 0;
  const sleepers: { readonly until: number; readonly wake: () => void }[] = [];
  const requests: number[] = [];
  const repaired: string[] = [];
  const said: { readonly text: string; readonly fields: unknown }[] = [];
  const raised: string[] = [];
  const signal = new AbortController();
  const settle = () => new Promise((resolve) => setImmediate(resolve));
  const advance = async (to: number): Promise<void> => {
    for (;;) {
      const next = sleepers.sort((a, b) => a.until - b.until)[0];
      if (next === undefined || next.until > to) break;
      sleepers.shift();
      now = next.until;
      next.wake();
      await settle();
    }
    now = to;
  };
  const log = {
    warning: (text: string, fields?: unknown) => said.push({ text, fields }),
    info: () => undefined,
    debug: () => undefined,
  } as unknown as Logger;
  await watchRules(
    {
      host: {
        clock: {
          now: () => new Date(now),
          monotonicMs: () => now,
          sleep: (ms) => new Promise((resolve) => sleepers.push({ until: now + ms, wake: resolve })),
        },
        files: {
          stat: async () => ({ kind: "other", mode: 0, uid: 0, gid: 0, size: 0, modifiedMs: 0 }),
          touch: async () => {
            requests.push(now);
          },
          async *lines() {
            for (const [at, lines] of events) {
              await advance(at);
              yield* lines;
              await settle();
            }
            await advance((events.at(-1)?.[0] ?? 0) + 60_000);
          },
        },
      },
      paths: { nftEvents: "/events", repairRequest: "/request" },
      conditions: {
        raise: (name) => {
          raised.push(name);
        },
        clear: (name) => {
          raised.push(`${name} over`);
        },
      },
      log,
      onRepaired: (name) => {
        repaired.push(name);
      },
    },
    signal.signal,
  );
  return { requests, repaired, said, raised };
}

describe("the agent, told of the kernel's rules", () => {
  test("an apply a minute after a change that displaced nothing blames nobody", async () => {
    const { repaired, said } = await watch([
      [0, DISPLACED],
      [60_000, PUT_RIGHT],
    ]);
    expect([repaired, said]).toEqual([[], []]);
  });

  test("asks once at its start: nobody knows what happened before", async () => {
    expect((await watch([])).requests).toEqual([0]);
  });

  test("names who displaced the rules, not who wrote elsewhere at the same time", async () => {
    const { repaired } = await watch([
      [5000, ["insert rule ip nat POSTROUTING counter jump LIBVIRT_PRT", by("libvirtd")]],
      [5010, ["delete rule ip nat OUTPUT handle 4", by("iptables")]],
      [5060, PUT_RIGHT],
    ]);
    expect(repaired).toEqual(["iptables"]);
  });

  test("does not blame who wrote a while ago and displaced nothing", async () => {
    const { repaired } = await watch([
      [5000, ["insert rule ip mangle OUTPUT counter ct mark set mark", by("tailscaled")]],
      [9000, ["delete rule ip nat OUTPUT handle 4", by("iptables")]],
      [9050, PUT_RIGHT],
    ]);
    expect(repaired).toEqual(["iptables"]);
  });

  test("asks at once for what somebody displaced, and counts and names who when it is put right", async () => {
    const seen = await watch([
      [5000, DISPLACED],
      [5040, PUT_RIGHT],
    ]);
    expect(seen.requests).toEqual([0, 5000]);
    expect(seen.repaired).toEqual(["kube-proxy"]);
    expect(seen.said).toEqual([
      {
        text: "kube-proxy had moved our rules: put right",
        fields: { by: "kube-proxy", pid: 4711, in_ms: 40 },
      },
    ]);
  });

  test("events that come together are one request more, a moment later: none is lost", async () => {
    const seen = await watch([
      [5000, DISPLACED],
      [5010, DISPLACED],
      [5020, DISPLACED],
    ]);
    expect(seen.requests).toEqual([0, 5000, 5000 + PACE.apartMs]);
  });

  test("who is known by its chain goes before the nameless command that went ahead of it", async () => {
    const seen = await watch([
      [5000, ["delete rule ip nat OUTPUT handle 9", by("iptables")]],
      [5005, DISPLACED],
      [5040, PUT_RIGHT],
    ]);
    expect(seen.repaired).toEqual(["kube-proxy"]);
  });

  test("who wipes our own tables goes before who took out a rule a moment earlier, as firewalld does when it is stopped for nftables", async () => {
    const seen = await watch([
      [5000, ["delete rule ip nat OUTPUT handle 9", by("iptables")]],
      [5020, ["delete table ip nat", "delete table ip vmmesh", by("nft")]],
      [5040, PUT_RIGHT],
    ]);
    expect(seen.repaired).toEqual(["nft"]);
  });

  test("a rule put right that nobody had moved is no repair", async () => {
    expect((await watch([[5000, PUT_RIGHT]])).repaired).toEqual([]);
  });

  test("what the kernel dropped is asked for and blamed on nobody", async () => {
    const seen = await watch([
      [5000, ["# ERROR: We lost some netlink events!"]],
      [5040, PUT_RIGHT],
    ]);
    expect(seen).toMatchObject({ requests: [0, 5000], repaired: [] });
  });

  test("names beyond the twentieth are counted together", async () => {
    const events = Array.from({ length: 25 }, (_, index) => [
      [20_000 * (index + 1), ["delete table ip nat", by(`tool-${index}`)]] as const,
      [20_000 * (index + 1) + 40, PUT_RIGHT] as const,
    ]).flat();
    const { repaired } = await watch(events);
    expect(new Set(repaired).size).toBe(21);
    expect(repaired.filter((name) => name === "other")).toHaveLength(5);
  });

  test("one that answers each of our repairs is a duel: slower, said, and over when it ends", async () => {
    const events = Array.from({ length: 100 }, (_, index) => [
      [5000 + index * 200, DISPLACED] as const,
      [5050 + index * 200, PUT_RIGHT] as const,
    ]).flat();
    const { requests, raised } = await watch(events);
    expect(requests.length).toBeLessThan(30);
    expect(raised).toContain("rules-contested");
    expect(raised.at(-1)).toBe("rules-contested over");
  });
});
