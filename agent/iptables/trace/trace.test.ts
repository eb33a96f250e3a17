import { describe, expect, test } from "vitest";
import type { Host } from "../../platform/host.ts";
import { parseRule } from "../parse.ts";
import { inIpSet, parseIpSets } from "./ipset.ts";
import { parseLive } from "./live.ts";
import { masquerade, type Route, type World } from "./model.ts";
import { addressNumber, addressText, type Packet, parseSpan, span } from "./packet.ts";
import { buildRuleset } from "./ruleset.ts";
import { resolveSender } from "./sender.ts";
import { traceStatic } from "./trace.ts";
import { walkIn, walkOut } from "./walk.ts";
import { compileRule } from "./xtables.ts";

describe("numbers of addresses", () => {
  test.each([
    "10.96.0.10",
    "0.0.0.0",
    "255.255.255.255",
    "::",
    "::1",
    "fd00::1:0:0:1",
    "2001:db8::",
    "1:2:3:4:5:6:7:8",
  ])("%s comes back as it went in", (text) => {
    const number = addressNumber(text) ?? -1n;
    expect(addressText(number, text.includes(":") ? 6 : 4)).toBe(text);
  });

  test.each([
    ["80", 80n, 80n],
    ["1000:2000", 1000n, 2000n],
    [":1023", 0n, 1023n],
    ["1024:", 1024n, 65535n],
    ["0-99", 0n, 99n],
    ["0x10", 16n, 16n],
    ["10.0.0.0/8", 0x0a000000n, 0x0affffffn],
    ["10.0.0.0/255.255.0.0", 0x0a000000n, 0x0a00ffffn],
    ["10.0.0.1-10.0.0.3", 0x0a000001n, 0x0a000003n],
    ["::1-::3", 1n, 3n],
  ])("%s is from %s to %s", (text, low, high) => expect(parseSpan(text)).toEqual({ low, high }));

  test.each(["http", "", "1.2.3", "10.0.0.0/33"])("%s is none", (text) =>
    expect(parseSpan(text)).toBeUndefined(),
  );
});

const PACKET: Packet = {
  family: 4,
  protocol: "tcp",
  from: { address: addressNumber("10.200.0.1") ?? 0n, port: span(32_768, 60_999) },
  to: { address: addressNumber("10.96.0.10") ?? 0n, port: span(80) },
  original: {
    from: { address: addressNumber("10.200.0.1") ?? 0n, port: span(32_768, 60_999) },
    to: { address: addressNumber("10.96.0.10") ?? 0n, port: span(80) },
  },
  mark: 0n,
  ctMark: 0n,
  tracking: "tracked",
  settled: { source: false, destination: false },
  translated: { source: false, destination: false },
  in: undefined,
  out: "eth0",
  sender: { uid: 1000, gid: 1000, cgroup: "system.slice/app.service" },
  confirmed: false,
  proxied: undefined,
};

const REMOTE: Route = { type: "unicast", device: "eth0", source: addressNumber("10.200.0.1") };
const WORLD: World = {
  route: ({ to }) => (to >> 24n === 127n ? { type: "local", device: "lo", source: to } : REMOTE),
  addressOf: () => addressNumber("10.200.0.1"),
  visibleAddress: () => addressNumber("10.200.0.1"),
  socket: (_protocol, _family, _address, port) =>
    port === 15001n ? { name: "envoy", wildcard: true, transparent: true } : undefined,
  ipSets: new Map(),
  recent: (list) => (list === "vmmesh-envoy4" ? 1.2 : undefined),
};

/** What one rule does with the packet: the verdict, "on", "miss", or both of a choice that nobody can make. */
function does(line: string, packet: Packet = PACKET): string {
  const rule = parseRule(line);
  if (rule === undefined) throw new Error(line);
  let going = [{ packet, does: "on" as unknown }];
  const done: unknown[] = [];
  for (const step of compileRule(rule, new Set(["OTHER"]))) {
    const turns = going.flatMap((at) => step(at.packet, WORLD));
    done.push(...turns.filter((turn) => turn.does !== "on").map((turn) => turn.does));
    going = turns.filter((turn) => turn.does === "on");
  }
  return [...done, ...going.map(() => "on")]
    .map((each) =>
      typeof each === "object" && each !== null && "do" in each ? String(each.do) : String(each),
    )
    .join(" or ");
}

