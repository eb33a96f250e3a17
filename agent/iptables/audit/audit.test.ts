import { describe, expect, test } from "vitest";
import { MACHINE, WISH as USUAL } from "../../../test/fakes/capture.ts";
import type { BackendEvidence } from "../backend.ts";
import { parseListeners, parseRule, parseSave } from "../parse.ts";
import type { CaptureWish } from "../plan/wish.ts";
import { planCapture } from "../plan.ts";
import type { SeenTable } from "../read.ts";
import { renderRule, tableRules } from "../render.ts";
import { isHook } from "../rules.ts";
import { inputRuleset } from "../trace/input.ts";
import { judge } from "./audit.ts";
import type { Evidence, Save, Surroundings, Unit } from "./evidence.ts";
import { auditExitCode } from "./finding.ts";
import { mismatchFindings } from "./mismatch.ts";
import { NOTHING_AROUND } from "./surroundings.ts";

const WISH: CaptureWish = { ...USUAL, dns: { servers: ["127.0.0.53"] } };

/** What `readTables` finds right after the plan was applied. */
function asApplied(plan = planCapture(WISH, MACHINE)): SeenTable[] {
  return plan.families.flatMap((wanted) =>
    (["raw", "mangle", "nat"] as const).flatMap((table) => {
      const rules = tableRules(wanted, table).map((rule) => ({
        rule,
        line: `-A ${rule.chain} ${renderRule(rule, wanted.family, { comments: true })}`,
      }));
      if (rules.length === 0) return [];
      return [
        {
          family: wanted.family,
          table,
          own: rules.filter(({ rule }) => !isHook(rule.chain)).map(({ line }) => line),
          jumps: rules.filter(({ rule }) => isHook(rule.chain)).map(({ line }) => ({ table, line })),
          ahead: [],
          benign: [],
          untracking: [],
          missing: [],
        },
      ];
    }),
  );
}

const AROUND: Surroundings = {
  ...NOTHING_AROUND,
  addresses: [
    { device: "lo", address: "127.0.0.1" },
    { device: "eth0", address: "192.0.2.1" },
  ],
};
const BACKEND: BackendEvidence = { installed: true, rules: 0, natRules: 0, kubernetes: false };
const NFT = { "ip vmmesh": "guard", "ip6 vmmesh": "guard6", "inet vmmesh-fence": "fence" };
const LISTENERS = parseListeners(
  [
    'LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=10,fd=3))',
    'LISTEN 0 128 0.0.0.0:15001 0.0.0.0:* users:(("envoy",pid=20,fd=3))',
    'LISTEN 0 128 0.0.0.0:15006 0.0.0.0:* users:(("envoy",pid=20,fd=4))',
    'LISTEN 0 128 127.0.0.1:15053 0.0.0.0:* users:(("node",pid=30,fd=4))',
    'LISTEN 0 128 0.0.0.0:9000 0.0.0.0:* users:(("app",pid=40,fd=4))',
  ].join("\n"),
);

const HEALTHY: Evidence = {
  noPrivilege: undefined,
  confirmed: {
    plan: planCapture(WISH, MACHINE),
    printed: asApplied().map(({ family, table, own }) => ({ family, table, own })),
    nft: NFT,
  },
  overdueTrial: false,
  tables: asApplied(),
  strayRules: [],
  nftNow: NFT,
  baseChains: [],
  saves: [],
  dormant: [],
  around: AROUND,
  backends: { nft: { ...BACKEND, rules: 40, natRules: 20 }, legacy: BACKEND },
  legacyTables: [],
  input: inputRules("ACCEPT", []),
  listeners: LISTENERS,
  udpListeners: [{ address: "127.0.0.1", port: 15_053, processes: [] }],
  processes: [
    { pid: 1, uid: 0, name: "systemd" },
    { pid: 20, uid: 989, name: "envoy" },
    { pid: 30, uid: 990, name: "MainThread" },
    { pid: 40, uid: 1000, name: "app" },
  ],
  sshPorts: [22],
  ipv6Default: true,
  persisted: [],
  refusal: undefined,
  traces: [],
  routing: [],
};
const UNJOINED: Evidence = {
  ...HEALTHY,
  confirmed: undefined,
  tables: [],
  nftNow: {},
  listeners: [],
  processes: [],
};

