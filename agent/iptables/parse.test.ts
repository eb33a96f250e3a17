import { describe, expect, test } from "vitest";
import {
  diverts,
  ownerOfChain,
  parseBaseChains,
  parseListeners,
  parseNftChains,
  parseRule,
  parseSave,
  sshPortsOf,
  withoutCounters,
} from "./parse.ts";

describe("parseRule", () => {
  test.for([
    {
      name: "a plain jump",
      line: "-A OUTPUT -j ISTIO_OUTPUT",
      want: { chain: "OUTPUT", target: "ISTIO_OUTPUT", comment: undefined },
    },
    {
      name: "with counters, as iptables-save -c prints it",
      line: '[12:720] -A OUTPUT -m comment --comment "vmmesh: a b" -j RETURN',
      want: { chain: "OUTPUT", target: "RETURN", comment: "vmmesh: a b" },
    },
    {
      name: "a comment that looks like a target",
      line: '-A OUTPUT -m comment --comment "x -j ACCEPT \\"y\\"" -j RETURN',
      want: { chain: "OUTPUT", target: "RETURN", comment: 'x -j ACCEPT "y"' },
    },
    {
      name: "a rule that only counts",
      line: "-A INPUT -p tcp",
      want: { chain: "INPUT", target: undefined, comment: undefined },
    },
  ])("$name", ({ line, want }) => {
    expect(parseRule(line)).toMatchObject(want);
  });

  test.for(["-P OUTPUT ACCEPT", "-N ISTIO_OUTPUT", "# Table `nat' contains incompatible base-chains", ""])(
    "not a rule: %s",
    (line) => {
      expect(parseRule(line)).toBeUndefined();
    },
  );
});

test("parseSave keeps tables, policies and rules apart", () => {
  const [nat, filter] = parseSave(
    "*nat\n:OUTPUT ACCEPT [1:2]\n:X - [0:0]\n-A OUTPUT -j X\nCOMMIT\n*filter\n:INPUT DROP [0:0]\nCOMMIT\n",
  );
  expect(nat?.chains).toEqual(
    new Map([
      ["OUTPUT", "ACCEPT"],
      ["X", "-"],
    ]),
  );
  expect(nat?.rules.map(({ line }) => line)).toEqual(["-A OUTPUT -j X"]);
  expect(filter?.chains.get("INPUT")).toBe("DROP");
});

test("withoutCounters forgets numbers and dates only", () => {
  expect(
    withoutCounters("# Generated on Mon\n*nat\n:OUTPUT ACCEPT [1:2]\n[3:4] -A OUTPUT -j X\nCOMMIT\n"),
  ).toEqual(["*nat", ":OUTPUT ACCEPT", "-A OUTPUT -j X", "COMMIT"]);
});

describe("diverts", () => {
  test.for([
    { line: "-A OUTPUT -j KUBE-SERVICES", want: "chain" },
    { line: "-A OUTPUT -j CONNMARK --restore-mark", want: "no" },
    { line: "-A OUTPUT -d 1.2.3.4/32 -j DNAT --to-destination 5.6.7.8", want: "yes" },
    { line: "-A OUTPUT -m recent --set --name x", want: "no" },
    { line: "-A PREROUTING -j NOTRACK", want: "yes" },
  ])("$line: $want", ({ line, want }) => {
    const rule = parseRule(line);
    expect(rule === undefined ? undefined : diverts(rule)).toBe(want);
  });

  test("names tell who writes a chain", () => {
    expect(["KUBE-SERVICES", "DOCKER", "cali-OUTPUT", "mine"].map(ownerOfChain)).toEqual([
      "kube-proxy",
      "docker",
      "calico",
      undefined,
    ]);
  });
});

describe("sshd's ports", () => {
  const ss = [
    'LISTEN 0      128          0.0.0.0:2222      0.0.0.0:*    users:(("sshd",pid=812,fd=3)) ino:1002 sk:1 <->',
    'LISTEN 0      4096               *:22              *:*    users:(("systemd",pid=1,fd=70)) ino:1003 sk:1 <->',
    'LISTEN 0      4096               *:9090            *:*    users:(("systemd",pid=1,fd=71)) ino:1004 sk:1 <->',
    'LISTEN 0      511        127.0.0.1:8080      0.0.0.0:*    users:(("nginx",pid=9,fd=3),("nginx",pid=10,fd=3)) ino:1005 sk:1 <->',
    'LISTEN 0      128             [::]:2222         [::]:*    users:(("sshd",pid=812,fd=4)) ino:1006 sk:1 <->',
  ].join("\n");

  test("from sshd's own sockets and from ssh.socket, not from other sockets of systemd", () => {
    expect(
      sshPortsOf(
        ss,
        "/proc/812/fd:\nlrwx------ 1 root root 64 Nov 23 16:00 3 -> socket:[1002]\n",
        "Listen=[::]:22 (Stream)\nListen=0.0.0.0:22 (Stream)\n",
      ),
    ).toEqual([22, 2222]);
  });

  test("addresses are read without brackets", () => {
    expect(parseListeners(ss).map(({ address }) => address)).toEqual([
      "0.0.0.0",
      "*",
      "*",
      "127.0.0.1",
      "::",
    ]);
  });
});

test("parseBaseChains understands names, offsets and numbers of priorities", () => {
  const text = `table ip kube-proxy {
	chain nat-output {
		type nat hook output priority -100; policy accept;
	}
	chain services {
	}
}
table inet firewalld {
	chain nat_OUTPUT {
		type nat hook output priority dstnat + 10; policy accept;
	}
	chain mangle_PREROUTING {
		type filter hook prerouting priority mangle + 10; policy accept;
	}
}
table inet x {
	chain f {
		type filter hook input priority filter; policy drop;
	}
}`;
  expect(
    parseBaseChains(text).map(({ table, chain, hook, priority }) => [table, chain, hook, priority]),
  ).toEqual([
    ["ip kube-proxy", "nat-output", "output", -100],
    ["inet firewalld", "nat_OUTPUT", "output", -90],
    ["inet firewalld", "mangle_PREROUTING", "prerouting", -140],
    ["inet x", "f", "input", 0],
  ]);
});

test("parseNftChains names every table, also one without chains", () => {
  const text = `table ip nat {
	chain OUTPUT {
		type nat hook output priority -100; policy accept;
	}
	chain ISTIO_OUTPUT {
	}
}
table inet vmmesh-fence {
}
`;
  expect(parseNftChains(text)).toEqual(
    new Map([
      ["ip nat", new Set(["OUTPUT", "ISTIO_OUTPUT"])],
      ["inet vmmesh-fence", new Set()],
    ]),
  );
});