describe("one rule of iptables", () => {
  test.each([
    ["-A OUTPUT -j ACCEPT", "accept"],
    ["-A OUTPUT -m connmark ! --mark 0x1/0x1 -j ACCEPT", "accept"],
    ["-A OUTPUT -d 10.96.0.0/12 -j DROP", "drop"],
    ["-A OUTPUT ! -d 10.96.0.0/12 -j DROP", "miss"],
    ["-A OUTPUT -p udp -j DROP", "miss"],
    ["-A OUTPUT -p tcp -m multiport --dports 79,80:90 -j RETURN", "return"],
    ["-A OUTPUT -p tcp -m multiport ! --dports 79,80:90 -j RETURN", "miss"],
    ["-A OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT", "accept"],
    ["-A OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN,ACK -j ACCEPT", "miss"],
    ["-A OUTPUT -o eth+ -j OTHER", "jump"],
    ["-A OUTPUT ! -o lo -g OTHER", "goto"],
    ["-A OUTPUT -m owner --uid-owner 1000 -j ACCEPT", "accept"],
    ["-A OUTPUT -m owner ! --uid-owner 1337 -j ACCEPT", "accept"],
    ["-A OUTPUT -m owner --gid-owner 0-999 -j ACCEPT", "miss"],
    ["-A OUTPUT -m cgroup --path system.slice -j ACCEPT", "accept"],
    ["-A OUTPUT -m cgroup --path system.sli -j ACCEPT", "miss"],
    ["-A OUTPUT -m conntrack --ctstate NEW -j ACCEPT", "accept"],
    ["-A OUTPUT -m conntrack --ctstate DNAT -j ACCEPT", "miss"],
    ["-A OUTPUT -m conntrack --ctorigdstport 80 ! --ctorigdst 10.96.0.10/32 -j ACCEPT", "miss"],
    ["-A OUTPUT -m addrtype --dst-type LOCAL -j ACCEPT", "miss"],
    ["-A OUTPUT -m mark ! --mark 0x1/0x1 -j ACCEPT", "accept"],
    ['-A OUTPUT -m comment --comment "-j DROP" -j ACCEPT', "accept"],
    [
      "-A OUTPUT -m recent --rcheck --seconds 3 --name vmmesh-envoy4 --mask 0.0.0.0 --rsource -j ACCEPT",
      "accept",
    ],
    [
      "-A OUTPUT -m recent --rcheck --seconds 1 --name vmmesh-envoy4 --mask 0.0.0.0 --rsource -j ACCEPT",
      "miss",
    ],
    ["-A OUTPUT -m recent --rcheck --name strangers --rsource -j DROP", "miss or drop"],
    ["-A OUTPUT -p tcp -m tcp --sport 22 -j DROP", "miss"],
    ["-A OUTPUT -p tcp -m tcp --sport 1024:65535 -j DROP", "drop"],
    ["-A OUTPUT -p tcp -m tcp --sport 40000 -j DROP", "miss or drop"],
    ["-A OUTPUT -m statistic --mode random --probability 0.5 -j DROP", "miss or drop"],
    ["-A OUTPUT -m bpf --bytecode 1 -j DROP", "miss or drop"],
    ["-A OUTPUT -m set --match-set BLOCKED dst -j DROP", "miss or drop"],
    ["-A OUTPUT -j SOMETHING", "miss or on"],
    ["-A OUTPUT -j LOG --log-prefix x", "on"],
    ["-A OUTPUT -j DNAT --to-destination 10.244.0.2:8080", "accept"],
    ["-A OUTPUT -j DNAT --to-destination 10.244.0.2-10.244.0.3", "accept or accept"],
  ])("%s: %s", (line, want) => expect(does(line)).toBe(want));

  test("a packet that conntrack has not seen is invalid, and everything else is not asked", () => {
    const early: Packet = { ...PACKET, tracking: "not yet" };
    expect(does("-A OUTPUT -m conntrack --ctstate INVALID --ctorigdstport 1 -j DROP", early)).toBe("drop");
    expect(does("-A OUTPUT -m conntrack --ctorigdstport 80 -j DROP", early)).toBe("miss");
  });
});

/** `nft -j list ruleset` of chains with rules, in one table. */
function nft(
  table: string,
  chains: Record<
    string,
    { hook?: string; type?: string; prio?: number; policy?: string; rules: unknown[][] }
  >,
): string {
  const [family, name] = table.split(" ");
  const objects: unknown[] = [{ table: { family, name } }];
  for (const [chain, { rules, ...base }] of Object.entries(chains)) {
    objects.push({ chain: { family, table: name, name: chain, ...base } });
    for (const [index, expr] of rules.entries())
      objects.push({ rule: { family, table: name, chain, handle: index + 1, expr } });
  }
  return JSON.stringify({ nftables: objects });
}

const NONE = { nftSave: "", legacySave: "", nftJson: "", nftText: "", nftNetlink: "" };
const match = (left: unknown, right: unknown, op = "==") => ({ match: { op, left, right } });
const payload = (protocol: string, field: string) => ({ payload: { protocol, field } });
const outcome = (
  listing: Partial<typeof NONE>,
  packet: Packet = { ...PACKET, tracking: "not yet" },
  world = WORLD,
) =>
  walkOut(buildRuleset({ ...NONE, ...listing }, 4), world, packet).map(
    ({ packet: { to }, end, because }) =>
      `${end.kind} ${addressText(to.address, 4)}:${to.port.low}${because.length > 0 ? " ?" : ""}`,
  );

const ISTIO = `*nat
:OUTPUT ACCEPT [0:0]
:ISTIO_OUTPUT - [0:0]
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001
COMMIT
`;
const KUBE = {
  nat: {
    hook: "output",
    type: "nat",
    prio: -100,
    policy: "accept",
    rules: [
      [
        match(payload("ip", "daddr"), "10.96.0.10"),
        { dnat: { family: "ip", addr: "10.244.0.2", port: 8080 } },
      ],
    ],
  },
};