/** The same table of nat, IPv4, changed. */
function withNat(change: Partial<SeenTable>): SeenTable[] {
  return HEALTHY.tables.map((seen) =>
    seen.table === "nat" && seen.family === 4 ? { ...seen, ...change } : seen,
  );
}

function inputRules(policy: string, lines: readonly string[]): Evidence["input"] {
  const chains = new Set(lines.map((line) => line.split(" ")[1]).filter((name) => name !== "INPUT"));
  const text = [
    `*filter\n:INPUT ${policy} [0:0]`,
    ...[...chains].map((name) => `:${name} - [0:0]`),
    ...lines,
    "COMMIT\n",
  ].join("\n");
  const saves = [{ backend: "nft", family: 4, tables: parseSave(text) }] as const;
  return { rules: { 4: inputRuleset(saves, [], 4), 6: inputRuleset(saves, [], 6) }, ipSets: new Map() };
}

const natV4 = HEALTHY.tables.find((seen) => seen.table === "nat" && seen.family === 4);
const KUBE_NFT = { table: "ip kube-proxy", chain: "nat-output", type: "nat", hook: "output", priority: -100 };
const noGuard = { "inet vmmesh-fence": "fence" };

function save(text: string): Save {
  return { backend: "nft", family: 4, tables: parseSave(`${text}\nCOMMIT\n`), complaints: [] };
}
const saved = (text: string): Evidence => ({ ...HEALTHY, saves: [save(text)] });
const around = (change: Partial<Surroundings>): Evidence => ({
  ...HEALTHY,
  around: { ...AROUND, ...change },
});
const unitOf = (id: string, after: readonly string[] = []): Unit => ({
  id,
  active: true,
  enabled: true,
  after,
});
const TPROXY: Evidence = {
  ...HEALTHY,
  confirmed: {
    plan: { ...planCapture(WISH, MACHINE), routeTable: 133 },
    printed: HEALTHY.confirmed?.printed ?? [],
    nft: NFT,
  },
};
const FLOW: Partial<Surroundings> = {
  flows: [
    "tcp      6 431999 ESTABLISHED src=10.200.0.1 dst=10.96.0.10 sport=40000 dport=80 src=10.244.0.2 dst=10.200.0.1 sport=8080 dport=40000 [ASSURED] mark=0 use=1",
  ],
  socketOwners: new Map([[40_000, 1000]]),
};

