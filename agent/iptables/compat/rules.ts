import { canonicalAddress } from "./address.ts";
import type { CompatConfig } from "./flags.ts";

/** What the peer reads off the machine. */
export interface CompatFacts {
  /** Rules for IPv6 are made, too. */
  readonly ipv6: boolean;
  /** Servers of resolv.conf; what is no address is passed over. */
  readonly dnsServers: readonly string[];
  /** Uid of the proxy's user; undefined if there is no such user. */
  readonly proxyUid: string | undefined;
}

/** One line of a restore document. */
interface Line {
  readonly chain: string;
  /** Position of an insert; an append otherwise. */
  readonly at?: number;
  readonly rule: string;
}

const AGENT_DNS_PORT = 15053;
/** Mark of what the proxy sends to an address of its own machine, in TPROXY mode; no flag changes it. */
const OUTBOUND_MARK = 1338;
const BUILT_IN = new Set([
  "INPUT",
  "OUTPUT",
  "FORWARD",
  "PREROUTING",
  "POSTROUTING",
  "ACCEPT",
  "RETURN",
  "DROP",
]);

/**
 * What `pilot-agent istio-iptables` would feed to iptables-restore (4) or ip6tables-restore (6), byte for byte (VM
 * protocol, ch. 7.2 to 7.4): Istio's own rules, not those that vmmesh applies.
 *
 * @returns the empty text where it would feed nothing
 */
export function compatRules(config: CompatConfig, facts: CompatFacts, family: 4 | 6): string {
  if (!config.applies || (family === 6 && !facts.ipv6)) return "";
  const plan = planOf(config, facts, family);
  return [table("mangle", mangle(plan)), table("nat", nat(plan)), table("raw", raw(plan))].join("");
}

/** The configuration as one family sees it. */
interface Plan extends CompatConfig {
  readonly owners: readonly Owner[];
  readonly loopback: string;
  readonly passthrough: string;
  /** `*` is all of port 53; undefined: names are not captured at all. */
  readonly dns: "*" | readonly string[] | undefined;
  readonly captured: "*" | readonly string[];
  readonly uncaptured: readonly string[];
  /** An included range lies on loopback, in either family. */
  readonly capturesLoopback: boolean;
}

interface Owner {
  readonly by: "uid" | "gid";
  readonly match: string;
  readonly noMatch: string;
}

function planOf(config: CompatConfig, facts: CompatFacts, family: 4 | 6): Plan {
  const uids = config.proxyUids ?? [facts.proxyUid ?? "1337"];
  const owner = (by: Owner["by"], id: string): Owner => ({
    by,
    match: `-m owner --${by}-owner ${id}`,
    noMatch: `-m owner ! --${by}-owner ${id}`,
  });
  const servers = facts.dnsServers.flatMap((server) => canonicalAddress(server) ?? []);
  const include = config.outboundCidrs;
  return {
    ...config,
    owners: [
      ...uids.map((uid) => owner("uid", uid)),
      ...(config.proxyGids ?? uids).map((gid) => owner("gid", gid)),
    ],
    loopback: family === 4 ? config.ipv4Loopback : "::1/128",
    passthrough: family === 4 ? "127.0.0.6/32" : "::6/128",
    dns: !config.redirectDns
      ? undefined
      : config.captureAllDns
        ? "*"
        : servers.length === 0
          ? undefined
          : servers
              .filter((server) => server.family === family)
              .map(({ text }) => `${text}/${family === 4 ? 32 : 128}`),
    captured:
      include === "*" ? "*" : include.filter((cidr) => cidr.family === family).map(({ text }) => text),
    uncaptured: config.outboundExcludeCidrs.filter((cidr) => cidr.family === family).map(({ text }) => text),
    capturesLoopback: include !== "*" && include.some(({ loopback }) => loopback),
  };
}

const append = (chain: string, rule: string): Line => ({ chain, rule });
const insert = (chain: string, at: number, rule: string): Line => ({ chain, at, rule });

