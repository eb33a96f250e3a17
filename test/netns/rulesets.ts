import { MACHINE, REMOTE } from "./lab.ts";

/** Random numbers that a seed gives again. (mulberry32) */
export class Dice {
  #state: number;
  constructor(seed: number) {
    this.#state = seed;
  }
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let x = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  }
  chance(share: number): boolean {
    return this.next() < share;
  }
  below(limit: number): number {
    return Math.floor(this.next() * limit);
  }
  of<T>(choices: readonly [T, ...T[]]): T {
    return choices[this.below(choices.length)] ?? choices[0];
  }
}

type Family = 4 | 6;
type Choices = readonly [string, ...string[]];

/** What packets are sent to, and what rules speak of. */
export const CAST: Readonly<
  Record<Family, { to: Choices; beyond: Choices; nets: Choices; pods: Choices; from: Choices; here: string }>
> = {
  4: {
    beyond: ["10.96.0.10", "10.96.0.1", "10.244.0.2", "192.0.2.7"],
    to: [
      "10.96.0.10",
      "10.96.0.1",
      "10.96.0.53",
      "10.244.0.2",
      "10.244.0.3",
      "192.0.2.7",
      REMOTE.ip,
      MACHINE.ip,
      "127.0.0.1",
      "127.0.0.6",
    ],
    nets: ["10.96.0.0/12", "10.96.0.10/32", "10.244.0.0/24", "127.0.0.0/8", "10.200.0.0/24", "192.0.2.0/25"],
    pods: ["10.244.0.2", "10.244.0.3", "10.244.0.4", REMOTE.ip],
    from: [REMOTE.ip, "10.244.0.9", "192.0.2.99"],
    here: MACHINE.ip,
  },
  6: {
    beyond: ["fd96::10", "fd96::1", "fd44::2", "2001:db8::7"],
    to: ["fd96::10", "fd96::1", "fd44::2", "2001:db8::7", REMOTE.ip6, MACHINE.ip6, "::1"],
    nets: ["fd96::/64", "fd96::10/128", "fd44::/64", "::1/128", "fd02::/64", "2001:db8::/32"],
    pods: ["fd44::2", "fd44::3", REMOTE.ip6],
    from: [REMOTE.ip6, "fd44::9", "2001:db8::99"],
    here: MACHINE.ip6,
  },
};
export const PORTS: Choices = ["80", "443", "8080", "53", "5432", "9000", "15001", "30080"];
export const UIDS: Choices = ["0", "1000", "1337", "20001"];

/** Who listens on the machine while packets are sent: a transparent proxy and servers of the ordinary kind. */
export const LISTENING = { proxy: 15006, everywhere: 15001, one: 8080 } as const;

export interface Generated {
  /** For iptables-restore and ip6tables-restore of the backend. */
  readonly iptables: Readonly<Record<Family, string>>;
  readonly backend: "nft" | "legacy";
  /** For `ipset restore`. */
  readonly ipsets: string;
  readonly nft: string;
}

/** What the generator knows of its surroundings, and what a firewall's rules may do. */
interface Setting {
  /** Of some senders, relative to the root of cgroup2. */
  readonly cgroup: string;
  /** Some rules are up to chance, beside the choice between targets, which every balancer has. */
  readonly chancy: boolean;
  /** Some chains share a priority with others of theirs: nat chains of other tables, filter chains of their own. */
  readonly crowded: boolean;
}

/** Chains that the kernel calls, by table of iptables. */
export const HOOKS: Readonly<Record<string, Choices>> = {
  raw: ["PREROUTING", "OUTPUT"],
  mangle: ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
  nat: ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"],
  filter: ["INPUT", "FORWARD", "OUTPUT"],
};
const isOut = (hook: string): boolean => hook === "OUTPUT" || hook === "POSTROUTING";
const hasIn = (hook: string): boolean => /PREROUTING|INPUT|FORWARD/i.test(hook);
const hasOut = (hook: string): boolean => /OUTPUT|POSTROUTING|FORWARD/i.test(hook);
const ipOf = (family: Family, address: string, port: string): string =>
  family === 4 ? `${address}:${port}` : `[${address}]:${port}`;

