import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { auditCapture } from "../../agent/iptables/audit/audit.ts";
import { judgesByPort, readPlace } from "../../agent/iptables/hostFirewall.ts";
import { type Admission, admission } from "../../agent/iptables/trace/admit.ts";
import { Lab, MACHINE, REMOTE, UID } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
  await lab.populate();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

/** As firewalld 1.3 leaves zone public with ssh and one port, less the zones that nothing is in. */
const firewalld = (port: number) => `table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		jump filter_INPUT_POLICIES
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_INPUT_POLICIES {
		iifname "eth0" goto filter_IN_public
		goto filter_IN_public
	}
	chain filter_IN_public {
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
		reject with icmpx admin-prohibited
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		ip6 daddr fe80::/64 udp dport 546 accept
		tcp dport ${port} accept
	}
}
`;

/** As ufw 0.36 leaves its default with ssh and one port, less its logging of what it lets through. */
const ufw = (port: number) => `*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-not-local - [0:0]
:ufw-user-input - [0:0]
:ufw-after-input - [0:0]
:ufw-skip-to-policy-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j LOG
-A ufw-not-local -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
-A ufw-user-input -p tcp -m tcp --dport ${port} -j ACCEPT
-A ufw-after-input -p udp -m udp --dport 137 -j ufw-skip-to-policy-input
-A ufw-skip-to-policy-input -j DROP
COMMIT
`;
const filter = (policy: string, ...rules: string[]) =>
  `*filter\n:INPUT ${policy} [0:0]\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n${rules.join("\n")}\nCOMMIT\n`;

/** Two base chains: what the first accepts the second still judges. */
const PRIORITIES = `table inet early { chain in { type filter hook input priority -10; policy accept;
		tcp dport 9000 accept
	}
}
table inet late { set open { type inet_service; elements = { 22, 9001 }; }
	chain in { type filter hook input priority 50; policy drop;
		ct state established,related accept
		iifname "lo" accept
		tcp dport @open accept
		ct status dnat accept
	}
}
`;

interface Case {
  readonly name: string;
  /** Text for iptables-restore, or for nft. */
  readonly load: string;
  /** What INPUT says of 9000 itself, and once it is redirected. */
  readonly plain: Admission["answer"];
  readonly captured: Admission["answer"];
  readonly finding: string | undefined;
  /** It judges no port. */
  readonly open?: true;
}

const SOME = `-A INPUT -s ${REMOTE.ip}/32 -p tcp -m tcp --dport 9000 -j ACCEPT`;
const IPTABLES: readonly Case[] = [
  { name: "no rules", load: filter("ACCEPT"), plain: "yes", captured: "yes", finding: undefined, open: true },
  { name: "ufw, 9000 open", load: ufw(9000), plain: "yes", captured: "no", finding: "FW020" },
  { name: "ufw, 9000 shut", load: ufw(9999), plain: "no", captured: "no", finding: undefined },
  {
    name: "9000 dropped, all else open",
    load: filter("ACCEPT", "-A INPUT -p tcp -m tcp --dport 9000 -j DROP"),
    plain: "no",
    captured: "yes",
    finding: "FW019",
  },
  {
    name: "default deny, 9000 open by eth0",
    load: filter("DROP", "-A INPUT -i eth0 -p tcp -m tcp --dport 9000 -j ACCEPT"),
    plain: "yes",
    captured: "no",
    finding: "FW020",
  },
  {
    name: "default deny, 9000 open by another interface",
    load: filter("DROP", "-A INPUT -i eth9 -p tcp -m tcp --dport 9000 -j ACCEPT"),
    plain: "no",
    captured: "no",
    finding: undefined,
  },
  {
    name: "default deny, 9000 open to one sender",
    load: filter("DROP", SOME),
    plain: "may",
    captured: "no",
    finding: "FW020",
  },
  {
    name: "default deny, 9000 open to one sender, and what is redirected to everybody",
    load: filter("DROP", SOME, "-A INPUT -m conntrack --ctstate DNAT -j ACCEPT"),
    plain: "may",
    captured: "yes",
    finding: "FW019",
  },
  {
    name: "default deny, 9000 open to one sender, also redirected",
    load: filter(
      "DROP",
      SOME,
      `-A INPUT -s ${REMOTE.ip}/32 -p tcp -m conntrack --ctstate DNAT --ctorigdstport 9000 -j ACCEPT`,
    ),
    plain: "may",
    captured: "may",
    finding: undefined,
  },
];
const NFT: readonly Case[] = [
  { name: "firewalld, 9000 open", load: firewalld(9000), plain: "yes", captured: "yes", finding: undefined },
  { name: "firewalld, 9000 shut", load: firewalld(9999), plain: "no", captured: "yes", finding: "FW019" },
  {
    name: "somebody's own table ip filter, which iptables does not print",
    load: `table ip filter {
	chain input {
		type filter hook input priority 0; policy drop;
		ct state established,related accept
		iifname "lo" accept
		tcp dport { 22, 9000 } accept
	}
}
`,
    plain: "yes",
    captured: "no",
    finding: "FW020",
  },
  {
    name: "a rule of nft in iptables' own table, which iptables prints no more",
    load: `table ip filter {
	chain INPUT {
		type filter hook input priority 0; policy accept;
		ct state new tcp dport { 9000, 9001 } drop
	}
}
`,
    plain: "no",
    captured: "yes",
    finding: "FW019",
  },
  {
    name: "two base chains, the later one drops",
    load: PRIORITIES,
    plain: "no",
    captured: "yes",
    finding: "FW019",
  },
];

/** Asked of the walker, dialled from outside before and after capture, and said by the audit. */
async function judged({ plain, captured, finding, open }: Case): Promise<void> {
  const place = await readPlace(lab.host);
  const [door] = place.doors.filter(({ address }) => address === MACHINE.ip);
  if (door === undefined) throw new Error("the machine has no address");
  const says = (how: "as it is" | "captured") => admission(place, door, 9000, how).answer;
  expect.soft([says("as it is"), says("captured")]).toEqual([plain, captured]);
  const dial = () => lab.dial(UID.app, MACHINE.ip, 9000, lab.world);
  // The sender that is let in where only one is.
  expect.soft((await dial()) === "APP", "as it is").toBe(plain !== "no");
  const why = await judgesByPort(lab.host, [9000]);
  expect.soft(why === undefined, why).toBe(open === true);
  await lab.install();
  expect.soft((await dial()) === "ENVOY-IN", "captured").toBe(captured !== "no");
  const found = (await auditCapture(lab.host, lab.rulesDir)).map(({ id }) => id);
  expect(found.filter((id) => /FW0(19|20|21)/.test(id))).toEqual(finding === undefined ? [] : [finding]);
}

describe("what INPUT lets in is what the kernel lets in", () => {
  test.for(IPTABLES.map((each, at) => ({ ...each, backend: at % 2 === 0 ? "nft" : "legacy" })))(
    "iptables-$backend: $name",
    async ({ backend, ...each }) => {
      const loaded = await lab.inside([`iptables-${backend}-restore`, "--noflush"], each.load);
      expect(loaded.code, loaded.stderr).toBe(0);
      await judged(each);
    },
  );

  test.for(NFT)("nftables: $name", async (each) => {
    const loaded = await lab.inside(["nft", "-f", "-"], each.load);
    expect(loaded.code, loaded.stderr).toBe(0);
    await judged(each);
  });
});