const FIRING: readonly { id: string; name: string; evidence: Evidence }[] = [
  {
    id: "FW001",
    name: "somebody ran iptables -t nat -F",
    evidence: { ...HEALTHY, tables: withNat({ missing: ["OUTPUT"], jumps: [] }) },
  },
  {
    id: "FW002",
    name: "KUBE-SERVICES was put ahead",
    evidence: {
      ...HEALTHY,
      tables: withNat({
        ahead: [{ hook: "OUTPUT", line: "-A OUTPUT -j KUBE-SERVICES", by: "kube-proxy", position: 1 }],
      }),
    },
  },
  {
    id: "FW003",
    name: "Calico's empty chain is ahead",
    evidence: { ...HEALTHY, tables: withNat({ benign: ["-A OUTPUT -j cali-OUTPUT"] }) },
  },
  {
    id: "FW004",
    name: "two installers inserted the jump",
    evidence: {
      ...HEALTHY,
      tables: withNat({ jumps: [...(natV4?.jumps ?? []), ...(natV4?.jumps ?? [])] }),
    },
  },
  {
    id: "FW005",
    name: "a rule of ours was deleted",
    evidence: { ...HEALTHY, tables: withNat({ own: (natV4?.own ?? []).slice(1) }) },
  },
  {
    id: "FW005",
    name: "our rules stand in another order",
    evidence: { ...HEALTHY, tables: withNat({ own: [...(natV4?.own ?? [])].reverse() }) },
  },
  {
    id: "FW006",
    name: "left, but a chain stayed",
    evidence: {
      ...UNJOINED,
      strayRules: ['nat: -A ISTIO_OUTPUT -m comment --comment "vmmesh: x" -j RETURN'],
    },
  },
  {
    id: "FW007",
    name: "pilot-agent's rules on a machine that is not joined",
    evidence: { ...UNJOINED, strayRules: ["nat: -A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN"] },
  },
  {
    id: "FW007",
    name: "a rule without our comment in our chain",
    evidence: {
      ...HEALTHY,
      tables: withNat({ own: [...(natV4?.own ?? []), "-A ISTIO_OUTPUT -j RETURN"] }),
    },
  },
  {
    id: "FW008",
    name: "kube-proxy in nft mode, and no guard",
    evidence: { ...HEALTHY, nftNow: noGuard, baseChains: [KUBE_NFT] },
  },
  {
    id: "FW008",
    name: "somebody took the guard's priority",
    evidence: { ...HEALTHY, baseChains: [{ ...KUBE_NFT, priority: -120 }] },
  },
  {
    id: "FW009",
    name: "a nat chain ahead of the guard",
    evidence: { ...HEALTHY, baseChains: [{ ...KUBE_NFT, priority: -150 }] },
  },
  {
    id: "FW010",
    name: "kube-proxy changed its mode",
    evidence: {
      ...HEALTHY,
      saves: [
        save("*nat\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\n-A PREROUTING -j KUBE-SERVICES"),
      ],
      baseChains: [KUBE_NFT],
    },
  },
  {
    id: "FW011",
    name: "an IPVS address outside the service network that we know",
    evidence: around({ addresses: [{ device: "kube-ipvs0", address: "172.30.0.10" }] }),
  },
  {
    id: "FW012",
    name: "Cilium balances in connect(2)",
    evidence: around({
      socketPrograms: ["/sys/fs/cgroup: 3149 cgroup_inet4_connect multi cil_sock4_connect"],
    }),
  },
  {
    id: "FW015",
    name: "somebody wrote into iptables' table with nft",
    evidence: {
      ...HEALTHY,
      saves: [
        {
          backend: "nft",
          family: 4,
          tables: [],
          complaints: ["# Table `nat' contains incompatible base-chains, use 'nft' tool to list them."],
        },
      ],
    },
  },
  { id: "FW016", name: "the table sleeps", evidence: { ...HEALTHY, dormant: ["ip nat"] } },
  {
    id: "FW018",
    name: "somebody untracks web traffic",
    evidence: saved("*raw\n-A OUTPUT -p tcp -m tcp --dport 80 -j CT --notrack"),
  },
  {
    id: "FW018",
    name: "a chain of somebody's untracks a declared port",
    evidence: saved("*raw\n-A PREROUTING -j fast\n-A fast -p tcp -m tcp --dport 9000 -j NOTRACK"),
  },
  {
    id: "FW020",
    name: "default deny lets 9000 in, but it arrives as 15006",
    evidence: {
      ...HEALTHY,
      input: inputRules("DROP", ["-A INPUT -p tcp -m tcp --dport 9000 -j ACCEPT"]),
    },
  },
  {
    id: "FW020",
    name: "9000 is open to one network only, and 15006 to nobody",
    evidence: {
      ...HEALTHY,
      input: inputRules("DROP", ["-A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 9000 -j ACCEPT"]),
    },
  },
  {
    id: "FW019",
    name: "9000 is open to one network only, and 15006 to everybody",
    evidence: {
      ...HEALTHY,
      input: inputRules("DROP", [
        "-A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 9000 -j ACCEPT",
        "-A INPUT -m conntrack --ctstate DNAT -j ACCEPT",
      ]),
    },
  },
  {
    id: "FW019",
    name: "rules that nobody here can read judge both",
    evidence: { ...HEALTHY, input: inputRules("ACCEPT", ["-A INPUT -m u32 --u32 0x0=0x1 -j DROP"]) },
  },
  {
    id: "FW022",
    name: "the jump was put back by hand on a Docker host",
    evidence: {
      ...saved("*nat\n-A PREROUTING -p tcp -j ISTIO_INBOUND"),
      around: { ...AROUND, interfaces: ["lo", "eth0", "docker0"] },
    },
  },
  {
    id: "FW023",
    name: "Docker publishes a declared port",
    evidence: saved(
      "*nat\n-A DOCKER ! -i docker0 -p tcp -m tcp --dport 9000 -j DNAT --to-destination 172.17.0.2:80",
    ),
  },
  {
    id: "FW023",
    name: "a NodePort of kube-proxy in nft mode is a declared port",
    evidence: around({ nftNodePorts: [9000] }),
  },
  {
    id: "FW024",
    name: "a redirect lost its --syn",
    evidence: {
      ...HEALTHY,
      tables: withNat({
        own: (natV4?.own ?? []).map((line) => line.replace("-m tcp --tcp-flags FIN,SYN,RST,ACK SYN ", "")),
      }),
    },
  },
  {
    id: "FW027",
    name: "a container maps a thousand uids, and Envoy's is another",
    evidence: around({ uidMap: "         0     100000        500\n" }),
  },
  ...[
    {
      name: "nftables.service flushes all",
      unit: "nftables",
      config: { "/etc/nftables.conf": "#!/usr/sbin/nft -f\nflush ruleset\n" },
    },
    {
      name: "netfilter-persistent replaces nat",
      unit: "netfilter-persistent",
      config: { "/etc/iptables/rules.v4": "*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n" },
    },
    {
      name: "ufw manages the built-in chains",
      unit: "ufw",
      config: { "/etc/default/ufw": "MANAGE_BUILTINS=yes\n", "/etc/ufw/ufw.conf": "ENABLED=yes\n" },
    },
    { name: "firewalld 1.3.3", unit: "firewalld", config: {}, firewalldVersion: "1.3.3" },
    {
      name: "firewalld 2 with direct rules",
      unit: "firewalld",
      config: { "/etc/firewalld/direct.xml": '<direct><rule ipv="ipv4"/></direct>' },
      firewalldVersion: "2.1.1",
    },
    { name: "ferm", unit: "ferm", config: {} },
  ].flatMap(({ name, unit, ...change }) =>
    ["FW030", "FW032"].map((id) => ({
      id,
      name,
      evidence: around({ ...change, units: [unitOf(`${unit}.service`)] }),
    })),
  ),
  {
    id: "FW033",
    name: "three repairs in ten minutes",
    evidence: around({ repairs: [["a jump was missing"], ["a jump was missing"], ["a jump was missing"]] }),
  },
  {
    id: "FW034",
    name: "iptables -t nat -F took kube-proxy's jumps away",
    evidence: saved("*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-X"),
  },
  ...[
    { waitedMs: 1500, strangers: [] },
    { waitedMs: 2, strangers: ["kube-proxy (pid 9) has another /run/xtables.lock than this machine"] },
  ].map((lock) => ({
    id: "FW035",
    name: `legacy, ${lock.waitedMs} ms`,
    evidence: {
      ...around({ lock }),
      backends: { nft: BACKEND, legacy: { ...BACKEND, rules: 4 } },
    },
  })),
  ...[
    "-A OUTPUT -m mark --mark 0x200/0xf00 -j MARK --set-xmark 0x200/0xffffffff",
    "-A PREROUTING -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
  ].map((line) => ({
    id: "FW036",
    name: line,
    evidence: { ...TPROXY, saves: [save(`*mangle\n${line}`)] },
  })),
  {
    id: "FW036",
    name: "a routing rule for the same bits",
    evidence: {
      ...TPROXY,
      around: { ...AROUND, routingRules: ["9:	from all fwmark 0x1/0x1 lookup 2004"] },
    },
  },
  {
    id: "FW038",
    name: "nine tenths full",
    evidence: around({ conntrack: { count: 9000, max: 10_000, lost: 0 } }),
  },
  {
    id: "FW038",
    name: "packets are dropped",
    evidence: around({ conntrack: { count: 1, max: 10_000, lost: 3 } }),
  },
  { id: "FW039", name: "a client from before capture", evidence: around(FLOW) },
  {
    id: "FW013",
    name: "nat rules in both backends",
    evidence: {
      ...HEALTHY,
      backends: { nft: { ...BACKEND, natRules: 3 }, legacy: { ...BACKEND, rules: 2, natRules: 2 } },
    },
  },
  {
    id: "FW013",
    name: "rules of ours in the other backend",
    evidence: {
      ...HEALTHY,
      saves: [
        {
          ...save('*nat\n:ISTIO_OUTPUT - [0:0]\n-A ISTIO_OUTPUT -m comment --comment "vmmesh: x" -j RETURN'),
          backend: "legacy",
        },
      ],
    },
  },
  {
    id: "FW014",
    name: "a detector left empty legacy tables",
    evidence: { ...HEALTHY, legacyTables: ["nat"] },
  },
  {
    id: "FW017",
    name: "node-local-dns untracks first, and there is no guard",
    evidence: {
      ...HEALTHY,
      nftNow: noGuard,
      tables: HEALTHY.tables.map((seen) =>
        seen.table === "raw"
          ? {
              ...seen,
              untracking: ["-A OUTPUT -d 169.254.20.10/32 -p udp -m udp --dport 53 -j CT --notrack"],
            }
          : seen,
      ),
    },
  },
  {
    id: "FW019",
    name: "the operator drops 9000, capture lets it in",
    evidence: { ...HEALTHY, input: inputRules("ACCEPT", ["-A INPUT -p tcp -m tcp --dport 9000 -j DROP"]) },
  },
  {
    id: "FW021",
    name: "no fence, and INPUT lets everything in",
    evidence: { ...HEALTHY, nftNow: { "ip vmmesh": "guard", "ip6 vmmesh": "guard6" } },
  },
  {
    id: "FW025",
    name: "Envoy is down",
    evidence: { ...HEALTHY, listeners: LISTENERS.filter(({ port }) => port !== 15_001) },
  },
  { id: "FW025", name: "the agent serves names over TCP only", evidence: { ...HEALTHY, udpListeners: [] } },
  {
    id: "FW026",
    name: "Envoy runs as root",
    evidence: { ...HEALTHY, processes: [{ pid: 20, uid: 0, name: "envoy" }] },
  },
  {
    id: "FW026",
    name: "a shell tool runs as Envoy's user",
    evidence: { ...HEALTHY, processes: [...HEALTHY.processes, { pid: 50, uid: 989, name: "curl" }] },
  },
  {
    id: "FW028",
    name: "IPv6 leaves the machine uncaptured",
    evidence: {
      ...HEALTHY,
      confirmed: { plan: planCapture({ ...WISH, ipv6: false }, MACHINE), printed: [], nft: NFT },
      tables: [],
    },
  },
  {
    id: "FW029",
    name: "sshd moved to a port that is captured",
    evidence: { ...HEALTHY, sshPorts: [9000] },
  },
  {
    id: "FW031",
    name: "netfilter-persistent saved our rules",
    evidence: {
      ...HEALTHY,
      persisted: [{ file: "/etc/iptables/rules.v4", line: 7, text: "-A OUTPUT -j ISTIO_OUTPUT" }],
    },
  },
  {
    id: "FW037",
    name: "the way back of TPROXY is gone",
    evidence: { ...HEALTHY, routing: ["the IPv4 rule for Istio's mark was missing"] },
  },
  {
    id: "FW040",
    name: "xt_owner is not there",
    evidence: { ...HEALTHY, refusal: "Couldn't load match `owner'" },
  },
  { id: "FW041", name: "not root", evidence: { ...HEALTHY, noPrivilege: "no CAP_NET_ADMIN" } },
  {
    id: "FW042",
    name: "the fence was deleted",
    evidence: { ...HEALTHY, nftNow: { ...NFT, "inet vmmesh-fence": undefined } },
  },
  {
    id: "FW042",
    name: "the guard was edited",
    evidence: { ...HEALTHY, nftNow: { ...NFT, "ip vmmesh": "other" } },
  },
  {
    id: "FW044",
    name: "a trace rule was forgotten",
    evidence: { ...HEALTHY, traces: ["-A OUTPUT -p tcp -j TRACE"] },
  },
  {
    id: "FW048",
    name: "our units run, and nobody holds the second fence",
    evidence: around({ units: [{ id: "vmmesh-nftmon.service", active: true, enabled: true, after: [] }] }),
  },
  { id: "FW045", name: "a trial was not taken back", evidence: { ...HEALTHY, overdueTrial: true } },
];