describe("TPROXY", () => {
  const inbound: Packet = { ...PACKET, in: "eth0", out: undefined, sender: undefined, tracking: "not yet" };
  const arrives = (target: string, world: World): string[] =>
    walkIn(
      buildRuleset(
        {
          ...NONE,
          legacySave: `*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j TPROXY ${target}\nCOMMIT\n`,
        },
        4,
      ),
      world,
      inbound,
      true,
    ).map(({ end }) => (end.kind === "delivered" ? `${end.kind} to ${end.port.low}` : end.kind));
  const listening = (transparent: boolean | undefined, byMark = true): World => ({
    ...WORLD,
    route: ({ mark }) =>
      mark === 0x10n && byMark ? { type: "local", device: "lo", source: undefined } : REMOTE,
    socket: (_protocol, _family, _address, port) =>
      port === 15006n ? { name: "envoy", wildcard: true, transparent } : undefined,
  });

  test.each([
    ["--on-port 15006 --tproxy-mark 0x10/0x10", listening(true), ["delivered to 15006"]],
    ["--on-port 15007 --tproxy-mark 0x10/0x10", listening(true), ["dropped"]],
    ["--on-port 15006 --tproxy-mark 0x10/0x10", listening(false), ["dropped"]],
    ["--on-port 15006 --tproxy-mark 0x10/0x10", listening(undefined), ["delivered to 15006", "dropped"]],
    // Without a route for the mark it is forwarded, and a packet with a socket on it is not.
    ["--on-port 15006 --tproxy-mark 0x10/0x10", listening(true, false), ["unroutable"]],
    ["--on-port 15006", listening(true), ["unroutable"]],
  ])("%s %#", (target, world, want) => expect(arrives(target, world)).toEqual(want));
});

describe("a set of ipset", () => {
  const sets =
    parseIpSets(`create hosts hash:ip family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1
add hosts 10.96.0.10 comment "add hosts 10.0.0.1"
create nets hash:net family inet hashsize 1024 maxelem 65536
add nets 10.0.0.0/8
add nets 10.96.0.0/16 nomatch
create slash24 hash:ip family inet netmask 24
add slash24 10.96.0.0
create pairs hash:ip,port family inet
add pairs 10.96.0.10,tcp:80
create ports bitmap:port range 0-1024
add ports 80
create six hash:net family inet6
add six ::/1
create both list:set size 8
add both six
add both hosts
`);
  test.each([
    ["hosts", ["dst"], true],
    ["hosts", ["src"], false],
    ["nets", ["src"], true],
    ["nets", ["dst"], false],
    ["slash24", ["dst"], true],
    ["pairs", ["dst", "dst"], true],
    ["pairs", ["dst", "src"], false],
    ["pairs", ["dst"], false],
    ["ports", ["dst"], true],
    ["six", ["dst"], false],
    ["both", ["dst"], true],
    ["gone", ["dst"], { unknown: "what the ipset gone holds" }],
  ])("%s by %j: %j", (name, directions, want) => {
    const hit = inIpSet(sets, name, { ...PACKET, from: { ...PACKET.from, port: span(40_000) } }, directions);
    expect(hit).toEqual(want);
  });

  test.each([
    ["pairs", 4, true],
    ["ports", 4, false],
    ["others", 4, false],
    ["pairs6", 6, true],
    ["others6", 6, false],
  ] as const)("an echo request has type and code for a port: %s of IPv%d: %s", (name, family, want) => {
    const icmp = parseIpSets(`create pairs hash:ip,port family inet
add pairs 10.96.0.10,tcp:0
add pairs 10.96.0.10,icmp:echo-request
create others hash:ip,port family inet
add others 10.96.0.10,tcp:8
add others 10.96.0.10,icmp:host-unreachable
add others 10.96.0.11,icmp:echo-request
create ports bitmap:port range 0-65535
add ports 0-65535
create pairs6 hash:ip,port family inet6
add pairs6 ::10.96.0.10,ipv6-icmp:echo-request
create others6 hash:ip,port family inet6
add others6 ::10.96.0.10,ipv6-icmp:128/1
`);
    const to = { ...PACKET.to, port: span(0) };
    const directions = name === "ports" ? ["dst"] : ["dst", "dst"];
    expect(inIpSet(icmp, name, { ...PACKET, family, protocol: "icmp", to }, directions)).toBe(want);
  });
});

