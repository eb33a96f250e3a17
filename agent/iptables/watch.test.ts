import { describe, expect, test } from "vitest";
import { type Change, monitorReader, PACE, Pace } from "./watch.ts";

/** What `nft monitor` (1.0.6) printed for the commands in the names. */
const BY = (comm: string): string => `# new generation 3 by process 22222 (${comm})`;
const KUBE_AHEAD = "insert rule ip nat OUTPUT  counter packets 0 bytes 0 jump KUBE-SERVICES";
const changes = (...lines: string[]): (Change | undefined)[] => {
  const read = monitorReader();
  return lines.map(read).filter((it) => it !== undefined);
};

describe("what concerns us", () => {
  test.for([
    {
      name: "iptables -t nat -I OUTPUT 1 -j KUBE-SERVICES",
      lines: ["insert rule ip nat OUTPUT  counter packets 0 bytes 0 jump KUBE-SERVICES", BY("iptables")],
      program: "kube-proxy",
    },
    {
      name: "iptables -t nat -F",
      lines: ["delete rule ip nat OUTPUT handle 4", BY("iptables")],
      program: "iptables",
    },
    {
      name: "iptables -t nat -F beside Docker, whose jump goes too, by a newer nft that prints it",
      lines: ["delete rule ip nat OUTPUT counter packets 0 bytes 0 jump DOCKER # handle 9", BY("iptables")],
      program: "iptables",
    },
    {
      name: "Docker's jump put behind by whoever wiped the table",
      lines: [
        "delete rule ip nat OUTPUT handle 4",
        "add rule ip nat OUTPUT counter packets 0 bytes 0 jump DOCKER",
        BY("iptables-restor"),
      ],
      program: "iptables-restor",
    },
    {
      name: "nft flush ruleset",
      lines: [
        "delete rule inet foo x handle 2",
        "delete chain ip nat OUTPUT",
        "delete table ip nat",
        "delete table ip vmmesh",
        BY("nft"),
      ],
      program: "nft",
    },
    {
      name: "the end of our fence",
      lines: ["delete table inet vmmesh-fence", BY("nft")],
      program: "nft",
    },
    {
      name: "a rule in one of our chains",
      lines: ["insert rule ip nat ISTIO_OUTPUT counter packets 0 bytes 0 accept", BY("iptables")],
      program: "iptables",
    },
    {
      name: "a rule in a chain that a hook may lead to",
      lines: ["add rule ip6 raw cali-OUTPUT counter packets 0 bytes 0 notrack", BY("iptables-restor")],
      program: "iptables-restor",
    },
    {
      name: "a process whose name has brackets",
      lines: ["delete table ip nat", BY("a (b)")],
      program: "a (b)",
    },
  ])("$name", ({ lines, program }) => {
    expect(changes(...lines)).toMatchObject([{ kind: "foreign", by: { program, pid: 22_222 } }]);
  });

  test.for([
    {
      name: "Kubernetes' own chains",
      line: "add rule ip nat KUBE-SVC-X counter packets 0 bytes 0 jump KUBE-SEP-Y",
    },
    { name: "another family", line: "add rule inet firewalld nat_OUTPUT jump x" },
    { name: "table filter", line: "insert rule ip filter OUTPUT counter packets 0 bytes 0 drop" },
    {
      name: "a new table and its hooks",
      line: "add chain ip nat OUTPUT { type nat hook output priority -100; policy accept; }",
    },
    { name: "an element of a set", line: "add element ip vmmesh x { 1.2.3.4 timeout 1s expires 1s }" },
    { name: "anything that is no event", line: "hello" },
  ])("$name is not", ({ line }) => {
    expect(changes(line, BY("x"))).toEqual([]);
  });

  test("our own repair is known by what it writes, and is no reason for another", () => {
    expect(
      changes(
        "delete rule ip nat ISTIO_OUTPUT handle 9",
        "add rule ip nat ISTIO_OUTPUT meta skuid 997 counter packets 0 bytes 0 return",
        "delete rule ip nat OUTPUT handle 4",
        "insert rule ip nat OUTPUT  counter packets 0 bytes 0 jump ISTIO_OUTPUT",
        BY("iptables-nft-re"),
        "delete table ip vmmesh",
        "add table ip vmmesh",
        BY("nft"),
      ),
    ).toEqual([{ kind: "ours" }, { kind: "ours" }]);
  });

  test.for([
    {
      name: "a table of ours deleted weighs most",
      lines: [
        "delete chain ip nat OUTPUT",
        "delete table ip vmmesh",
        "delete table inet vmmesh-fence",
        BY("nft"),
      ],
      weight: 3,
      program: "nft",
    },
    {
      name: "a jump put ahead of ours weighs more than a rule taken out",
      lines: ["delete rule ip nat OUTPUT handle 4", KUBE_AHEAD, BY("iptables-restor")],
      weight: 2,
      program: "kube-proxy",
    },
    {
      name: "a hook of ours",
      lines: ["delete rule ip nat OUTPUT handle 4", BY("x")],
      weight: 1,
      program: "x",
    },
    {
      name: "Podman's jump in POSTROUTING is ahead of nothing of ours, and no sign of who writes",
      lines: ["insert rule ip nat POSTROUTING counter jump NETAVARK-HOSTPORT-MASQ", BY("iptables")],
      weight: 0,
      program: "iptables",
    },
  ])("$name", ({ lines, weight, program }) => {
    expect(changes(...lines)).toMatchObject([{ kind: "foreign", weight, by: { program } }]);
  });

  test("of a transaction the line that displaced us is told, not the first", () => {
    expect(
      changes("insert rule ip nat POSTROUTING counter jump LIBVIRT_PRT", KUBE_AHEAD, BY("iptables")),
    ).toMatchObject([{ line: KUBE_AHEAD }]);
  });

  test("events that the kernel dropped may have been any", () => {
    expect(changes("# ERROR: We lost some netlink events!")).toEqual([{ kind: "lost" }]);
  });

  test("one transaction's events are not counted to the next", () => {
    expect(changes("delete table ip nat", BY("one"), "add table inet foo", BY("two"))).toHaveLength(1);
  });
});