/** A whole firewall as several programs would leave it: one iptables backend and tables of nft beside it. */
export function generate(dice: Dice, cgroup: string): Generated {
  const backend = dice.chance(0.3) ? "legacy" : "nft";
  const setting: Setting = { cgroup, chancy: dice.chance(0.08), crowded: dice.chance(0.15) };
  return {
    iptables: { 4: iptables(dice, 4, setting), 6: iptables(dice, 6, setting) },
    backend,
    ipsets: `${ipsets(4)}${ipsets(6)}`,
    nft: nftTables(dice, setting),
  };
}

/** One of each kind that programs use. */
function ipsets(family: Family): string {
  const { nets, pods, to } = CAST[family];
  const inet = `family inet${family === 6 ? "6" : ""}`;
  return [
    `create hosts${family} hash:ip ${inet}`,
    ...pods.map((pod) => `add hosts${family} ${pod}`),
    `create nets${family} hash:net ${inet}`,
    `add nets${family} ${nets[0]}`,
    // The more specific one decides.
    `add nets${family} ${to[0]} nomatch`,
    `add nets${family} ${nets[2]}`,
    `create pairs${family} hash:ip,port ${inet}`,
    `add pairs${family} ${to[0]},tcp:80`,
    `add pairs${family} ${to[1]},udp:53`,
    `create netports${family} hash:net,port ${inet}`,
    `add netports${family} ${nets[0]},tcp:443`,
    `create ports${family} bitmap:port range 0-65535`,
    `add ports${family} 80`,
    `add ports${family} 5000-6000`,
    `create list${family} list:set`,
    `add list${family} hosts${family}`,
    `add list${family} nets${family}`,
    "",
  ].join("\n");
}

function iptables(dice: Dice, family: Family, setting: Setting): string {
  const parts: string[] = [];
  for (const [table, hooks] of Object.entries(HOOKS)) {
    if (dice.chance(table === "nat" ? 0.05 : 0.3)) continue;
    const chains: string[] = [];
    const rules: string[] = [];
    for (const hook of hooks) {
      const own = dice.chance(0.6)
        ? [`${dice.of(["APP", "cali-", "ufw-", "DOCKER-"])}${hook}-1`, `CHAIN-${hook}-2`]
        : [];
      chains.push(...own);
      if (table !== "nat") {
        rules.push(`-A ${hook} -p tcp -m tcp --tcp-flags RST RST -j ACCEPT`);
        rules.push(
          ...(family === 4
            ? ["-p icmp -m icmp --icmp-type 3"]
            : SIX_NEEDS.map((type) => `-p ipv6-icmp -m icmp6 --icmpv6-type ${type}`)
          ).map((match) => `-A ${hook} ${match} -j ACCEPT`),
        );
      }
      for (const [index, chain] of [hook, ...own].entries()) {
        // A chain jumps only to later ones: no loops.
        const targets = own.slice(index);
        for (let count = dice.below(table === "raw" ? 3 : 6); count > 0; count--)
          rules.push(`-A ${chain} ${xtRule(dice, family, table, hook, targets, setting)}`);
      }
    }
    if (table === "nat") {
      const { chains: more, rules: kube } = kubeProxy(dice, family);
      chains.push(...more);
      // Ahead of the others or behind them, as the programs were started.
      if (dice.chance(0.5)) rules.unshift(...kube);
      else rules.push(...kube);
    }
    if (table === "filter") rules.push(...limits(family, setting.chancy));
    const closed = table === "nat" ? [] : hooks.filter(() => dice.chance(0.025));
    parts.push(
      `*${table}`,
      ...closed.map((hook) => `:${hook} DROP [0:0]`),
      ...chains.map((chain) => `:${chain} - [0:0]`),
      ...rules,
      "COMMIT",
    );
  }
  return `${parts.join("\n")}\n`;
}

/** Unreachable, and who has which address: without them nothing is sent at all. */
const SIX_NEEDS = [1, 135, 136] as const;