describe("every finding fires on its own evidence", () => {
  test.for(FIRING)("$id: $name", ({ id, evidence }) => {
    const found = judge(evidence).find((it) => it.id === id);
    expect(found?.evidence.length).toBeGreaterThan(0);
    expect(found?.remedy).toMatch(/\.$/);
  });

  test("each has a case; FW043 and FW046 need a connection and FW047 the configuration: they have their own", () => {
    const ids = Array.from({ length: 48 }, (_, index) => `FW${String(index + 1).padStart(3, "0")}`);
    expect([...new Set([...FIRING.map(({ id }) => id), "FW043", "FW046", "FW047"])].sort()).toEqual(ids);
  });

  test("FW043: nothing is wrong with the rules, and a connection went past Envoy", () => {
    const past = [{ family: 4, met: "past", seen: "no answer within 2 s" }] as const;
    expect(mismatchFindings(judge(HEALTHY), past).map(({ id }) => id)).toEqual(["FW043"]);
    const explained = judge({ ...HEALTHY, tables: withNat({ missing: ["OUTPUT"], jumps: [] }) });
    expect(mismatchFindings(explained, past)).toEqual([]);
    expect(mismatchFindings(judge(HEALTHY), [{ ...past[0], met: "envoy" }])).toEqual([]);
  });
});

