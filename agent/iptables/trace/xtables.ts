import type { ParsedRule } from "../parse.ts";
import { inIpSet } from "./ipset.ts";
import {
  addressType,
  CHANCE,
  change,
  ctState,
  ctStatus,
  masquerade,
  nothing,
  opaque,
  redirect,
  type Step,
  socketOf,
  type Test,
  test,
  tproxy,
  translate,
  verdict,
} from "./model.ts";
import {
  addressesOf,
  addressNumber,
  allTri,
  anyTri,
  ITS_SOURCE,
  isUnknown,
  notTri,
  type Packet,
  PROTOCOL_NUMBER,
  parseSpan,
  protocolNumber,
  type Span,
  span,
  type Tri,
  within,
} from "./packet.ts";

/** `! --dport 80:90` → name `--dport`, args `["80:90"]`, not. */
interface Option {
  readonly name: string;
  readonly args: readonly string[];
  readonly not: boolean;
}

/** One line of `iptables-save` as steps. What is not known here is a step of which nobody can say the result. */
export function compileRule(rule: ParsedRule, chains: ReadonlySet<string>): Step[] {
  const groups = grouped(rule.words.slice(2));
  const steps = groups.matches.flatMap(([module, options]) => compileMatch(module, options));
  const { target } = groups;
  if (target === undefined) return steps;
  const [name, options, goesTo] = target;
  if (chains.has(name)) return [...steps, verdict({ do: goesTo ? "goto" : "jump", chain: name })];
  return [...steps, (TARGETS[name] ?? (() => opaque(`what the target ${name} does`)))(options)];
}

function grouped(words: readonly string[]): {
  matches: [string, Option[]][];
  target: [string, Option[], boolean] | undefined;
} {
  const matches: [string, Option[]][] = [["", []]];
  let target: [string, Option[], boolean] | undefined;
  let not = false;
  for (let at = 0; at < words.length; at++) {
    const word = words[at] ?? "";
    if (word === "!") {
      not = true;
      continue;
    }
    const args: string[] = [];
    while (at + 1 < words.length && !/^(!|-[a-z]|--[a-z].*)$/.test(words[at + 1] ?? ""))
      args.push(words[++at] ?? "");
    if (word === "-m") matches.push([args[0] ?? "", []]);
    else if (word === "-j" || word === "-g") target = [args[0] ?? "", [], word === "-g"];
    else if (/^-[psdiof]$/.test(word)) matches[0]?.[1].push({ name: word, args, not });
    else (target?.[1] ?? matches.at(-1)?.[1])?.push({ name: word, args, not });
    not = false;
  }
  return { matches, target };
}

function compileMatch(module: string, options: readonly Option[]): Step[] {
  const special = WHOLE[module];
  if (special !== undefined) return [test(special(options))];
  return options.map((option) => {
    const judge = TESTS[`${module} ${option.name}`.trim()]?.(option.args);
    if (judge === undefined) return opaque(`whether \`-m ${module} ${option.name}\` matches`);
    return test((packet, world) => (option.not ? notTri(judge(packet, world)) : judge(packet, world)));
  });
}

const first = (args: readonly string[]): string => args[0] ?? "";
const spans = (text: string): Span[] => text.split(",").flatMap((part) => parseSpan(part) ?? []);
const oneOf = (value: Span, patterns: readonly Span[]): Tri =>
  anyTri(patterns.map((pattern) => within(value, pattern)));

const portOf =
  (side: "from" | "to") =>
  (args: readonly string[]): Test => {
    const wanted = spans(first(args));
    return (packet) => oneOf(packet[side].port, wanted);
  };

const addressOf =
  (side: "from" | "to") =>
  (args: readonly string[]): Test | undefined => {
    const wanted = parseSpan(first(args));
    return wanted === undefined ? undefined : (packet) => within(addressesOf(packet, side), wanted);
  };

/** `eth0`, or `veth+` for every name that begins so. */
const deviceOf =
  (side: "in" | "out") =>
  (args: readonly string[]): Test => {
    const name = first(args);
    return (packet) => {
      const device = packet[side] ?? "";
      return name.endsWith("+") ? device.startsWith(name.slice(0, -1)) : device === name;
    };
  };

function carries(mark: bigint, args: readonly string[]): boolean {
  const [value = "0", mask = "0xffffffff"] = first(args).split("/");
  return (mark & BigInt(mask)) === BigInt(value);
}

const FLAGS: Readonly<Record<string, number>> = {
  FIN: 1,
  SYN: 2,
  RST: 4,
  PSH: 8,
  ACK: 16,
  URG: 32,
  ALL: 63,
  NONE: 0,
};
const flags = (text: string): number => text.split(",").reduce((bits, name) => bits | (FLAGS[name] ?? 0), 0);

