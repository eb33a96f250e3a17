import { describe, expect, test } from "vitest";
import { CASES, golden } from "../../../test/compat/cases.ts";
import { VmmeshError } from "../../core/errors.ts";
import { canonicalAddress, parsePrefix } from "./address.ts";
import { compatFacts } from "./facts.ts";
import { type CompatConfig, PEER_FLAGS, parseCompat } from "./flags.ts";
import { compatRules } from "./rules.ts";

const MACHINE = {
  addresses: ["127.0.0.1", "10.0.0.5", "::1"],
  resolvConf: "nameserver 127.0.0.53\n",
  passwd: "root:x:0:0::/:/bin/sh\nistio-proxy:x:998:997::/:/bin/false\n",
};

/** Exit code of the failure, or what was read. */
function attempt<T>(act: () => T): T | string {
  try {
    return act();
  } catch (thrown) {
    return VmmeshError.from(thrown).code;
  }
}

describe("the peer's rules, byte for byte (the vm lane compares these files with the real peer)", () => {
  test.for(CASES)("$name", async ({ name, argv, env = {}, ipv6 = false, nameservers = [] }) => {
    const config = parseCompat(argv, env);
    const facts = { ipv6, dnsServers: nameservers, proxyUid: undefined };
    await expect(compatRules(config, facts, 4)).toMatchFileSnapshot(golden(name, 4));
    if (ipv6) await expect(compatRules(config, facts, 6)).toMatchFileSnapshot(golden(name, 6));
    else expect(compatRules(config, facts, 6)).toBe("");
  });
});

describe("the peer's command line", () => {
  const port = (argv: string[], env = {}) => attempt(() => parseCompat(argv, env).inboundCapturePort);
  test.for([
    { name: "no word at all", argv: [], is: "15006" },
    { name: "a value in the same word", argv: ["--inbound-capture-port=1"], is: "1" },
    { name: "a value in the next word", argv: ["--inbound-capture-port", "1"], is: "1" },
    { name: "a next word that looks like a flag is a value", argv: ["-z", "--help"], is: "--help" },
    { name: "an empty value", argv: ["--inbound-capture-port="], is: "" },
    { name: "a letter, then the value", argv: ["-z", "1"], is: "1" },
    { name: "a letter and the value", argv: ["-z1"], is: "1" },
    { name: "a letter, = and the value", argv: ["-z=1"], is: "1" },
    { name: "a letter and a lone =, which is the value", argv: ["-z="], is: "=" },
    { name: "a switch before another letter", argv: ["-nz1"], is: "1" },
    { name: "a switch with a value", argv: ["-n=false", "-z1"], is: "1" },
    { name: "the last one counts", argv: ["-z1", "--inbound-capture-port=2"], is: "2" },
    { name: "words that belong to no flag are passed over", argv: ["a", "-", "-z1", "b"], is: "1" },
    { name: "nothing after -- counts", argv: ["-z1", "--", "-z2"], is: "1" },
    { name: "options of the peer's log are passed over", argv: ["--log_target", "-z2", "-z1"], is: "1" },
    { name: "an unknown flag", argv: ["--zap"], is: "USAGE" },
    { name: "an unknown letter", argv: ["-nZ"], is: "USAGE" },
    { name: "three dashes", argv: ["---z"], is: "USAGE" },
    { name: "no name before =", argv: ["--=1"], is: "USAGE" },
    { name: "a value that is missing", argv: ["-z"], is: "USAGE" },
    { name: "a switch that is neither on nor off", argv: ["--redirect-dns=yes"], is: "USAGE" },
    { name: "a port out of range", argv: ["--iptables-probe-port=65536"], is: "USAGE" },
    { name: "a duration without unit", argv: ["--probe-timeout", "5"], is: "USAGE" },
    { name: "a duration", argv: ["--probe-timeout", "1m2.5s", "-z1"], is: "1" },
    { name: "a program that is neither of two", argv: ["--force-iptables-binary=x"], is: "USAGE" },
    { name: "* as what is excluded", argv: ["-x", "*"], is: "USAGE" },
    { name: "a range without length", argv: ["-i", "10.0.0.1"], is: "USAGE" },
    { name: "a wrong range of which no rule is made", argv: ["-i", "x", "--skip-rule-apply"], is: "15006" },
    { name: "nft's own rules", argv: ["--native-nftables"], is: "USAGE" },
  ])("$name", ({ argv, is }) => {
    expect(port(argv)).toBe(is);
  });

  const dns = (argv: string[], env: Record<string, string>) => parseCompat(argv, env).redirectDns;
  test.for([
    { name: "the variable", argv: [], env: { REDIRECT_DNS: "T" }, is: true },
    { name: "the other variable wins", env: { REDIRECT_DNS: "1", ISTIO_META_DNS_CAPTURE: "0" }, is: false },
    {
      name: "nonsense turns a switch off",
      env: { REDIRECT_DNS: "1", ISTIO_META_DNS_CAPTURE: "" },
      is: false,
    },
    { name: "a flag wins over both", argv: ["--redirect-dns"], env: { REDIRECT_DNS: "0" }, is: true },
    { name: "a flag may turn it off", argv: ["--redirect-dns=F"], env: { REDIRECT_DNS: "1" }, is: false },
    { name: "case matters", env: { REDIRECT_DNS: "tRUE" }, is: false },
  ])("$name", ({ argv = [], env, is }) => {
    expect(dns(argv, env as Record<string, string>)).toBe(is);
  });

  test.for([
    { name: "ENVOY_PORT means nothing", env: { ENVOY_PORT: "1" }, is: { envoyPort: "15001" } },
    { name: "a number that is none is ignored", env: { IPTABLES_PROBE_PORT: "x" }, is: { applies: true } },
    { name: "an empty variable counts", env: { INBOUND_TUNNEL_PORT: "" }, is: { tunnelPort: "" } },
    { name: "other words are not TPROXY", argv: ["-m", "tproxy"], is: { tproxy: false } },
    { name: "items may be empty", argv: ["-u", ",1,,2,"], is: { proxyUids: ["1", "2"] } },
    { name: "a list of nothing is a list", argv: ["-b", ","], is: { inboundPorts: [] } },
    { name: "no ports", argv: ["-b", ""], is: { inboundPorts: undefined } },
    { name: "uids are gids", argv: ["-u", "3"], is: { proxyUids: ["3"], proxyGids: undefined } },
    {
      name: "no group is captured",
      env: { ISTIO_OUTBOUND_OWNER_GROUPS: "" },
      is: { ownerGroups: { all: false, listed: [] } },
    },
    { name: "taking rules out applies none", argv: ["--cleanup-only"], is: { applies: false } },
    { name: "rules may be left alone", env: { SKIP_RULE_APPLY: "true" }, is: { applies: false } },
  ] as { name: string; argv?: string[]; env?: Record<string, string>; is: Partial<CompatConfig> }[])(
    "$name",
    ({ argv = [], env = {}, is }) => {
      expect(parseCompat(argv, env)).toMatchObject(is);
    },
  );

  test.for([
    { name: "65 groups", env: { ISTIO_OUTBOUND_OWNER_GROUPS: "g,".repeat(65) } },
    { name: "loopback of IPv6", env: { ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "::1/128" } },
    { name: "no loopback", env: { ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "10.0.0.0/8" } },
    { name: "more than loopback", env: { ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "127.0.0.0/7" } },
    { name: "an empty loopback", env: { ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "" } },
  ])("$name is refused", ({ env }) => {
    expect(attempt(() => parseCompat([], env as Record<string, string>))).toBe("USAGE");
  });

  test("no two flags share a name or a letter", () => {
    const names = PEER_FLAGS.flatMap(({ long, short }) => [long, ...(short === undefined ? [] : [short])]);
    expect(new Set(names).size).toBe(names.length);
  });
});