function nat(plan: Plan): Line[] {
  const ownPorts =
    plan.dns === undefined ? `! --dport ${plan.tunnelPort}` : `-m multiport ! --dports 53,${plan.tunnelPort}`;
  const notDns = plan.dns === undefined ? "" : " -p tcp ! --dport 53";
  return [
    ...leftAlone(plan),
    ...plan.kubeVirtInterfaces.map((nic) => insert("PREROUTING", 1, `-i ${nic} -j RETURN`)),
    append("ISTIO_INBOUND", `-p tcp --dport ${plan.tunnelPort} -j RETURN`),
    append("ISTIO_REDIRECT", `-p tcp -j REDIRECT --to-ports ${plan.envoyPort}`),
    append("ISTIO_IN_REDIRECT", `-p tcp -j REDIRECT --to-ports ${plan.inboundCapturePort}`),
    ...(plan.tproxy ? [] : inbound(plan, (match) => [`-p tcp${match} -j ISTIO_IN_REDIRECT`])),
    append("OUTPUT", "-j ISTIO_OUTPUT"),
    ...plan.outboundExcludePorts.flatMap((port) =>
      ["tcp", "udp"].map((protocol) => append("ISTIO_OUTPUT", `-p ${protocol} --dport ${port} -j RETURN`)),
    ),
    append("ISTIO_OUTPUT", `-o lo -s ${plan.passthrough} -j RETURN`),
    ...plan.owners.flatMap(({ by, match, noMatch }) => [
      append(
        "ISTIO_OUTPUT",
        // The groups' rule is the same with capture of names and without.
        `-o lo ! -d ${plan.loopback} -p tcp ${by === "uid" ? ownPorts : `! --dport ${plan.tunnelPort}`} ${match} -j ISTIO_IN_REDIRECT`,
      ),
      ...(plan.capturesLoopback ? [] : [append("ISTIO_OUTPUT", `-o lo${notDns} ${noMatch} -j RETURN`)]),
      append("ISTIO_OUTPUT", `${match} -j RETURN`),
    ]),
    ...byOwnerGroup(plan.ownerGroups),
    ...namesToAgent(plan.dns),
    append("ISTIO_OUTPUT", `-d ${plan.loopback} -j RETURN`),
    ...plan.uncaptured.map((cidr) => append("ISTIO_OUTPUT", `-d ${cidr} -j RETURN`)),
    ...plan.outboundPorts.map((port) => append("ISTIO_OUTPUT", `-p tcp --dport ${port} -j ISTIO_REDIRECT`)),
    ...outbound(plan),
  ];
}

function leftAlone({ excludeInterfaces }: Plan): Line[] {
  return excludeInterfaces.flatMap((nic) => [
    append("PREROUTING", `-i ${nic} -j RETURN`),
    append("OUTPUT", `-o ${nic} -j RETURN`),
  ]);
}

/** @param capture rules for what a match picks out */
function inbound(plan: Plan, capture: (match: string) => readonly string[]): Line[] {
  if (plan.inboundPorts === undefined) return [];
  const rules =
    plan.inboundPorts === "*"
      ? [...plan.inboundExcludePorts.map((port) => `-p tcp --dport ${port} -j RETURN`), ...capture("")]
      : plan.inboundPorts.flatMap((port) => capture(` --dport ${port}`));
  return [
    append("PREROUTING", "-p tcp -j ISTIO_INBOUND"),
    ...rules.map((rule) => append("ISTIO_INBOUND", rule)),
  ];
}

function byOwnerGroup({ all, listed }: Plan["ownerGroups"]): Line[] {
  const rules = all
    ? listed.map((group) => `-m owner --gid-owner ${group} -j RETURN`)
    : // Of no groups at all, nobody's traffic is captured: the rule matches everything.
      [[...listed.map((group) => `-m owner ! --gid-owner ${group}`), "-j RETURN"].join(" ")];
  return rules.map((rule) => append("ISTIO_OUTPUT", rule));
}

function namesToAgent(dns: Plan["dns"]): Line[] {
  if (dns === undefined || dns.length === 0) return [];
  const destinations = dns === "*" ? [""] : dns.map((server) => ` -d ${server}`);
  return [
    append("ISTIO_OUTPUT", "-j ISTIO_OUTPUT_DNS"),
    // The peer spells the option differently for tcp and udp; iptables takes both.
    ...[
      ["tcp", "--to-ports"],
      ["udp", "--to-port"],
    ].flatMap(([protocol, option]) =>
      destinations.map((to) =>
        append("ISTIO_OUTPUT_DNS", `-p ${protocol} --dport 53${to} -j REDIRECT ${option} ${AGENT_DNS_PORT}`),
      ),
    ),
  ];
}