const owner =
  (key: "uid" | "gid") =>
  (args: readonly string[]): Test | undefined => {
    const wanted = parseSpan(first(args));
    if (wanted === undefined) return undefined;
    return ({ sender }) => {
      if (sender === undefined) return false;
      const id = sender[key];
      return id === undefined
        ? { unknown: `the group of user ${sender.uid} is not known` }
        : within(span(id), wanted);
    };
  };

/** Of ICMP only an echo request is walked. `255` is iptables' any. (ipt_icmp) */
function echo(args: readonly string[]): Test {
  const [type = ""] = first(args).split("/");
  return ({ family }) => type === "any" || type === "255" || type === (family === 4 ? "8" : "128");
}

const typeOf =
  (side: "from" | "to") =>
  (args: readonly string[]): Test => {
    const wanted = first(args).toLowerCase().split(",");
    return (packet, world) => {
      if (side === "from" && packet.fromAnywhere) return { unknown: ITS_SOURCE };
      const type = addressType(world, packet.family, packet[side].address);
      if (isUnknown(type)) return type;
      if (packet.family === 4) return wanted.includes(String(type));
      // IPv6 has no "unicast but not local": only these three are looked up in the routes. (xt_addrtype.c, match_type6)
      if (wanted.includes("multicast") && type !== "multicast") return false;
      if (wanted.includes("unicast") && type === "multicast") return false;
      const looked = wanted.filter((each) => /^(local|anycast|unreachable)$/.test(each));
      return looked.length === 0 || looked.includes(String(type));
    };
  };

const original =
  (side: "from" | "to", what: "address" | "port") =>
  (args: readonly string[]): Test | undefined => {
    const wanted = parseSpan(first(args));
    if (wanted === undefined) return undefined;
    return (packet) =>
      within(
        what === "address" ? addressesOf(packet, side, packet.original) : packet.original[side].port,
        wanted,
      );
  };

/** Options by match. @see iptables-extensions(8) */
const TESTS: Readonly<Record<string, (args: readonly string[]) => Test | undefined>> = {
  "-p": (args) => {
    const number = PROTOCOL_NUMBER[first(args)] ?? Number(first(args));
    return (packet) => number === 0 || first(args) === "all" || number === protocolNumber(packet);
  },
  "-s": addressOf("from"),
  "-d": addressOf("to"),
  "-i": deviceOf("in"),
  "-o": deviceOf("out"),
  "-f": () => () => false,
  "tcp --dport": portOf("to"),
  "tcp --sport": portOf("from"),
  "udp --dport": portOf("to"),
  "udp --sport": portOf("from"),
  "tcp --syn": () => () => true,
  "tcp --tcp-flags":
    ([mask = "", set = ""]) =>
    () =>
      (2 & flags(mask)) === flags(set),
  "icmp --icmp-type": echo,
  "icmp6 --icmpv6-type": echo,
  "multiport --dports": portOf("to"),
  "multiport --sports": portOf("from"),
  "multiport --ports": (args) => {
    const wanted = spans(first(args));
    return (packet) => anyTri([oneOf(packet.to.port, wanted), oneOf(packet.from.port, wanted)]);
  },
  "iprange --src-range": addressOf("from"),
  "iprange --dst-range": addressOf("to"),
  "mark --mark": (args) => (packet) => carries(packet.mark, args),
  "owner --uid-owner": owner("uid"),
  "owner --gid-owner": owner("gid"),
  "owner --socket-exists": () => (packet) => packet.sender !== undefined,
  "addrtype --src-type": typeOf("from"),
  "addrtype --dst-type": typeOf("to"),
  "state --state": (args) => {
    const wanted = first(args).toLowerCase().split(",");
    return (packet) => wanted.includes(ctState(packet));
  },
};

const CONNTRACK: Readonly<Record<string, (args: readonly string[]) => Test | undefined>> = {
  "--ctorigdst": original("to", "address"),
  "--ctorigdstport": original("to", "port"),
  "--ctorigsrc": original("from", "address"),
  "--ctorigsrcport": original("from", "port"),
  "--ctdir": (args) => () => first(args) === "ORIGINAL",
  "--ctstatus": (args) => {
    const wanted = first(args).toLowerCase().split(",");
    return (packet) => {
      const bits = ctStatus(packet);
      return wanted.some((bit) => (bit === "none" ? bits.length === 0 : bits.includes(bit)));
    };
  },
};

const negate = ({ not }: Option, tri: Tri): Tri => (not ? notTri(tri) : tri);