/** What is logged so often and no more; and, of those whose rules are up to chance, how often they may be pinged. */
function limits(family: Family, chancy: boolean): string[] {
  const ping = family === 4 ? "-p icmp -m icmp --icmp-type 8" : "-p ipv6-icmp -m icmp6 --icmpv6-type 128";
  return [
    ...["INPUT", "FORWARD", "OUTPUT"].map((hook) => `-A ${hook} -m limit --limit 3/minute -j LOG`),
    ...(chancy ? [`-A INPUT ${ping} -m limit --limit 1/second -j ACCEPT`, `-A INPUT ${ping} -j DROP`] : []),
  ];
}

/** What kube-proxy writes, and Docker. */
function kubeProxy(dice: Dice, family: Family): { chains: string[]; rules: string[] } {
  if (dice.chance(0.3)) return { chains: [], rules: [] };
  const cast = CAST[family];
  const bits = family === 4 ? 32 : 128;
  const rules = ["OUTPUT", "PREROUTING"].map(
    (hook) => `-A ${hook} -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`,
  );
  const chains = ["KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING", "DOCKER", "KUBE-NODEPORTS"];
  rules.push("-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000");
  rules.push("-A POSTROUTING -j KUBE-POSTROUTING");
  rules.push("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN");
  rules.push("-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0");
  rules.push("-A KUBE-POSTROUTING -j MASQUERADE");
  for (const [index, pod] of cast.pods.entries()) {
    const [vip, port] = [cast.to[index] ?? cast.to[0], dice.of(PORTS)];
    const svc = `KUBE-SVC-${index}`;
    chains.push(svc);
    rules.push(
      `-A KUBE-SERVICES -d ${vip}/${bits} -p tcp -m comment --comment "ns/svc${index} cluster IP" -m tcp --dport ${port} -j ${svc}`,
    );
    if (dice.chance(0.4)) rules.push(`-A ${svc} -j KUBE-MARK-MASQ`);
    const endpoints = [pod, ...cast.pods.filter((other) => other !== pod)].slice(0, 1 + dice.below(3));
    for (const [at, endpoint] of endpoints.entries()) {
      const sep = `KUBE-SEP-${index}-${at}`;
      const left = endpoints.length - at;
      const share = left > 1 ? `-m statistic --mode random --probability ${(1 / left).toFixed(11)} ` : "";
      chains.push(sep);
      rules.push(`-A ${svc} ${share}-j ${sep}`);
      rules.push(`-A ${sep} -p tcp -m tcp -j DNAT --to-destination ${ipOf(family, endpoint, "8080")}`);
    }
  }
  rules.push("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS");
  rules.push(`-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SVC-0`);
  rules.push("-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER");
  rules.push(
    `-A OUTPUT ! -d ${family === 4 ? "127.0.0.0/8" : "::1/128"} -m addrtype --dst-type LOCAL -j DOCKER`,
  );
  rules.push(
    `-A DOCKER ! -i docker0 -p tcp -m tcp --dport ${dice.of(PORTS)} -j DNAT --to-destination ${ipOf(family, cast.pods[0], "80")}`,
  );
  return { chains, rules };
}