describe("a walk", () => {
  test("without rules the packet leaves as it is", () => {
    expect(outcome({})).toEqual(["leaves 10.96.0.10:80"]);
  });

  test("a redirect ends at Envoy", () => {
    expect(outcome({ legacySave: ISTIO })).toEqual(["delivered 127.0.0.1:15001"]);
  });

  test("two nat chains of one priority: both answers, and the reason", () => {
    const both = outcome({ legacySave: ISTIO, nftJson: nft("ip kube-proxy", KUBE) });
    expect(both.sort()).toEqual(["delivered 127.0.0.1:15001 ?", "leaves 10.244.0.2:8080 ?"]);
  });

  test("three nat chains of one priority, of which two agree: every answer has its reason", () => {
    const other = { nat: { ...KUBE.nat, rules: [[{ redirect: { port: 15001 } }]] } };
    const tables = (JSON.parse(nft("ip other", other)) as { nftables: unknown[] }).nftables;
    const both = JSON.parse(nft("ip kube-proxy", KUBE)) as { nftables: unknown[] };
    const listing = {
      legacySave: ISTIO,
      nftJson: JSON.stringify({ nftables: [...both.nftables, ...tables] }),
    };
    expect(outcome(listing).sort()).toEqual(["delivered 127.0.0.1:15001 ?", "leaves 10.244.0.2:8080 ?"]);
  });

  test("two nat chains of one priority that agree need no reason", () => {
    const idle = { nat: { ...KUBE.nat, rules: [[match(payload("tcp", "dport"), 81), { drop: null }]] } };
    expect(outcome({ legacySave: ISTIO, nftJson: nft("ip kube-proxy", idle) })).toEqual([
      "delivered 127.0.0.1:15001",
    ]);
  });

  test("a nat chain of lower priority wins, whoever else there is", () => {
    const guard = {
      nat: {
        ...KUBE.nat,
        prio: -120,
        rules: [[match({ meta: { key: "l4proto" } }, "tcp"), { redirect: { port: 15001 } }]],
      },
    };
    const listing = { legacySave: ISTIO.replace("15001", "15006"), nftJson: nft("ip vmmesh", guard) };
    expect(outcome(listing)).toEqual(["delivered 127.0.0.1:15001"]);
  });

  test("what is taken out of conntrack is not translated", () => {
    const raw = "*raw\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j CT --notrack\nCOMMIT\n";
    expect(outcome({ legacySave: `${raw}${ISTIO}` })).toEqual(["leaves 10.96.0.10:80"]);
  });

  test("a connection mark of what is not tracked is neither set nor unset", () => {
    const rules = (not: string): string =>
      `*raw\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j CT --notrack\n-A OUTPUT -m connmark ${not}--mark 0x1 -j DROP\nCOMMIT\n`;
    for (const not of ["", "! "])
      expect(outcome({ legacySave: rules(not) })).toEqual(["leaves 10.96.0.10:80"]);
  });

  test("a zone makes a packet new to a rule that asks ahead of conntrack, where it is invalid else", () => {
    const raw = (target: string): string => `*raw\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT ${target}\nCOMMIT\n`;
    const asks = (state: string) =>
      nft("ip site", {
        out: {
          hook: "output",
          type: "filter",
          prio: -250,
          rules: [[match({ ct: { key: "state" } }, { set: [state, "established"] }), { drop: null }]],
        },
      });
    const end = (target: string, state: string) =>
      outcome({ legacySave: raw(target), nftJson: asks(state) })[0]?.split(" ")[0];
    expect(end("-j CT --zone 2", "new")).toBe("dropped");
    expect(end("-j CT --zone 2", "invalid")).toBe("leaves");
    expect(end("-j ACCEPT", "new")).toBe("leaves");
    expect(end("-j ACCEPT", "invalid")).toBe("dropped");
    expect(end("-j CT --notrack", "untracked")).toBe("dropped");
  });

  test("a zone that comes first keeps a later NOTRACK out", () => {
    const raw = "*raw\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j CT --zone 2\n-A OUTPUT -j CT --notrack\nCOMMIT\n";
    expect(outcome({ legacySave: `${raw}${ISTIO}` })).toEqual(["delivered 127.0.0.1:15001"]);
  });

  test("after a translation filter chains see the new destination and the old interface", () => {
    const filter = `*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -d 127.0.0.1/32 -o eth0 -j REJECT\nCOMMIT\n`;
    expect(outcome({ legacySave: `${ISTIO}${filter}` })).toEqual(["rejected 127.0.0.1:15001"]);
  });

  describe("a mark that makes a foreign address local", () => {
    const marked: World = {
      ...WORLD,
      route: ({ to, mark = 0n }) => (mark === 0x10n ? { type: "local", device: "lo", source: to } : REMOTE),
    };
    const MARK = "-j MARK --set-xmark 0x10/0x10";
    const UNMARK = "-j MARK --set-xmark 0x0/0xffffffff";
    const ICMP = "-p tcp -j REJECT --reject-with icmp-port-unreachable";
    const RESET = "-p tcp -j REJECT --reject-with tcp-reset";
    const tables = (rules: Record<string, readonly string[]>): string =>
      Object.entries(rules)
        .map(([table, lines]) => {
          const chains = [...new Set(lines.map((line) => line.split(" ")[1]))];
          return `*${table}\n${chains.map((name) => `:${name} ACCEPT [0:0]\n`).join("")}${lines.join("\n")}\nCOMMIT\n`;
        })
        .join("");
    const sent = (listing: Partial<typeof NONE>): string[] => outcome(listing, undefined, marked);
    const route = (...rules: unknown[][]) => ({
      nftJson: nft("ip site", { out: { hook: "output", type: "route", prio: -150, rules } }),
    });
    const SET = [{ mangle: { key: { meta: { key: "mark" } }, value: 0x10 } }];
    const REFUSE = [{ reject: { type: "icmp", expr: "port-unreachable" } }];

    test.each([
      [
        "a refusal by ICMP is not heard",
        { mangle: [`-A OUTPUT ${MARK}`], filter: [`-A OUTPUT ${ICMP}`] },
        "dropped",
      ],
      ["a reset is", { mangle: [`-A OUTPUT ${MARK}`], filter: [`-A OUTPUT ${RESET}`] }, "rejected"],
      [
        "a mark taken off on its way over lo changes nothing, for it was routed before",
        { mangle: [`-A OUTPUT ${MARK}`, `-A POSTROUTING ${UNMARK}`], filter: [`-A INPUT ${ICMP}`] },
        "dropped",
      ],
    ])("%s", (_what, rules, end) =>
      expect(sent({ legacySave: tables(rules) })).toEqual([`${end} 10.96.0.10:80`]),
    );

    test("a refusal in the very chain that marks is heard: it is routed anew only behind it", () => {
      expect(sent(route(SET, REFUSE))).toEqual(["rejected 10.96.0.10:80"]);
      expect(sent({ ...route(SET), legacySave: tables({ filter: [`-A OUTPUT ${ICMP}`] }) })).toEqual([
        "dropped 10.96.0.10:80",
      ]);
    });

    test.each([
      [
        "of one that was forwarded first is heard",
        { mangle: [`-A FORWARD ${MARK}`], filter: [`-A FORWARD ${ICMP}`] },
        "rejected",
      ],
      [
        "of one that lost its mark after it was let in is not",
        { mangle: [`-A PREROUTING ${MARK}`, `-A INPUT ${UNMARK}`], filter: [`-A INPUT ${ICMP}`] },
        "dropped",
      ],
    ])("from outside: a refusal %s", (_what, rules, end) => {
      const inbound: Packet = {
        ...PACKET,
        in: "eth0",
        out: undefined,
        sender: undefined,
        tracking: "not yet",
      };
      const ways = walkIn(buildRuleset({ ...NONE, legacySave: tables(rules) }, 4), marked, inbound, true);
      expect(ways.map((way) => way.end.kind)).toEqual([end]);
    });
  });

  test("masquerading out by lo takes an address that others may see, not the route's own", () => {
    const local: World = {
      ...WORLD,
      route: () => ({ type: "local", device: "lo", source: addressNumber("127.0.0.1") }),
      visibleAddress: () => addressNumber("10.200.0.1"),
    };
    const [turn] = masquerade(PACKET, local);
    expect(turn?.packet.from.address).toBe(addressNumber("10.200.0.1"));
  });

  test("a limit in front of a log leaves nothing open", () => {
    const listing = {
      legacySave: "*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m limit --limit 3/min -j LOG\nCOMMIT\n",
      nftJson: nft("ip site", {
        out: { hook: "output", type: "filter", prio: 0, rules: [[{ limit: { rate: 3 } }, { log: null }]] },
      }),
    };
    expect(outcome(listing)).toEqual(["leaves 10.96.0.10:80"]);
  });

  test("a map over chance gives every target", () => {
    const numgen = { numgen: { mode: "random", mod: 2, offset: 0 } };
    const set = {
      set: [
        [0, { concat: ["10.0.0.1", 80] }],
        [1, { concat: ["10.0.0.2", 80] }],
      ],
    };
    const rules = [[{ dnat: { family: "ip", addr: { map: { key: numgen, data: set } } } }]];
    expect(outcome({ nftJson: nft("ip kube-proxy", { nat: { ...KUBE.nat, rules } }) })).toEqual([
      "leaves 10.0.0.1:80 ?",
      "leaves 10.0.0.2:80 ?",
    ]);
  });

  test("a lease is read from its set: with an element it lives, without it has lapsed", () => {
    const lease = match({ "&": [{ meta: { key: "mark" } }, 0] }, "@lease_envoy");
    const rules = [[match({ meta: { key: "l4proto" } }, "tcp"), lease, { redirect: { port: 15001 } }]];
    const withLease = (elem: unknown[]) => {
      const json = JSON.parse(nft("ip vmmesh", { nat: { ...KUBE.nat, rules } })) as { nftables: unknown[] };
      json.nftables.push({ set: { family: "ip", table: "vmmesh", name: "lease_envoy", elem } });
      return outcome({ nftJson: JSON.stringify(json) });
    };
    expect(withLease([{ elem: { val: 0, timeout: 3, expires: 2 } }])).toEqual(["delivered 127.0.0.1:15001"]);
    expect(withLease([])).toEqual(["leaves 10.96.0.10:80"]);
  });

  test("TCP resets are for TCP, although nft does not print it", () => {
    const rules = [[{ reject: { type: "tcp reset" } }]];
    const listing = { nftJson: nft("ip site", { out: { hook: "output", type: "filter", prio: 0, rules } }) };
    expect(outcome(listing)).toEqual(["rejected 10.96.0.10:80"]);
    expect(outcome(listing, { ...PACKET, protocol: "udp" })).toEqual(["leaves 10.96.0.10:80"]);
  });

  describe("a TCP reset of one family, which nft 1.0.6 prints without it", () => {
    const RESET = [match({ meta: { key: "l4proto" } }, "tcp"), { reject: { type: "tcp reset" } }];
    const out = (rules: unknown[][]) => ({ out: { hook: "output", type: "filter", prio: 0, rules } });
    const text = (table: string): string =>
      `table ${table} { # handle 1\n\tchain out { # handle 2\n\t\tmeta l4proto tcp reject with tcp reset # handle 1\n\t}\n}\n`;
    const asks = (key: string, value: string): string =>
      `  [ meta load ${key} => reg 1 ]\n  [ cmp eq reg 1 ${value} ]\n`;
    const REST = `${asks("l4proto", "0x00000006")}  [ reject type 1 code 0 ]\n\n`;
    test.each([
      ["inet site", `inet site out 1\n${asks("nfproto", "0x0000000a")}${REST}`, ["leaves 10.96.0.10:80"]],
      ["inet site", `inet site out 1\n${asks("nfproto", "0x00000002")}${REST}`, ["rejected 10.96.0.10:80"]],
      ["inet site", `inet site out 1\n${REST}`, ["rejected 10.96.0.10:80"]],
      ["inet site", `inet site out 1 7\n${asks("protocol", "0x0000dd86")}${REST}`, ["leaves 10.96.0.10:80"]],
      [
        "inet site",
        `inet site out 7 1\n${asks("nfproto", "0x0000000a")}${REST}inet site out 1 7\n${REST}`,
        ["rejected 10.96.0.10:80"],
      ],
      // Nobody can say: both.
      ["inet site", "", ["rejected 10.96.0.10:80 ?", "leaves 10.96.0.10:80 ?"]],
      [
        "inet site",
        `inet site out 1\n${asks("nfproto", "0x0a000000")}${REST}`,
        ["rejected 10.96.0.10:80 ?", "leaves 10.96.0.10:80 ?"],
      ],
      // Of one family anyhow.
      ["ip site", "", ["rejected 10.96.0.10:80"]],
    ])("%s %#", (table, nftNetlink, want) => {
      const listing = { nftJson: nft(table, out([RESET])), nftText: text(table), nftNetlink };
      expect(outcome(listing)).toEqual(want);
    });
  });

  test("a refusal by an ICMP of one family is for packets of it, although nft does not print it", () => {
    const site = (type: string) => ({
      nftJson: nft("inet site", {
        out: {
          hook: "output",
          type: "filter",
          prio: 0,
          rules: [[{ reject: { type, expr: "port-unreachable" } }]],
        },
      }),
    });
    expect(outcome(site("icmp"))).toEqual(["rejected 10.96.0.10:80"]);
    expect(outcome(site("icmpv6"))).toEqual(["leaves 10.96.0.10:80"]);
  });

  test("of two chains of one priority in one table the later one runs first", () => {
    const chain = (verdict: object) => ({ hook: "output", type: "filter", prio: 0, rules: [[verdict]] });
    const refuse = chain({ reject: { type: "icmp" } });
    const drop = chain({ drop: null });
    expect(outcome({ nftJson: nft("ip site", { drop, refuse }) })).toEqual(["rejected 10.96.0.10:80"]);
    expect(outcome({ nftJson: nft("ip site", { refuse, drop }) })).toEqual(["dropped 10.96.0.10:80"]);
  });

  test("a cgroup that is not as deep as the one that a rule excepts is no other one (nft), or is (iptables)", () => {
    const rules = [
      [match({ socket: { key: "cgroupv2" } }, "system.slice/app.service/worker", "!="), { drop: null }],
    ];
    expect(
      outcome({ nftJson: nft("ip site", { out: { hook: "output", type: "filter", prio: 0, rules } }) }),
    ).toEqual(["leaves 10.96.0.10:80"]);
    const other = [
      [match({ socket: { key: "cgroupv2" } }, "system.slice/other.service", "!="), { drop: null }],
    ];
    expect(
      outcome({
        nftJson: nft("ip site", { out: { hook: "output", type: "filter", prio: 0, rules: other } }),
      }),
    ).toEqual(["dropped 10.96.0.10:80"]);
    expect(does("-A OUTPUT -m cgroup ! --path system.slice/app.service/worker -j DROP")).toBe("drop");
  });

  test("a mark routes a packet anew behind mangle and chains of type route, never behind a filter chain", () => {
    const marked: World = {
      ...WORLD,
      route: ({ to, mark = 0n }) => (mark === 0x10n ? { type: "local", device: "lo", source: to } : REMOTE),
    };
    const mark = (to: number) => [{ mangle: { key: { meta: { key: "mark" } }, value: to } }];
    const site = (type: string, prio: number, to: number) => ({
      hook: "output",
      type,
      prio,
      rules: [mark(to)],
    });
    const ends = (listing: Partial<typeof NONE>) => outcome(listing, undefined, marked);
    expect(ends({ nftJson: nft("ip site", { out: site("route", -150, 0x10) }) })).toEqual([
      "delivered 10.96.0.10:80",
    ]);
    expect(ends({ nftJson: nft("ip site", { out: site("filter", 0, 0x10) }) })).toEqual([
      "leaves 10.96.0.10:80",
    ]);
    expect(
      ends({ nftJson: nft("ip site", { out: site("route", -150, 0x10), later: site("filter", 0, 0) }) }),
    ).toEqual(["delivered 10.96.0.10:80"]);
    const mangle = "*mangle\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j MARK --set-xmark 0x10/0x10\nCOMMIT\n";
    expect(ends({ legacySave: mangle })).toEqual(["delivered 10.96.0.10:80"]);
  });

  test("what was sent from loopback and then translated to elsewhere ends there, ahead of any refusal", () => {
    const rules = (mark: string) => ({
      legacySave: `*mangle\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j MARK --set-xmark ${mark}/0xffffffff\nCOMMIT\n*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j DNAT --to-destination 10.244.0.3\nCOMMIT\n*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REJECT --reject-with tcp-reset\nCOMMIT\n`,
    });
    const loopback = { address: addressNumber("127.0.0.1") ?? 0n, port: span(80) };
    const packet: Packet = { ...PACKET, tracking: "not yet", from: loopback, to: loopback, out: "lo" };
    const world: World = {
      ...WORLD,
      route: (question) =>
        question.mark === 0x10n
          ? { type: "local", device: "lo", source: undefined }
          : question.from === loopback.address && question.to !== loopback.address
            ? { ...REMOTE, type: "unreachable", refused: "Invalid argument" }
            : WORLD.route(question),
    };
    expect(outcome(rules("0x0"), packet, world)).toEqual(["unroutable 10.244.0.3:80"]);
    // A mark that leads everything to lo lets it stay.
    expect(outcome(rules("0x10"), packet, world)).toEqual(["rejected 10.244.0.3:80"]);
    expect(outcome(rules("0x0"))).toEqual(["rejected 10.244.0.3:80"]);
  });

  test("a native rule in iptables' own table is read as nft says it", () => {
    const rules = [
      [match(payload("ip", "daddr"), { set: ["10.96.0.10"] }), { drop: null }],
      [{ xt: { type: "match", name: "owner" } }, { accept: null }],
    ];
    const save =
      "*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j DROP\n-A OUTPUT -m owner --uid-owner 1000 -j ACCEPT\nCOMMIT\n";
    const listing = {
      nftSave: save,
      nftJson: nft("ip filter", { OUTPUT: { hook: "output", type: "filter", prio: 0, rules } }),
    };
    expect(outcome(listing)).toEqual(["dropped 10.96.0.10:80"]);
    expect(outcome(listing, { ...PACKET, to: { ...PACKET.to, address: 1n } })).toEqual(["leaves 0.0.0.1:80"]);
  });
});

