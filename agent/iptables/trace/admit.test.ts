import { describe, expect, test } from "vitest";
import { parseSave } from "../parse.ts";
import { type Admission, admission, difference, type Place, placeOf } from "./admit.ts";
import { inputRuleset } from "./input.ts";

const ADDRESSES = [
  { device: "lo", address: "127.0.0.1" },
  { device: "eth0", address: "192.0.2.1" },
  { device: "eth0", address: "fe80::1" },
  { device: "eth1", address: "198.51.100.1" },
  { device: "docker0", address: "172.17.0.1" },
];

function place(policy: string, rules: readonly string[]): Place {
  const text = `*filter\n:INPUT ${policy} [0:0]\n:X - [0:0]\n${rules.join("\n")}\nCOMMIT\n`;
  const saves = [{ backend: "nft", family: 4, tables: parseSave(text) }] as const;
  const of = (family: 4 | 6) => inputRuleset(saves, [], family);
  return placeOf({ rules: { 4: of(4), 6: of(6) }, ipSets: new Map() }, ADDRESSES, []);
}

function at(device: string, where: Place, captured: "captured" | "as it is" = "as it is"): Admission {
  const door = where.doors.find((each) => each.device === device);
  if (door === undefined) throw new Error(`no door ${device}`);
  return admission(where, door, 9000, captured);
}

test("doors are the addresses that others reach: not lo, not link-local, not a bridge of containers", () => {
  expect(place("ACCEPT", []).doors.map(({ device, address }) => `${device} ${address}`)).toEqual([
    "eth0 192.0.2.1",
    "eth1 198.51.100.1",
  ]);
});

describe("a new connection to 9000 by eth0", () => {
  test.for([
    { name: "an empty firewall", policy: "ACCEPT", rules: [], want: "yes" },
    { name: "default deny", policy: "DROP", rules: [], want: "no" },
    {
      name: "established only",
      policy: "DROP",
      rules: ["-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"],
      want: "no",
    },
    { name: "loopback only", policy: "DROP", rules: ["-A INPUT -i lo -j ACCEPT"], want: "no" },
    {
      name: "senders on loopback only",
      policy: "DROP",
      rules: ["-A INPUT -s 127.0.0.0/8 -j ACCEPT"],
      want: "no",
    },
    {
      name: "not from loopback",
      policy: "ACCEPT",
      rules: ["-A INPUT ! -i lo -p tcp -m tcp --dport 9000 -j REJECT --reject-with tcp-reset"],
      want: "no",
    },
    {
      name: "a range",
      policy: "DROP",
      rules: ["-A INPUT -p tcp -m tcp --dport 8000:9999 -j ACCEPT"],
      want: "yes",
    },
    {
      name: "a chain that returns",
      policy: "DROP",
      rules: ["-A INPUT -j X", "-A X -p udp -j ACCEPT", "-A INPUT -p tcp -j ACCEPT"],
      want: "yes",
    },
    { name: "another interface", policy: "DROP", rules: ["-A INPUT -i eth1 -p tcp -j ACCEPT"], want: "no" },
    {
      name: "another address",
      policy: "DROP",
      rules: ["-A INPUT -d 192.0.2.9/32 -p tcp -j ACCEPT"],
      want: "no",
    },
    {
      name: "a source network: it depends",
      policy: "DROP",
      rules: ["-A INPUT -s 10.0.0.0/8 -p tcp -j ACCEPT"],
      want: "may",
    },
    { name: "every source", policy: "DROP", rules: ["-A INPUT -s 0.0.0.0/0 -p tcp -j ACCEPT"], want: "yes" },
    {
      name: "a set that cannot be read",
      policy: "ACCEPT",
      rules: ["-A INPUT -m set --match-set x src -j DROP"],
      want: "may",
    },
    {
      name: "a program decides",
      policy: "ACCEPT",
      rules: ["-A INPUT -j NFQUEUE --queue-num 0"],
      want: "may",
    },
  ])("$name: $want", ({ policy, rules, want }) => {
    const { answer, because } = at("eth0", place(policy, rules));
    expect(answer).toBe(want);
    expect(because.length > 0).toBe(want === "may");
  });
});

test("by the interface that is opened it is let in, by the other one it is not", () => {
  const where = place("DROP", ["-A INPUT -i eth1 -p tcp -j ACCEPT"]);
  expect([at("eth0", where).answer, at("eth1", where).answer]).toEqual(["no", "yes"]);
});

const NET = { prefix: { addr: "10.0.0.0", len: 8 } };