describe("what the peer finds out on the machine", () => {
  const facts = (argv: string[], machine: Partial<typeof MACHINE> = {}, given = {}) =>
    attempt(() => compatFacts(parseCompat(argv, {}), { ...MACHINE, ...machine }, given));
  test.for([
    { name: "IPv4 comes first", argv: [], addresses: ["fd00::1", "10.0.0.1"], ipv6: false },
    {
      name: "dual stack asks for any IPv6",
      argv: ["--dual-stack"],
      addresses: ["10.0.0.1", "::6"],
      ipv6: true,
    },
    { name: "IPv6 alone", argv: [], addresses: ["127.0.0.1", "169.254.0.1", "fd00::1"], ipv6: true },
    {
      name: "link-local is no IPv6",
      argv: ["--dual-stack"],
      addresses: ["10.0.0.1", "fe80::1%e"],
      ipv6: false,
    },
  ])("$name", ({ argv, addresses, ipv6 }) => {
    expect(facts(argv, { addresses })).toMatchObject({ ipv6 });
  });

  test("no address at all is an error, unless the fact is given", () => {
    expect(facts([], { addresses: ["127.0.0.1", "::1"] })).toBe("NO_ADDRESS");
    expect(facts([], { addresses: [] }, { ipv6: false })).toMatchObject({ ipv6: false });
  });

  test("servers are read only if names are captured by server", () => {
    const resolvConf = "# nameserver 9.9.9.9\nsearch x\n nameserver\t1.1.1.1 # home\nnameserver\noptions a\n";
    expect(facts(["--redirect-dns"], { resolvConf })).toMatchObject({ dnsServers: ["1.1.1.1"] });
    expect(facts(["--redirect-dns", "--capture-all-dns"], { resolvConf })).toMatchObject({ dnsServers: [] });
    expect(
      attempt(() => compatFacts(parseCompat(["--redirect-dns"], {}), { ...MACHINE, resolvConf: undefined })),
    ).toBe("STATE_UNREADABLE");
  });

  test("the proxy's user is one of passwd, else 1337", () => {
    const rules = (env: Record<string, string>): string => {
      const config = parseCompat([], env);
      return compatRules(config, compatFacts(config, MACHINE), 4);
    };
    expect(rules({})).toContain("--gid-owner 998 ");
    expect(rules({ ENVOY_USER: "nobody" })).toContain("--uid-owner 1337 ");
  });
});

describe("addresses as Go prints them", () => {
  test.for([
    ["10.1.2.3/8", "10.1.2.3/8"],
    ["2001:DB8:0:0:1:0:0:0/32", "2001:db8:0:0:1::/32"],
    ["2001:0db8:0:1:1:1:1:1/128", "2001:db8:0:1:1:1:1:1/128"],
    ["1:0:0:2:0:0:3:4/64", "1::2:0:0:3:4/64"],
    ["::ffff:0a00:1/104", "::ffff:10.0.0.1/104"],
    ["::127.0.0.53/128", "::7f00:35/128"],
    ["::/0", "::/0"],
    ["10.0.0.0/08", undefined],
    ["010.0.0.0/8", undefined],
    ["10.0.0.0/33", undefined],
    ["fe80::1%e/64", undefined],
    ["1.2.3.4::/64", undefined],
    ["10.0.0.0", undefined],
  ] as const)("%s is %s", ([written, printed]) => {
    expect(parsePrefix(written)?.text).toBe(printed);
  });

  test("a server may have a zone", () => {
    expect(canonicalAddress("FE80::1%eth0")).toEqual({ family: 6, text: "fe80::1%eth0" });
    expect(canonicalAddress("fe80::1%")).toBeUndefined();
  });
});