describe("a healthy machine has no finding", () => {
  test.for([
    { name: "joined", evidence: HEALTHY },
    { name: "not joined", evidence: UNJOINED },
    { name: "kube-proxy in nft mode behind the guard", evidence: { ...HEALTHY, baseChains: [KUBE_NFT] } },
    {
      name: "firewalld's nat hooks come after us",
      evidence: {
        ...HEALTHY,
        baseChains: [
          { table: "inet firewalld", chain: "nat_OUTPUT", type: "nat", hook: "output", priority: -90 },
        ],
      },
    },
    {
      name: "iptables-nft's own base chains are not foreign",
      evidence: {
        ...HEALTHY,
        baseChains: [{ table: "ip nat", chain: "OUTPUT", type: "nat", hook: "output", priority: -100 }],
      },
    },
    {
      name: "a firewall that opens what is declared",
      evidence: {
        ...HEALTHY,
        input: inputRules("DROP", ["-A INPUT -p tcp -m multiport --dports 22,9000,15006 -j ACCEPT"]),
      },
    },
    {
      name: "a firewall that asks every sender alike",
      evidence: {
        ...HEALTHY,
        input: inputRules("ACCEPT", [
          "-A INPUT -s 127.0.0.0/8 -j ACCEPT",
          "-A INPUT -s 198.51.100.0/24 -j DROP",
          "-A INPUT -s 10.0.0.0/8 -j ACCEPT",
          "-A INPUT -p tcp -m limit --limit 100/second -j ACCEPT",
          "-A INPUT -p tcp -m tcp --tcp-flags SYN SYN -j DROP",
        ]),
      },
    },
    {
      name: "legacy in use by others",
      evidence: {
        ...HEALTHY,
        legacyTables: ["filter"],
        backends: { nft: BACKEND, legacy: { ...BACKEND, rules: 5 } },
      },
    },
  ])("$name", ({ evidence }) => {
    expect(judge(evidence).filter(({ severity }) => severity !== "info")).toEqual([]);
  });
});

describe("exit code", () => {
  const of = (severity: "critical" | "high" | "medium" | "low" | "info") => ({
    id: "FW000",
    severity,
    title: "",
    evidence: [],
    remedy: "",
    command: "",
  });
  test.for([
    { name: "nothing", severities: [], want: 0 },
    { name: "low and info", severities: ["low", "info"], want: 0 },
    { name: "medium", severities: ["info", "medium"], want: 1 },
    { name: "high", severities: ["high"], want: 1 },
    { name: "critical beside others", severities: ["low", "critical", "high"], want: 2 },
  ] as const)("$name: $want", ({ severities, want }) => {
    expect(auditExitCode(severities.map(of))).toBe(want);
  });
});

test("a rule that is printed is a rule that is read", () => {
  for (const { own } of HEALTHY.tables) for (const line of own) expect(parseRule(line)?.line).toBe(line);
});