function xtRule(
  dice: Dice,
  family: Family,
  table: string,
  hook: string,
  targets: readonly string[],
  { cgroup, chancy }: Setting,
): string {
  const cast = CAST[family];
  const bang = (): string => (dice.chance(0.2) ? "! " : "");
  const tcp = dice.chance(0.7);
  const words: string[] = [];
  const transport = [
    () => `-p tcp -m tcp --dport ${dice.of(PORTS)}`,
    () => `-p tcp -m tcp ${bang()}--dport 1:${dice.of(PORTS)}`,
    () => `-p tcp -m multiport ${bang()}--dports ${dice.of(PORTS)},${dice.of(PORTS)},7000:9000`,
    () => "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
    () => "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN",
    () => "-p tcp -m tcp --sport 1024:65535",
    () => `-p udp -m udp --dport ${dice.of(PORTS)}`,
    () => "-p udp",
    () => "! -p udp",
    () => (family === 4 ? "-p icmp -m icmp --icmp-type 8" : "-p ipv6-icmp -m icmp6 --icmpv6-type 128"),
  ];
  const states: Choices = [
    "NEW",
    "RELATED,ESTABLISHED",
    "NEW,ESTABLISHED",
    "INVALID",
    "UNTRACKED",
    "DNAT",
    "SNAT",
  ];
  const others = [
    () => `${bang()}-d ${dice.of(cast.nets)}`,
    () => `${bang()}-d ${dice.of(cast.nets)}`,
    () => `${bang()}-s ${dice.of(cast.nets)}`,
    ...(isOut(hook)
      ? [
          () => `-m owner ${bang()}--uid-owner ${dice.of(UIDS)}`,
          () => "-m owner --uid-owner 0-1336",
          () => `-m owner ${bang()}--socket-exists`,
        ]
      : []),
    ...(isOut(hook)
      ? [() => `-m cgroup ${bang()}--path ${cgroup}`, () => `-m cgroup ${bang()}--path ${cgroup}/deeper`]
      : []),
    ...(hook === "PREROUTING" || hook === "INPUT"
      ? [() => `-m socket${dice.of(["", " --nowildcard", " --transparent --nowildcard", " --transparent"])}`]
      : []),
    () =>
      `-m set ${bang()}--match-set ${dice.of(["hosts", "nets", "list"])}${family} ${dice.of(["src", "dst"])}`,
    () => `-m set ${bang()}--match-set ${dice.of(["pairs", "netports"])}${family} dst,dst`,
    () => `-m set --match-set ports${family} dst`,
    ...(chancy ? [() => "-m statistic --mode random --probability 0.3"] : []),
    ...(hasOut(hook) ? [() => `${bang()}-o ${dice.of(["lo", "eth0", "eth+", "docker0"])}`] : []),
    ...(hasIn(hook) ? [() => `${bang()}-i ${dice.of(["lo", "eth0", "eth+", "docker0"])}`] : []),
    () => `-m mark ${bang()}--mark ${dice.of(["0x1/0x1", "0x10/0x10", "0x0"])}`,
    () => `-m addrtype ${bang()}--dst-type ${dice.of(["LOCAL", "UNICAST"])}`,
    () => `-m addrtype ${bang()}--src-type LOCAL`,
    ...(table === "raw" ? [] : [() => `-m conntrack ${bang()}--ctstate ${dice.of(states)}`]),
    ...(table === "raw"
      ? []
      : [() => `-m conntrack --ctstate NEW ${bang()}--ctorigdst ${dice.of(cast.nets)}`]),
    ...(table === "raw" ? [] : [() => `-m connmark ${bang()}--mark 0x1/0x1`]),
    () =>
      `-m comment --comment "${dice.of(["vmmesh: a reason", "kubernetes service portals", 'it\'s a \\"test\\"'])}"`,
  ];
  const address = new Set<string>();
  for (let count = dice.below(3); count > 0; count--) {
    const word = (others[dice.below(others.length)] ?? others[0])?.() ?? "";
    const kind = word
      .replace("! ", "")
      .split(" ")
      .slice(0, word.startsWith("-m ") ? 2 : 1)
      .join(" ");
    if (!address.has(kind)) words.push(word);
    address.add(kind);
  }
  const target = xtTarget(dice, family, table, hook, targets);
  const needsTcp = /tcp-reset/.test(target);
  const needsPort = /^-j (REDIRECT|DNAT|SNAT|TPROXY)/.test(target);
  const usable = transport.filter((_, index) => (needsTcp ? index < 6 : needsPort ? index < 7 : true));
  if (needsTcp || needsPort || tcp) words.unshift(usable[dice.below(usable.length)]?.() ?? "");
  return [...words, target].join(" ").trim();
}