/** A machine that answers with fixed texts. */
function machine(
  answers: Record<string, string>,
  files: Record<string, string> = {},
): Pick<Host, "run" | "files"> {
  return {
    run: async ({ argv }) => {
      const found = Object.entries(answers).find(([start]) => argv.join(" ").startsWith(start));
      return { code: found === undefined ? 2 : 0, stdout: found?.[1] ?? "", stderr: "" };
    },
    files: { readText: async (path: string) => files[path] } as Host["files"],
  };
}

describe("the report", () => {
  const answers = {
    "iptables-nft-save": ISTIO,
    "ss -ltnpH": 'LISTEN 0 4096 0.0.0.0:15001 0.0.0.0:* users:(("envoy",pid=7,fd=3))\n',
    "ip -4 -j route get 127.0.0.1":
      '[{"type":"local","dst":"127.0.0.1","dev":"lo","prefsrc":"127.0.0.1","cache":["local"]}]',
    "ip -4 -j route get": '[{"dst":"10.96.0.10","dev":"eth0","prefsrc":"10.200.0.1","cache":[]}]',
  };
  const question = {
    to: { address: "10.96.0.10", port: 80 },
    protocol: "tcp",
    by: { sender: { uid: 1000, gid: 1000, cgroup: undefined }, label: "app" },
  } as const;

  test("one sentence a hop and one verdict", async () => {
    const report = await traceStatic(machine(answers), question);
    expect(report).toMatchObject({
      packet: "tcp of app to 10.96.0.10:80",
      verdict: "reaches Envoy's outbound listener 15001 with original destination 10.96.0.10:80",
      certain: true,
      because: [],
    });
    expect(report.ends[0]?.hops.map(({ sentence }) => sentence)).toEqual([
      "In OUTPUT, iptables-nft nat OUTPUT, a rule of istio-iptables sends it on to chain ISTIO_OUTPUT.",
      "In OUTPUT, iptables-nft nat ISTIO_OUTPUT, a rule of istio-iptables changes its destination from 10.96.0.10:80 to 127.0.0.1:15001.",
    ]);
  });

  test("the kernel's instructions are asked for where nft may not print the family, and nowhere else", async () => {
    const rules = [[match({ meta: { key: "l4proto" } }, "tcp"), { reject: { type: "tcp reset" } }]];
    const chains = { out: { hook: "output", type: "filter", prio: 0, rules } };
    const words = (table: string): string =>
      `table ${table} { # handle 1\n\tchain out { # handle 2\n\t\tmeta l4proto tcp reject with tcp reset # handle 1\n\t}\n}\n`;
    const asked = async (table: string): Promise<[string[], string]> => {
      const host = machine({
        ...answers,
        "iptables-nft-save": "",
        "nft -j list ruleset": nft(table, chains),
        "nft -a list ruleset": `table inet other { # handle 7\n\tchain x {\n\t}\n}\n${words(table)}`,
        "nft --debug=netlink": `${table} out 1 \n  [ meta load nfproto => reg 1 ]\n  [ cmp eq reg 1 0x0000000a ]\n  [ reject type 1 code 0 ]\n\n${words(table)}`,
      });
      const commands: string[] = [];
      const report = await traceStatic(
        {
          ...host,
          run: async (command) => {
            commands.push(command.argv.join(" "));
            return await host.run(command);
          },
        },
        question,
      );
      return [commands.filter((command) => command.includes("--debug")), report.verdict];
    };
    expect(await asked("inet site")).toEqual([
      ["nft --debug=netlink list table inet site"],
      "leaves by eth0 to 10.96.0.10:80 past Envoy",
    ]);
    expect(await asked("ip site")).toEqual([[], expect.stringMatching(/^is refused by the rule/)]);
  });

  describe("of a service with several endpoints", () => {
    const service = (svc: readonly string[], more = ""): string =>
      `*nat
:OUTPUT ACCEPT [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SEP-B - [0:0]
-A OUTPUT -d 10.96.0.10/32 -j KUBE-SVC-A
${svc.join("\n")}
-A KUBE-SEP-A -p tcp -j DNAT --to-destination 10.244.0.2:8080
-A KUBE-SEP-B -p tcp -j DNAT --to-destination 10.244.0.3:8080
COMMIT
${more}`;
    const BALANCED = [
      "-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A",
      "-A KUBE-SVC-A -j KUBE-SEP-B",
    ];
    const traced = async (save: string) =>
      await traceStatic(machine({ ...answers, "iptables-nft-save": save }), question);

    test("chance takes one of them, and the way is certain", async () => {
      expect(await traced(service(BALANCED))).toMatchObject({
        verdict:
          "reaches one of the pods 10.244.0.2:8080, 10.244.0.3:8080 by eth0 past Envoy with original destination 10.96.0.10:80",
        certain: true,
        because: [`chance or a count decides (in \`${BALANCED[0]}\`)`],
      });
    });

    test("so does a map of nft over a random number", async () => {
      const key = { numgen: { mode: "random", mod: 2, offset: 0 } };
      const data = {
        set: [
          [0, "10.244.0.2"],
          [1, "10.244.0.3"],
        ],
      };
      const rules = [[{ dnat: { family: "ip", addr: { map: { key, data } }, port: 8080 } }]];
      const nftJson = nft("ip site", { nat: { ...KUBE.nat, rules } });
      const host = machine({ ...answers, "iptables-nft-save": "", "nft -j list ruleset": nftJson });
      expect(await traceStatic(host, question)).toMatchObject({
        verdict:
          "reaches one of the targets 10.244.0.2:8080, 10.244.0.3:8080 by eth0 past Envoy with original destination 10.96.0.10:80",
        certain: true,
      });
    });

    test.each([
      ["a filter that drops one of them", BALANCED, "-A OUTPUT -d 10.244.0.2/32 -j DROP"],
      ["an endpoint only now and then", BALANCED.slice(0, 1), ""],
      [
        "another reason than chance",
        ["-A KUBE-SVC-A -m bpf --bytecode 1 -j KUBE-SEP-A", "-A KUBE-SVC-A -j KUBE-SEP-B"],
        "",
      ],
    ])("%s leaves the way open", async (_what, svc, rule) => {
      const filter = `*filter\n:OUTPUT ACCEPT [0:0]\n${rule}\nCOMMIT\n`;
      const report = await traced(service(svc, filter));
      expect(report).toMatchObject({ certain: false, verdict: expect.stringMatching(/^may go 2 ways: /) });
      expect(report.because).toHaveLength(1);
    });
  });

  test("a redirect to nobody is refused", async () => {
    const report = await traceStatic(machine({ ...answers, "ss -ltnpH": "" }), question);
    expect(report.verdict).toBe(
      "is refused: nobody listens on 127.0.0.1:15001, to which it was redirected from 10.96.0.10:80",
    );
  });

  test("without CAP_NET_ADMIN the refusal is an error with the next step", async () => {
    const host = machine({});
    host.run = async () => ({ code: 4, stdout: "", stderr: "Could not fetch rule set: Permission denied" });
    await expect(traceStatic(host, question)).rejects.toMatchObject({ code: "RULES_PRIVILEGE" });
  });
});