function outbound({ captured, kubeVirtInterfaces }: Plan): Line[] {
  if (captured === "*")
    return [
      append("ISTIO_OUTPUT", "-j ISTIO_REDIRECT"),
      ...kubeVirtInterfaces.map((nic) => insert("PREROUTING", 1, `-i ${nic} -j ISTIO_REDIRECT`)),
    ];
  return captured.flatMap((cidr) => [
    ...kubeVirtInterfaces.map((nic) => insert("PREROUTING", 1, `-i ${nic} -d ${cidr} -j ISTIO_REDIRECT`)),
    append("ISTIO_OUTPUT", `-d ${cidr} -j ISTIO_REDIRECT`),
  ]);
}

function mangle(plan: Plan): Line[] {
  const { tproxyMark: mark, loopback } = plan;
  const dropInvalid = plan.dropInvalid
    ? [append("PREROUTING", "-m conntrack --ctstate INVALID -j ISTIO_DROP"), append("ISTIO_DROP", "-j DROP")]
    : [];
  if (!plan.tproxy) return dropInvalid;
  return [
    ...leftAlone(plan),
    ...dropInvalid,
    ...(plan.inboundPorts === undefined
      ? []
      : [
          append("ISTIO_DIVERT", `-j MARK --set-mark ${mark}`),
          append("ISTIO_DIVERT", "-j ACCEPT"),
          append(
            "ISTIO_TPROXY",
            `! -d ${loopback} -p tcp -j TPROXY --tproxy-mark ${mark}/0xffffffff --on-port ${plan.inboundCapturePort}`,
          ),
        ]),
    ...inbound(plan, (match) => [
      `-p tcp${match} -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT`,
      `-p tcp${match} -j ISTIO_TPROXY`,
    ]),
    append("PREROUTING", `-p tcp -m mark --mark ${mark} -j CONNMARK --save-mark`),
    append("OUTPUT", `-p tcp -o lo -m mark --mark ${mark} -j RETURN`),
    ...plan.owners.map(({ match }) =>
      append("OUTPUT", `! -d ${loopback} -p tcp -o lo ${match} -j MARK --set-mark ${OUTBOUND_MARK}`),
    ),
    append("OUTPUT", `-p tcp -m connmark --mark ${mark} -j CONNMARK --restore-mark`),
    insert("ISTIO_INBOUND", 1, `-p tcp -m mark --mark ${mark} -j RETURN`),
    insert("ISTIO_INBOUND", 2, `-p tcp -s ${plan.passthrough} -i lo -j RETURN`),
    insert("ISTIO_INBOUND", 3, `-p tcp -i lo -m mark ! --mark ${OUTBOUND_MARK} -j RETURN`),
  ];
}

/** Conntrack zones: 1 between agent and resolver, 2 between application and agent. */
function raw({ dns, owners }: Plan): Line[] {
  if (dns === undefined) return [];
  const servers = dns === "*" ? [undefined] : dns;
  return [
    append("OUTPUT", "-j ISTIO_OUTPUT_DNS"),
    ...owners.flatMap(({ match }) => [
      append("ISTIO_OUTPUT_DNS", `-p udp --dport 53 ${match} -j CT --zone 1`),
      append("ISTIO_OUTPUT_DNS", `-p udp --sport ${AGENT_DNS_PORT} ${match} -j CT --zone 2`),
    ]),
    ...(servers.length === 0 ? [] : [append("PREROUTING", "-j ISTIO_INBOUND")]),
    ...servers.flatMap((server) => [
      append(
        "ISTIO_OUTPUT_DNS",
        `-p udp --dport 53${server === undefined ? "" : ` -d ${server}`} -j CT --zone 2`,
      ),
      append(
        "ISTIO_INBOUND",
        `-p udp --sport 53${server === undefined ? "" : ` -s ${server}`} -j CT --zone 1`,
      ),
    ]),
  ];
}

function table(name: string, lines: readonly Line[]): string {
  if (lines.length === 0) return "";
  const chains = new Set([
    ...lines.map(({ chain }) => chain),
    ...lines.flatMap(({ rule }) => /(?:^| )-j (\S+)$/.exec(rule)?.[1] ?? []),
  ]);
  return [
    `* ${name}`,
    ...[...chains].filter((chain) => !BUILT_IN.has(chain)).map((chain) => `-N ${chain}`),
    ...lines.map(({ chain, at, rule }) =>
      at === undefined ? `-A ${chain} ${rule}` : `-I ${chain} ${at} ${rule}`,
    ),
    "COMMIT",
    "",
  ].join("\n");
}