/** Matches whose options belong together. */
const WHOLE: Readonly<Record<string, (options: readonly Option[]) => Test>> = {
  comment: () => () => true,
  /** Without an entry it is false, negated or not. (xt_connmark.c) */
  connmark: (options) => {
    const wanted = options.find(({ name }) => name === "--mark");
    if (wanted === undefined) return () => ({ unknown: "what `-m connmark` asks" });
    return ({ tracking, ctMark }) =>
      tracking !== "not yet" && tracking !== "untracked" && carries(ctMark, wanted.args) !== wanted.not;
  },
  /** Without an entry only `--ctstate` is asked, and the other options count for nothing. (xt_conntrack.c) */
  conntrack: (options) => {
    const states = options.find(({ name }) => name === "--ctstate");
    const wanted = first(states?.args ?? [])
      .toLowerCase()
      .split(",");
    const others = options.filter((option) => option !== states);
    return (packet, world) => {
      if (states !== undefined) {
        const { translated } = packet;
        const is =
          wanted.includes(ctState(packet)) ||
          (wanted.includes("snat") && translated.source) ||
          (wanted.includes("dnat") && translated.destination);
        if (is === states.not) return false;
      }
      if (packet.tracking === "zoned" && others.length > 0)
        return { unknown: "what the template of a conntrack zone says" };
      if (packet.tracking !== "tracked") return states !== undefined;
      return allTri(
        others.map((option) => {
          const judge = CONNTRACK[option.name]?.(option.args);
          if (judge === undefined) return { unknown: `whether \`-m conntrack ${option.name}\` matches` };
          return negate(option, judge(packet, world));
        }),
      );
    };
  },
  /** Without a socket of its own a packet is in no cgroup, and the negated match does not hold either. (xt_cgroup.c) */
  cgroup: (options) => {
    const path = options.find(({ name }) => name === "--path");
    if (path === undefined) return () => ({ unknown: "what `-m cgroup` asks" });
    const wanted = first(path.args).replace(/^\//, "");
    return ({ sender, proxied }) => {
      if (proxied !== undefined) return { unknown: "the cgroup of the proxy is not known" };
      if (sender === undefined) return false;
      if (sender.cgroup === undefined) return { unknown: "the cgroup of the sender is not known" };
      return `${sender.cgroup}/`.startsWith(`${wanted}/`) !== path.not;
    };
  },
  /** A listener that is bound to exactly this address; one on every address counts only with `--nowildcard`. (xt_socket.c) */
  socket: (options) => {
    const has = (name: string): boolean => options.some((option) => option.name === name);
    if (has("--restore-skmark")) return () => ({ unknown: "which mark a socket has" });
    return (packet, world) => {
      const socket = socketOf(packet, world);
      if (socket === undefined || (socket.wildcard && !has("--nowildcard"))) return false;
      if (!has("--transparent")) return true;
      return socket.transparent ?? { unknown: "whether the socket is transparent" };
    };
  },
  set: (options) => {
    const wanted = options.find(({ name }) => name === "--match-set");
    const harmless = /^--(match-set|return-nomatch|update-counters|update-subcounters)$/;
    if (wanted === undefined || options.some(({ name }) => !harmless.test(name)))
      return () => ({ unknown: "what `-m set` asks" });
    const [name = "", directions = ""] = wanted.args;
    return (packet, world) => negate(wanted, inIpSet(world.ipSets, name, packet, directions.split(",")));
  },
  statistic: () => () => ({ unknown: CHANCE }),
  limit: () => () => ({ unknown: "how many packets came before" }),
  hashlimit: () => () => ({ unknown: "how many packets came before" }),
  /** `--rcheck --seconds N` of one list; every other use depends on counts that nobody else sees. */
  recent: (options) => {
    const option = (name: string): Option | undefined => options.find((each) => each.name === name);
    const list = first(option("--name")?.args ?? []);
    if (option("--set") !== undefined) return () => option("--set")?.not !== true;
    const check = option("--rcheck") ?? option("--update");
    const unknown = { unknown: `what the list ${list} of \`-m recent\` holds` };
    if (check === undefined || option("--hitcount") !== undefined || option("--rttl") !== undefined)
      return () => unknown;
    const seconds = option("--seconds");
    const mask = addressNumber(first(option("--mask")?.args ?? []));
    const side = option("--rdest") === undefined ? "from" : "to";
    return (packet, world) => {
      if (side === "from" && packet.fromAnywhere) return { unknown: ITS_SOURCE };
      const age = world.recent(list, packet[side].address & (mask ?? -1n));
      if (age === undefined) return unknown;
      return negate(check, age !== "never" && (seconds === undefined || age <= Number(first(seconds.args))));
    };
  },
};

type Target = (options: readonly Option[]) => Step;
const arg = (options: readonly Option[], name: string): string | undefined =>
  options.find((option) => option.name === name)?.args[0];
const maskOf = (options: readonly Option[], name: string): bigint =>
  BigInt(arg(options, name) ?? arg(options, "--mask") ?? "0xffffffff");

/** `10.0.0.1:80`, `[fd00::1]:80`, `:80`, `10.0.0.1-10.0.0.5` */
function translated(direction: "source" | "destination", option: string): Target {
  return (options) => {
    const text = arg(options, option) ?? "";
    const [, bracketed, plain, ports] =
      /^(?:\[([^\]]*)\]|([^:]*(?::[^:]*:.*)?))(?::([\d-]+).*)?$/.exec(text) ?? [];
    const address = parseSpan(bracketed ?? plain ?? "");
    const port = ports === undefined ? undefined : parseSpan(ports);
    const given = (bracketed ?? plain ?? "") !== "";
    if ((given && address === undefined) || (!given && port === undefined))
      return opaque(`what \`${text}\` means`);
    const ends = (range: Span | undefined): (bigint | undefined)[] => [...new Set([range?.low, range?.high])];
    const choices = ends(address).flatMap((one) =>
      ends(port).map((number) => ({
        address: one,
        port: number === undefined ? undefined : span(number),
      })),
    );
    return translate(direction, () => choices);
  };
}