describe("who it is", () => {
  const host = machine(
    {
      "getent passwd www-data": "www-data:x:33:33::/var/www:/bin/sh\n",
      "getent passwd app": "",
      "systemctl show -p LoadState -p MainPID -p User -p ControlGroup -- app.service":
        "LoadState=loaded\nMainPID=77\nUser=www-data\nControlGroup=/system.slice/app.service\n",
      "systemctl show -p LoadState -p MainPID -p User -p ControlGroup -- stopped.service":
        "LoadState=loaded\nMainPID=0\nUser=www-data\nControlGroup=\n",
      "systemctl show": "LoadState=not-found\nMainPID=0\n",
    },
    { "/proc/77/status": "Name:\tapp\nUid:\t1\t2\t3\t44\nGid:\t1\t2\t3\t55\n" },
  );
  test.each([
    ["www-data", { uid: 33, gid: 33, cgroup: undefined }],
    ["4711", { uid: 4711, gid: undefined, cgroup: undefined }],
    ["app", { uid: 44, gid: 55, cgroup: "system.slice/app.service" }],
    ["app.service", { uid: 44, gid: 55, cgroup: "system.slice/app.service" }],
    ["stopped.service", { uid: 33, gid: 33, cgroup: undefined }],
  ])("%s", async (who, want) => expect(await resolveSender(host, who)).toEqual(want));

  test.each([
    ["nobody-knows", "there is no user and no unit called `nobody-knows`"],
    ["gone.service", "there is no unit called `gone.service`"],
  ])("%s is an error that names it", async (who, message) => {
    await expect(resolveSender(host, who)).rejects.toMatchObject({
      code: "USAGE",
      message: expect.stringContaining(message) as string,
    });
  });
});