function xtTarget(
  dice: Dice,
  family: Family,
  table: string,
  hook: string,
  targets: readonly string[],
): string {
  const cast = CAST[family];
  const jump = targets.length > 0 && dice.chance(0.3);
  if (jump) return `${dice.of(["-j", "-j", "-g"])} ${targets[dice.below(targets.length)]}`;
  const choices: Record<string, Choices> = {
    raw: ["-j CT --notrack", "-j CT --zone 2", "-j ACCEPT", "-j RETURN", "-j DROP"],
    mangle: [
      "-j MARK --set-xmark 0x1/0x1",
      "-j MARK --set-xmark 0x10/0x10",
      "-j MARK --set-xmark 0x0/0xffffffff",
      "-j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff",
      "-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff",
      "-j CONNMARK --set-xmark 0x1/0x1",
      "-j RETURN",
      "-j ACCEPT",
      "-j DROP",
    ],
    filter: [
      "-j ACCEPT",
      "-j ACCEPT",
      "-j DROP",
      "-j RETURN",
      "-j REJECT --reject-with tcp-reset",
      `-j REJECT --reject-with ${family === 4 ? "icmp-port-unreachable" : "icmp6-port-unreachable"}`,
    ],
  };
  if (table === "mangle" && hook === "PREROUTING" && dice.chance(0.5)) {
    const port = dice.of([`${LISTENING.proxy}`, `${LISTENING.proxy}`, `${LISTENING.everywhere}`, "15999"]);
    const mark = dice.of([
      " --tproxy-mark 0x10/0x10",
      " --tproxy-mark 0x10/0x10",
      " --tproxy-mark 0x20/0xff",
      "",
    ]);
    return `-j TPROXY --on-port ${port}${dice.of(["", ` --on-ip ${family === 4 ? "127.0.0.1" : "::1"}`])}${mark}`;
  }
  if (table !== "nat") return dice.of(choices[table] ?? ["-j RETURN"]);
  if (hook === "INPUT") return dice.of(["-j ACCEPT", "-j RETURN"]);
  if (hook === "POSTROUTING")
    return dice.of(["-j MASQUERADE", "-j RETURN", "-j ACCEPT", `-j SNAT --to-source ${cast.here}`]);
  return dice.of([
    `-j REDIRECT --to-ports ${dice.of(PORTS)}`,
    `-j REDIRECT --to-ports 15001`,
    `-j DNAT --to-destination ${ipOf(family, dice.of(cast.pods), dice.of(PORTS))}`,
    `-j DNAT --to-destination ${dice.of(cast.pods)}`,
    "-j RETURN",
    "-j ACCEPT",
  ]);
}

/** Base chains: hook, type, priorities that do not coincide with iptables' nat. */
const NFT_BASES: readonly (readonly [hook: string, type: string, priorities: Choices])[] = [
  ["output", "filter", ["-310", "-250", "-155", "-110", "10", "20"]],
  ["output", "route", ["-160", "-140"]],
  ["output", "nat", ["-120", "-90", "-110"]],
  ["prerouting", "filter", ["-310", "-250", "-110", "-50"]],
  ["prerouting", "nat", ["-120", "-90"]],
  ["input", "filter", ["-10", "10", "20"]],
  ["forward", "filter", ["-10", "10"]],
  ["postrouting", "filter", ["-150", "10"]],
  ["postrouting", "nat", ["90", "110"]],
];

/** Of nat, which other programs have too. */
const CROWDED: Readonly<Record<string, string>> = {
  "output nat": "-100",
  "prerouting nat": "-100",
  "postrouting nat": "100",
};