function marked(options: readonly Option[], old: bigint): bigint {
  const [value = "0", mask = "0xffffffff"] = (
    arg(options, "--set-xmark") ??
    arg(options, "--set-mark") ??
    "0/0"
  ).split("/");
  return (old & ~BigInt(mask)) ^ BigInt(value);
}

const untrack = (packet: Packet): Packet =>
  packet.tracking === "not yet" ? { ...packet, tracking: "untracked" } : packet;

/** @see iptables-extensions(8), "TARGET EXTENSIONS" */
const TARGETS: Readonly<Record<string, Target>> = {
  ACCEPT: () => verdict({ do: "accept" }),
  DROP: () => verdict({ do: "drop" }),
  RETURN: () => verdict({ do: "return" }),
  QUEUE: () => verdict({ do: "queue" }),
  NFQUEUE: () => verdict({ do: "queue" }),
  REJECT: (options) =>
    verdict({ do: "reject", with: arg(options, "--reject-with") ?? "icmp-port-unreachable" }),
  REDIRECT: (options) => {
    const ports = parseSpan(arg(options, "--to-ports") ?? "");
    return ports !== undefined && ports.low !== ports.high
      ? opaque(`which of the ports ${arg(options, "--to-ports")} is taken`)
      : redirect(ports);
  },
  DNAT: translated("destination", "--to-destination"),
  SNAT: translated("source", "--to-source"),
  MASQUERADE: () => masquerade,
  MARK: (options) => change((packet) => ({ ...packet, mark: marked(options, packet.mark) })),
  CONNMARK: (options) => {
    const has = (name: string): boolean => options.some((option) => option.name === name);
    const nf = maskOf(options, "--nfmask");
    const ct = maskOf(options, "--ctmask");
    return change((packet) => {
      if (packet.tracking !== "tracked") return packet;
      const { mark, ctMark } = packet;
      if (has("--save-mark")) return { ...packet, ctMark: (ctMark & ~ct) ^ (mark & nf) };
      if (has("--restore-mark")) return { ...packet, mark: (mark & ~nf) ^ (ctMark & ct) };
      return { ...packet, ctMark: marked(options, ctMark) };
    });
  },
  CT: (options) =>
    change((packet) => {
      if (options.some(({ name }) => name === "--notrack")) return untrack(packet);
      return packet.tracking === "not yet" ? { ...packet, tracking: "zoned" } : packet;
    }),
  NOTRACK: () => change(untrack),
  TPROXY: (options) => {
    const [value = "0", mask = "0xffffffff"] = (arg(options, "--tproxy-mark") ?? "0/0").split("/");
    const address = addressNumber(arg(options, "--on-ip") ?? "");
    const port = parseSpan(arg(options, "--on-port") ?? "");
    if (port === undefined) return opaque("which port TPROXY means");
    return tproxy(address === 0n ? undefined : address, port, { do: "drop" }, (packet) => ({
      packet: { ...packet, mark: (packet.mark & ~BigInt(mask)) ^ BigInt(value) },
      does: { do: "accept" },
    }));
  },
  ...Object.fromEntries(
    [
      "LOG",
      "NFLOG",
      "TRACE",
      "CLASSIFY",
      "TOS",
      "DSCP",
      "TTL",
      "HL",
      "CHECKSUM",
      "TCPMSS",
      "SET",
      "AUDIT",
    ].map((name) => [name, () => nothing]),
  ),
};
