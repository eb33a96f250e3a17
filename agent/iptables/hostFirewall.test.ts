import { expect, test } from "vitest";
import { linuxHost } from "../platform/linux.ts";
import { judgesByPort } from "./hostFirewall.ts";
import type { Reads } from "./read.ts";

interface Machine {
  readonly chains?: string;
  readonly tables?: Readonly<Record<string, string>>;
  readonly save?: string;
  readonly tproxy?: boolean;
}

function machine({ chains = "", tables = {}, save = "", tproxy = true }: Machine): Reads {
  const answer = (stdout: string, code = 0) => ({ code, stdout, stderr: "" });
  return {
    files: { ...linuxHost().files, readText: async () => "" },
    run: async ({ argv }) => {
      const line = argv.join(" ");
      if (line.startsWith("nft --check")) return answer("", tproxy ? 0 : 1);
      if (line === "nft list chains") return answer(chains);
      if (line.startsWith("nft -j list table ")) {
        const table = tables[line.slice(18)];
        return answer(table ?? "", table === undefined ? 1 : 0);
      }
      if (line.startsWith("nft -a list table ")) return answer("");
      if (line === "iptables-nft-save") return answer(save);
      if (line.endsWith("-save")) return answer("", 127);
      if (line === "ip -o addr show") return answer("2: eth0    inet 192.0.2.1/24 scope global eth0\n");
      if (line === "ss -ltnpH")
        return answer("LISTEN 0 9 0.0.0.0:9080 0.0.0.0:*\nLISTEN 0 9 0.0.0.0:9001 0.0.0.0:*\n");
      throw new Error(`nobody expected: ${line}`);
    },
  };
}

const filter = (policy: string, ...rules: string[]): string =>
  ["*filter", `:INPUT ${policy} [0:0]`, ":KUBE-FIREWALL - [0:0]", ...rules, "COMMIT", ""].join("\n");
const FIREWALLD = `table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
	}
}
`;
/** Of `nft -j list table`: what it refuses, or what it does instead. */
const inFirewalld = (...expr: object[]): Record<string, string> => {
  const at = { family: "inet", table: "firewalld" };
  const base = { type: "filter", hook: "input", prio: 10, policy: "accept" };
  return {
    "inet firewalld": JSON.stringify({
      nftables: [
        { table: { family: "inet", name: "firewalld" } },
        { chain: { ...at, name: "filter_INPUT", ...base } },
        { rule: { ...at, chain: "filter_INPUT", handle: 1, expr } },
      ],
    }),
  };
};
const ON_9080 = {
  match: { op: "==", left: { payload: { protocol: "tcp", field: "dport" } }, right: 9080 },
};
const DEFAULT_DENY = filter("DROP", "-A INPUT -p tcp -m tcp --dport 9080 -j ACCEPT");
const KUBERNETES = filter(
  "ACCEPT",
  "-A INPUT -j KUBE-FIREWALL",
  "-A KUBE-FIREWALL -d 127.0.0.0/8 -p udp -j DROP",
);

const CASES: readonly {
  name: string;
  machine: Machine;
  ports: readonly number[] | "all";
  why: string | undefined;
}[] = [
  { name: "no firewall", machine: {}, ports: [9080], why: undefined },
  { name: "an INPUT that accepts", machine: { save: filter("ACCEPT") }, ports: "all", why: undefined },
  { name: "kube-proxy's own rules", machine: { save: KUBERNETES }, ports: [9080], why: undefined },
  {
    name: "a default deny that opens the port",
    machine: { save: DEFAULT_DENY },
    ports: [9080],
    why: "port 9080",
  },
  {
    name: "a default deny, and nothing is declared",
    machine: { save: filter("DROP") },
    ports: [],
    why: "lets nothing in",
  },
  {
    name: "a port that is shut, and a redirected connection would get in",
    machine: { save: filter("ACCEPT", "-A INPUT -p tcp -m tcp --dport 9001 -j DROP") },
    ports: "all",
    why: "port 9001",
  },
  {
    name: "firewalld",
    machine: { chains: FIREWALLD, tables: inFirewalld({ reject: null }) },
    ports: [9080],
    why: "lets nothing in",
  },
  {
    name: "firewalld, which lets in all that is redirected and of ports what it knows",
    machine: {
      chains: FIREWALLD,
      tables: inFirewalld(
        { match: { op: "!=", left: { payload: { protocol: "tcp", field: "dport" } }, right: 9080 } },
        { match: { op: "!=", left: { payload: { protocol: "tcp", field: "dport" } }, right: 15_006 } },
        { reject: null },
      ),
    },
    ports: [9080],
    why: "lets nothing in",
  },
  {
    name: "firewalld with the port shut",
    machine: { chains: FIREWALLD, tables: inFirewalld(ON_9080, { drop: null }) },
    ports: [9080],
    why: "port 9080",
  },
  {
    name: "a table that nft does not list in time",
    machine: { chains: FIREWALLD },
    ports: [9080],
    why: "may judge port 9080",
  },
  {
    name: "a foreign table that only counts",
    machine: { chains: FIREWALLD, tables: inFirewalld({ counter: null }, { accept: null }) },
    ports: [9080],
    why: undefined,
  },
  {
    name: "our own fence",
    machine: { chains: FIREWALLD.replace("firewalld", "vmmesh-fence") },
    ports: [9080],
    why: undefined,
  },
  {
    name: "a kernel without TPROXY, whatever the firewall",
    machine: { save: DEFAULT_DENY, tproxy: false },
    ports: [9080],
    why: undefined,
  },
];

test.for(CASES)("$name", async ({ machine: facts, ports, why }) => {
  const said = await judgesByPort(machine(facts), ports);
  if (why === undefined) expect(said).toBeUndefined();
  else expect(said).toContain(why);
});