describe("what capture changes", () => {
  const OPEN = "-A INPUT -p tcp -m tcp --dport 9000 -j ACCEPT";
  const DNAT = "-A INPUT -m conntrack --ctstate DNAT -j ACCEPT";
  const SOME = "-A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 9000 -j ACCEPT";
  test.for([
    { name: "nothing without a firewall", policy: "ACCEPT", rules: [], want: undefined },
    { name: "it shuts", policy: "DROP", rules: [OPEN], want: "shuts" },
    { name: "it opens", policy: "DROP", rules: [DNAT], want: "opens" },
    { name: "nothing where both are let in", policy: "DROP", rules: [OPEN, DNAT], want: undefined },
    { name: "it shuts for some", policy: "DROP", rules: [SOME], want: "shuts" },
    { name: "it opens for some", policy: "DROP", rules: [SOME, DNAT], want: "opens" },
    {
      name: "nothing where one rule asks every sender",
      policy: "ACCEPT",
      rules: ["-A INPUT -s 10.0.0.0/8 -j DROP"],
      want: undefined,
    },
    {
      name: "one rule asks, and what it leads to is turned round",
      policy: "DROP",
      rules: ["-A INPUT -s 10.0.0.0/8 -g X", DNAT, "-A X -p tcp -m tcp --dport 9000 -j ACCEPT"],
      want: "opens or shuts",
    },
    {
      name: "nothing where several rules ask, one behind the other",
      policy: "DROP",
      rules: [
        "-A INPUT -s 10.9.0.0/16 -j DROP",
        "-A INPUT -s 10.0.0.0/8 -j ACCEPT",
        "-A INPUT -m limit --limit 9/second -j ACCEPT",
      ],
      want: undefined,
    },
    {
      name: "nothing where twenty networks are let in",
      policy: "DROP",
      rules: Array.from({ length: 20 }, (_, net) => `-A INPUT -s 10.${net}.0.0/16 -j ACCEPT`),
      want: undefined,
    },
    {
      name: "more rules ask than are told apart",
      policy: "DROP",
      rules: Array.from({ length: 140 }, (_, net) => `-A INPUT -s 10.0.${net}.0/24 -j ACCEPT`),
      want: "opens or shuts",
    },
    {
      name: "nothing where two rules ask the same of the sender",
      policy: "DROP",
      rules: [SOME, "-A INPUT -s 10.0.0.0/8 -m conntrack --ctstate DNAT -j ACCEPT"],
      want: undefined,
    },
    {
      name: "one asks the opposite",
      policy: "DROP",
      rules: [SOME, "-A INPUT ! -s 10.0.0.0/8 -m conntrack --ctstate DNAT -j ACCEPT"],
      want: "opens or shuts",
    },
    {
      name: "two rules that nobody can compare",
      policy: "DROP",
      rules: [SOME, "-A INPUT -s 10.0.0.0/9 -m conntrack --ctstate DNAT -j ACCEPT"],
      want: "opens or shuts",
    },
  ])("$name", ({ policy, rules, want }) => {
    const where = place(policy, rules);
    const [door] = where.doors;
    expect(door && difference(where, door, 9000)?.effect).toBe(want);
  });

  const left = (protocol: string, field: string) => ({ payload: { protocol, field } });
  const from = (right: unknown) => ({ match: { op: "==", left: left("ip", "saddr"), right } });
  const to = (right: number) => ({ match: { op: "==", left: left("tcp", "dport"), right } });
  const ACCEPT = { accept: null };
  const pair = { concat: [left("ip", "saddr"), left("tcp", "dport")] };
  const pairs = (...of: [unknown, number][]) => of.map(([net, port]) => ({ concat: [net, port] }));
  test.for([
    {
      name: "one set of senders, asked for both",
      rules: [
        [from({ set: [NET, "192.0.2.77"] }), to(9000), ACCEPT],
        [from({ set: [NET, "192.0.2.77"] }), to(15_006), ACCEPT],
      ],
      want: undefined,
    },
    {
      name: "two sets",
      rules: [
        [from({ set: [NET, "192.0.2.77"] }), to(9000), ACCEPT],
        [from({ set: [NET] }), to(15_006), ACCEPT],
      ],
      want: "opens or shuts",
    },
    {
      name: "one set of pairs, the same network for each port",
      rules: [
        [{ match: { op: "==", left: pair, right: { set: pairs([NET, 9000], [NET, 15_006]) } } }, ACCEPT],
      ],
      want: undefined,
    },
    {
      name: "one set of pairs, another network for each port",
      rules: [
        [
          { match: { op: "==", left: pair, right: { set: pairs([NET, 9000], ["192.0.2.77", 15_006]) } } },
          ACCEPT,
        ],
      ],
      want: "opens or shuts",
    },
    {
      name: "one map of pairs, another network for each port",
      rules: [
        [
          {
            vmap: {
              key: pair,
              data: { set: pairs([NET, 9000], ["192.0.2.77", 15_006]).map((each) => [each, ACCEPT]) },
            },
          },
        ],
      ],
      want: "opens or shuts",
    },
    {
      name: "a set that nobody can read",
      rules: [
        [from("@gone"), to(9000), ACCEPT],
        [from("@gone"), to(15_006), ACCEPT],
      ],
      want: "opens or shuts",
    },
  ])("of nft, $name", ({ rules, want }) => {
    const at = { family: "inet", table: "own", chain: "in" };
    const base = { type: "filter", hook: "input", prio: 0, policy: "drop" };
    const nftJson = JSON.stringify({
      nftables: [
        { table: { family: "inet", name: "own" } },
        { chain: { ...at, name: "in", ...base } },
        ...rules.map((expr, handle) => ({ rule: { ...at, handle, expr } })),
      ],
    });
    const natives = [{ table: "inet own", listing: { nftJson, nftText: "", nftNetlink: "" } }];
    const input = { 4: inputRuleset([], natives, 4), 6: inputRuleset([], natives, 6) };
    const where = placeOf({ rules: input, ipSets: new Map() }, ADDRESSES, []);
    const [door] = where.doors;
    expect(door && difference(where, door, 9000)?.effect).toBe(want);
  });

  test.for([
    { rules: [SOME], certain: true },
    { rules: [SOME, DNAT], certain: true },
    // Whoever is in the second network is in the first.
    { rules: [SOME, "-A INPUT -s 10.0.0.0/9 -m conntrack --ctstate DNAT -j ACCEPT"], certain: false },
    { rules: ["-A INPUT -m u32 --u32 0x0=0x1 -j ACCEPT"], certain: false },
  ])("certain: $certain, of $rules", ({ rules, certain }) => {
    const where = place("DROP", rules);
    const [door] = where.doors;
    expect(door && difference(where, door, 9000)?.certain).toBe(certain);
  });
});