function nftTables(dice: Dice, setting: Setting): string {
  const texts: string[] = [];
  const taken = new Set<string>();
  for (let count = dice.below(3) + 1, index = 0; index < count; index++) {
    const kind = dice.of(["inet", "inet", "ip", "ip6"]);
    const familyOf = (): Family =>
      kind === "ip" ? 4 : kind === "ip6" ? 6 : dice.of(["4", "6"]) === "4" ? 4 : 6;
    const name = `${dice.of(["firewalld", "kube-proxy", "docker-bridges", "site"])}${index}`;
    const sets = [
      "set ports { type inet_service; flags interval; elements = { 80, 5000-6000 } }",
      "map fates { type inet_service : verdict; flags interval; elements = { 53 : drop, 8000-8999 : return, 443 : accept } }",
      ...([4, 6] as const).flatMap((family) => {
        const { nets, pods, to } = CAST[family];
        const type = `type ipv${family}_addr`;
        return [
          `set nets${family} { ${type}; flags interval; elements = { ${nets[0]}, ${pods[0]} } }`,
          `set pairs${family} { ${type} . inet_service; elements = { ${to[0]} . 80, ${to[1]} . 443 } }`,
          `set areas${family} { ${type} . inet_service; flags interval; elements = { ${nets[0]} . 1-443, ${nets[2]} . 8080, ${nets[4]} . 0-65535 } }`,
          `map ways${family} { ${type} . inet_service : verdict; flags interval; elements = { ${nets[0]} . 80 : accept, ${nets[5]} . 1-1023 : drop, ${nets[4]} . 9000 : return } }`,
        ];
      }),
    ];
    const chains: string[] = [];
    for (const [hook, type, priorities] of NFT_BASES) {
      const ordinary = dice.of(priorities);
      const priority = (setting.crowded && CROWDED[`${hook} ${type}`]) || ordinary;
      if (!dice.chance(0.35) || (priority === ordinary && taken.has(`${hook} ${priority}`))) continue;
      taken.add(`${hook} ${priority}`);
      const helper = `${hook}_${type}_more`;
      const early = Number(priority) < -200;
      const safe =
        type === "nat"
          ? []
          : [
              "tcp flags rst accept",
              ...(kind === "ip6" ? [] : ["icmp type destination-unreachable accept"]),
              ...(kind === "ip"
                ? []
                : [
                    "icmpv6 type { destination-unreachable, nd-neighbor-solicit, nd-neighbor-advert } accept",
                  ]),
            ];
      const rules = (jumps: boolean): string[] =>
        Array.from({ length: 1 + dice.below(4) }, () =>
          nftRule(dice, familyOf(), hook, type, early, jumps ? helper : undefined, setting),
        );
      chains.push(`chain ${helper} {\n${rules(false).join("\n")}\n}`);
      const policy = type === "filter" && dice.chance(0.05) ? "drop" : "accept";
      const again = setting.crowded && type === "filter" ? ["", "_again"] : [""];
      for (const suffix of again)
        chains.push(
          `chain ${hook}_${type}${suffix} {\ntype ${type} hook ${hook} priority ${priority}; policy ${policy};\n${[...safe, ...rules(true)].join("\n")}\n}`,
        );
    }
    const text = `table ${kind} ${name} {\n${[...sets, ...chains].join("\n")}\n}\n`;
    // Only a table of both families may ask which one it is.
    texts.push(kind === "inet" ? text : text.replaceAll(/meta nfproto ipv[46] /g, ""));
  }
  return texts.join("");
}

