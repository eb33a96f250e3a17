import { expect, test } from "vitest";
import { MACHINE_V4 as MACHINE, WISH as USUAL } from "../../../test/fakes/capture.ts";
import { evidenceOf } from "../backend.ts";
import { parseBaseChains, parseListeners, parseSave } from "../parse.ts";
import type { CaptureWish } from "../plan/wish.ts";
import { planCapture } from "../plan.ts";
import { renderTable, TABLES } from "../render.ts";
import { inputRuleset } from "../trace/input.ts";
import { judge } from "./audit.ts";
import type { Evidence, Save, Surroundings } from "./evidence.ts";
import { NOTHING_AROUND } from "./surroundings.ts";

/** What our own process holds. */
const HELD = { table: "inet vmmesh-hold", chain: "output", type: "filter", hook: "output", priority: 10 };

/** Machines on which other programs do what they do and nothing is wrong, with our rules in place. */
interface Machine {
  readonly name: string;
  /** As their programs leave it: `iptables-save`. */
  readonly rules?: string;
  /** `nft list chains`. */
  readonly chains?: string;
  readonly around?: Partial<Surroundings>;
}

const UFW = `*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
:ufw-not-local - [0:0]
:ufw-logging-deny - [0:0]
-A INPUT -p tcp -m tcp --dport 15006 -m conntrack --ctstate DNAT --ctorigdstport 9000 -j ACCEPT
-A INPUT -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
-A ufw-user-input -p tcp -m tcp --dport 9000 -j ACCEPT
COMMIT
`;

const KUBE = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-AAA - [0:0]
:KUBE-SEP-AAA - [0:0]
:KUBE-EXT-AAA - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "default/web cluster IP" -m tcp --dport 80 -j KUBE-SVC-AAA
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-AAA
-A KUBE-SVC-AAA -j KUBE-SEP-AAA
-A KUBE-SEP-AAA -p tcp -m tcp -j DNAT --to-destination 10.244.0.2:8080
COMMIT
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
`;

const CORPUS: readonly Machine[] = [
  { name: "nobody else" },
  { name: "kube-proxy, iptables", rules: KUBE, around: { forwards: true, interfaces: ["cni0", "veth1"] } },
  {
    name: "kube-proxy, nftables",
    chains: `table ip kube-proxy {
	chain nat-output {
		type nat hook output priority dstnat; policy accept;
	}
	chain filter-output-pre-dnat {
		type filter hook output priority -110; policy accept;
	}
}
`,
    around: { nftNodePorts: [30_080], forwards: true },
  },
  {
    name: "kube-proxy, IPVS",
    rules: `*nat
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
COMMIT
`,
    around: {
      interfaces: ["eth0", "kube-ipvs0"],
      addresses: [{ device: "kube-ipvs0", address: "10.96.0.10" }],
    },
  },
  {
    name: "node-local-dns",
    rules: `*raw
-A PREROUTING -d 169.254.20.10/32 -p tcp -m tcp --dport 53 -j CT --notrack
-A OUTPUT -d 169.254.20.10/32 -p tcp -m tcp --dport 53 -j CT --notrack
-A OUTPUT -s 169.254.20.10/32 -p tcp -m tcp --sport 53 -j CT --notrack
-A OUTPUT -d 169.254.20.10/32 -p udp -m udp --dport 53 -j CT --notrack
COMMIT
`,
    around: { addresses: [{ device: "nodelocaldns", address: "169.254.20.10" }] },
  },
  {
    name: "Docker",
    rules: `*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8088 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*raw
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -p tcp -m tcp --dport 80 -j DROP
COMMIT
`,
    around: { forwards: true, interfaces: ["docker0"] },
  },
  {
    name: "firewalld 2",
    chains: `table inet firewalld {
	chain nat_OUTPUT {
		type nat hook output priority dstnat + 10; policy accept;
	}
}
`,
    around: {
      firewalldVersion: "2.3.0",
      config: {
        "/etc/firewalld/direct.xml": '<?xml version="1.0"?>\n<direct>\n</direct>\n',
        "/etc/firewalld/firewalld.conf": "DefaultZone=public\nFirewallBackend=nftables\n",
      },
      units: [{ id: "firewalld.service", active: true, enabled: true, after: [] }],
    },
  },
  {
    name: "firewalld 1, and our listener hears of its reloads",
    around: {
      firewalldVersion: "1.3.3",
      units: [
        { id: "firewalld.service", active: true, enabled: true, after: [] },
        { id: "vmmesh-nftmon.service", active: true, enabled: false, after: [] },
      ],
    },
  },
  {
    name: "nftables.conf says flush ruleset, and the unit is off",
    around: {
      config: { "/etc/nftables.conf": "#!/usr/sbin/nft -f\n\nflush ruleset\n" },
      units: [{ id: "nftables.service", active: false, enabled: false, after: [] }],
    },
  },
  {
    name: "ufw",
    rules: UFW,
    around: {
      config: { "/etc/default/ufw": "MANAGE_BUILTINS=no\n", "/etc/ufw/ufw.conf": "ENABLED=yes\n" },
      units: [{ id: "ufw.service", active: true, enabled: true, after: [] }],
    },
  },
  {
    name: "netfilter-persistent with a filter of its own",
    around: {
      config: { "/etc/iptables/rules.v4": "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n" },
      units: [{ id: "netfilter-persistent.service", active: true, enabled: true, after: [] }],
    },
  },
  {
    name: "Calico",
    rules: `*raw