describe("the kernel's own trace", () => {
  const packet = (place: string, to: string, port: number) =>
    `trace id 1 ${place} packet: oif "lo" ip saddr 10.0.0.1 ip daddr ${to} ip dscp cs0 ip protocol tcp tcp sport 4 tcp dport ${port} tcp flags == syn `;
  const TEXT = [
    packet("inet vmmesh-trace output", "10.96.0.10", 80),
    "trace id 1 inet vmmesh-trace output rule meta nftrace set 1 (verdict continue)",
    packet("ip nat OUTPUT", "10.96.0.10", 80),
    "trace id 1 ip nat OUTPUT rule  counter packets 3 bytes 180 jump ISTIO_OUTPUT (verdict jump ISTIO_OUTPUT)",
    packet("inet vmmesh-trace postrouting", "127.0.0.1", 15001),
    packet("inet vmmesh-trace input", "127.0.0.1", 15001),
    packet("inet vmmesh-trace output", "10.96.0.10", 80),
  ].join("\n");
  const ends = [{ kind: "envoy", destination: "127.0.0.1:15001", verdict: "", hops: [] }] as const;

  test("the last place and destination of the first packet", () => {
    expect(parseLive(TEXT, "attempt ended with 0: ", "tcp", { ends })).toEqual({
      steps: ["ip nat OUTPUT: rule  jump ISTIO_OUTPUT (verdict jump ISTIO_OUTPUT)"],
      end: "delivered",
      destination: "127.0.0.1:15001",
      attempt: "connected",
      agrees: true,
    });
  });

  test("another destination than the walk's is a contradiction", () => {
    const other = [{ ...ends[0], destination: "10.244.0.2:8080" }];
    expect(parseLive(TEXT, "attempt ended with 124: ", "tcp", { ends: other })).toMatchObject({
      agrees: false,
      attempt: "no answer",
    });
  });

  test("no trace at all is said in words", () => {
    expect(parseLive("", "attempt ended with 0: ", "tcp", { ends })).toContain("traced nothing");
  });
});