describe("the pace", () => {
  test("the first event at once, the next ones a tenth of a second apart", () => {
    const pace = new Pace();
    expect(pace.event(0)).toBe(0);
    pace.requested(0);
    expect([pace.event(1), pace.event(40), pace.event(PACE.apartMs)]).toEqual([99, 60, 0]);
  });

  /** Events without end, each repair as soon as it may be. @returns when they were asked for */
  function storm(pace: Pace, untilMs: number, displaced: boolean): number[] {
    const asked: number[] = [];
    let due = Number.POSITIVE_INFINITY;
    for (let now = 0; now < untilMs; now += 10) {
      if (now >= due) {
        pace.requested(now);
        if (displaced) pace.repaired(now);
        asked.push(now);
        due = Number.POSITIVE_INFINITY;
      } else if (due === Number.POSITIVE_INFINITY) due = now + pace.event(now);
    }
    return asked;
  }

  test("a duel is answered slowly, but always, until it is over", () => {
    const pace = new Pace();
    const asked = storm(pace, 60_000, true);
    expect(asked.filter((at) => at < PACE.earnMs)).toHaveLength(PACE.burst);
    expect(asked.filter((at) => at >= 20_000)).toHaveLength(40_000 / PACE.earnMs);
    expect(pace.contested(60_000)).toBe(true);
    expect(pace.contested(60_000 + (PACE.burst / 2) * PACE.earnMs)).toBe(false);
    expect(pace.event(80_000)).toBe(0);
  });

  test("who displaces us every few seconds after many who did so at once is answered at once", () => {
    const pace = new Pace();
    storm(pace, 10_000, true);
    for (const now of [15_000, 18_000, 21_000, 24_000, 27_000]) {
      expect(pace.event(now)).toBe(0);
      pace.requested(now);
      pace.repaired(now);
    }
  });

  test("who writes much beside us is no duel: looked at less often, and a displacement after it is not late", () => {
    const pace = new Pace();
    const asked = storm(pace, 60_000, false);
    expect(pace.contested(60_000)).toBe(false);
    expect(asked.filter((at) => at >= 20_000).length).toBeLessThanOrEqual(40_000 / PACE.busyMs);
    expect(pace.event(60_000)).toBeLessThanOrEqual(PACE.busyMs);
    expect(pace.event(71_000)).toBe(0);
  });
});