:cali-OUTPUT - [0:0]
-A OUTPUT -m comment --comment "cali:tVnHkvAo15HuiPy0" -j cali-OUTPUT
-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j CT --notrack
COMMIT
*nat
:cali-OUTPUT - [0:0]
:cali-fip-dnat - [0:0]
-A OUTPUT -m comment --comment "cali:tVnHkvAo15HuiPy0" -j cali-OUTPUT
-A cali-OUTPUT -j cali-fip-dnat
COMMIT
*mangle
-A cali-PREROUTING -j MARK --set-xmark 0x10000/0x10000
COMMIT
`,
    around: { forwards: true, interfaces: ["cali12345", "vxlan.calico"] },
  },
  {
    name: "Podman",
    chains: `table inet netavark {
	chain OUTPUT {
		type nat hook output priority dstnat; policy accept;
	}
}
`,
    around: { forwards: true, interfaces: ["podman0"] },
  },
  {
    name: "Tailscale",
    rules: `*mangle
-A PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000
-A OUTPUT -m conntrack --ctstate NEW -m mark ! --mark 0x0/0xff0000 -j CONNMARK --save-mark --nfmask 0xff0000 --ctmask 0xff0000
COMMIT
*nat
:ts-postrouting - [0:0]
-A POSTROUTING -j ts-postrouting
-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
COMMIT
`,
    around: { routingRules: ["5210:	from all fwmark 0x80000/0xff0000 lookup 254"] },
  },
  {
    name: "libvirt",
    rules: `*nat
:LIBVIRT_PRT - [0:0]
-A POSTROUTING -j LIBVIRT_PRT
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p tcp -j MASQUERADE --to-ports 1024-65535
COMMIT
*mangle
:LIBVIRT_PRT - [0:0]
-A LIBVIRT_PRT -o virbr0 -p udp -m udp --dport 68 -j CHECKSUM --checksum-fill
COMMIT
`,
    around: { forwards: true, interfaces: ["virbr0", "vnet0"] },
  },
];

const WISH: CaptureWish = { ...USUAL, dns: { servers: ["127.0.0.53"] }, ipv6: false };

function joined({ rules = "", chains = "", around }: Machine, routeTable: number | undefined): Evidence {
  const plan = {
    ...planCapture(WISH, MACHINE),
    ...(routeTable === undefined ? {} : { routeTable }),
  };
  const [family] = plan.families;
  if (family === undefined) throw new Error("the plan has no family");
  const ours = TABLES.map((table) => renderTable(family, table, [], { comments: true }))
    .join("")
    .replace(/^-I (\S+) 1 /gm, "-A $1 ");
  const tables = [...parseSave(ours), ...parseSave(rules)];
  const saved: Save = { backend: "nft", family: 4, tables, complaints: [] };
  const nft = { "ip vmmesh": "guard", "inet vmmesh-fence": "fence" };
  return {
    noPrivilege: undefined,
    confirmed: { plan, printed: [], nft },
    overdueTrial: false,
    tables: [],
    strayRules: [],
    nftNow: nft,
    baseChains: [...parseBaseChains(chains), HELD],
    saves: [saved],
    dormant: [],
    around: {
      ...NOTHING_AROUND,
      uidMap: "         0          0 4294967295\n",
      ...around,
      addresses: [{ device: "eth0", address: "192.0.2.1" }, ...(around?.addresses ?? [])],
    },
    backends: { nft: evidenceOf(tables), legacy: evidenceOf(undefined) },
    legacyTables: [],
    input: { rules: { 4: inputRuleset([saved], [], 4), 6: inputRuleset([], [], 6) }, ipSets: new Map() },
    listeners: parseListeners(
      [
        'LISTEN 0 128 0.0.0.0:15001 0.0.0.0:* users:(("envoy",pid=20,fd=3))',
        'LISTEN 0 128 0.0.0.0:15006 0.0.0.0:* users:(("envoy",pid=20,fd=4))',
        'LISTEN 0 128 127.0.0.1:15053 0.0.0.0:* users:(("node",pid=30,fd=4))',
      ].join("\n"),
    ),
    udpListeners: [{ address: "127.0.0.1", port: 15_053, processes: [] }],
    processes: [{ pid: 20, uid: 989, name: "envoy" }],
    sshPorts: [22],
    ipv6Default: false,
    persisted: [],
    refusal: undefined,
    traces: [],
    routing: [],
  };
}

test.for(CORPUS)("nothing of weight is found beside $name", (machine) => {
  for (const routeTable of [undefined, 133]) {
    const found = judge(joined(machine, routeTable)).filter(
      ({ severity }) => !["low", "info"].includes(severity),
    );
    expect(found).toEqual([]);
  }
});