function nftRule(
  dice: Dice,
  family: Family,
  hook: string,
  type: string,
  early: boolean,
  helper: string | undefined,
  { cgroup, chancy }: Setting,
): string {
  const cast = CAST[family];
  const ip = family === 4 ? "ip" : "ip6";
  const not = (): string => (dice.chance(0.2) ? "!= " : "");
  const transport = [
    () => `${ip} daddr . tcp dport @pairs${family}`,
    () => `${ip} daddr . tcp dport ${not()}@areas${family}`,
    () => `${ip} daddr . tcp dport { ${cast.nets[0]} . 80-90, ${cast.nets[2]} . 443, ${cast.to[0]} . 5432 }`,
    () => "tcp dport @ports",
    () => `tcp dport ${not()}${dice.of(PORTS)}`,
    () => `tcp dport ${not()}{ ${[...new Set([dice.of(PORTS), dice.of(PORTS), "7000-7999"])].join(", ")} }`,
    () => "tcp flags & (fin | syn | rst | ack) == syn",
    () => "meta l4proto tcp",
    () => `udp dport ${dice.of(PORTS)}`,
    () => "meta l4proto udp",
    () => "meta l4proto { tcp, udp } th dport >= 1000",
    () => (family === 4 ? "icmp type echo-request" : "icmpv6 type echo-request"),
  ];
  const matches = [
    () => `${ip} daddr ${not()}${dice.of(cast.nets)}`,
    () => `${ip} daddr ${not()}{ ${cast.to[0]}, ${cast.nets[2]} }`,
    () => `${ip} saddr ${not()}${dice.of(cast.nets)}`,
    () => `${ip} daddr ${not()}@nets${family}`,
    ...(chancy ? [() => "numgen random mod 3 == 0"] : []),
    ...(hook === "output"
      ? [() => `socket cgroupv2 level ${cgroup.split("/").length} ${not()}"${cgroup}"`]
      : []),
    ...(hook === "prerouting" || hook === "input"
      ? [() => `socket transparent ${dice.of(["0", "1"])}`, () => `socket wildcard ${dice.of(["0", "1"])}`]
      : []),
    () => `meta mark & 0x1 ${dice.of(["==", "!="])} 0x1`,
    () => `meta nfproto ipv${family}`,
    ...(hasOut(hook)
      ? [
          () => `oifname ${not()}"${dice.of(["lo", "eth0", "docker0"])}"`,
          () => 'oifname "eth*"',
          () => 'oifname { "lo", "docker0" }',
        ]
      : []),
    ...(hasIn(hook)
      ? [() => `iifname ${not()}"${dice.of(["lo", "eth0", "docker0"])}"`, () => 'iif "lo"']
      : []),
    ...(hook === "output" || hook === "postrouting"
      ? [() => `meta skuid ${not()}${dice.of(UIDS)}`, () => "meta skuid { 0, 1000-1336 }"]
      : []),
    ...(hook === "forward" ? [] : [() => `fib daddr type ${dice.of(["local", "unicast"])}`]),
    () => `ct state ${dice.of(["new", "established,related", "invalid", "untracked"])}`,
    () => "ct state { new, established }",
    ...(early
      ? []
      : [
          () => `ct original ${ip} daddr ${dice.of(cast.nets)}`,
          () => "ct status dnat",
          () => "ct mark & 0x1 == 0x1",
        ]),
  ];
  // nft refuses a rule that speaks of two protocols.
  const ruleOf = (target: string): string => {
    const words: string[] = [];
    for (let count = 1 + dice.below(2); count > 0; count--)
      words.push(matches[dice.below(matches.length)]?.() ?? "");
    const usable = target.includes("tcp")
      ? transport.slice(0, 8)
      : target.includes("udp")
        ? transport.slice(8, 10)
        : transport;
    if (dice.chance(0.5)) words.push(usable[dice.below(usable.length)]?.() ?? "");
    return [...words, target].join(" ");
  };
  const common: Choices = [
    "accept",
    "return",
    "counter",
    ...(helper === undefined ? [] : [`jump ${helper}`, `goto ${helper}`]),
  ];
  if (type === "nat") {
    const target =
      hook === "postrouting"
        ? dice.of(["masquerade", `snat ${ip} to ${cast.here}`, "accept"])
        : dice.of([
            `meta l4proto tcp redirect to :${dice.of(PORTS)}`,
            `meta l4proto tcp dnat ${ip} to ${ipOf(family, dice.of(cast.pods), dice.of(PORTS))}`,
            `dnat ${ip} to ${dice.of(cast.pods)}`,
            `dnat ${ip} to numgen random mod 2 map { 0 : ${cast.pods[0]}, 1 : ${cast.pods[1]} }`,
            `dnat ${ip} to ${ip} daddr map { ${cast.to[0]} : ${cast.pods[0]}, ${cast.to[1]} : ${cast.pods[1]} }`,
            dice.of(common),
          ]);
    return ruleOf(target);
  }
  const marks = type === "route" || hook !== "output";
  return ruleOf(
    dice.of([
      ...common,
      "drop",
      "tcp dport vmap @fates",
      `${ip} daddr . tcp dport vmap @ways${family}`,
      ...(hook === "prerouting" && !early
        ? [
            `meta l4proto tcp tproxy ${ip} to ${dice.of([`:${LISTENING.proxy}`, `:${LISTENING.everywhere}`, ":15999"])} meta mark set 0x10${dice.of(["", " accept"])}`,
            `meta l4proto udp tproxy ${ip} to ${family === 4 ? "127.0.0.1" : "[::1]"}:${LISTENING.proxy} meta mark set 0x10 accept`,
          ]
        : []),
      ...(early ? ["ct zone set 3"] : []),
      `tcp dport vmap { 80 : accept, ${helper === undefined ? "443 : drop" : `443 : jump ${helper}`}, 5000-6000 : return }`,
      ...(marks ? ["meta mark set meta mark | 0x1", "meta mark set 0x10"] : ["meta mark set 0x1"]),
      ...(early ? ["notrack"] : ["ct mark set meta mark", "meta mark set ct mark"]),
      ...(hook === "postrouting" || hook === "prerouting"
        ? []
        : ["reject", "meta l4proto tcp reject with tcp reset"]),
    ]),
  );
}
