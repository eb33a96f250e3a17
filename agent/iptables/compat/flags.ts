import { VmmeshError } from "../../core/errors.ts";
import { ipv4Bytes } from "../../core/net.ts";
import { type Prefix, parsePrefix } from "./address.ts";

/** One flag of a command line in the peer's style: `--long VALUE`, `--long=VALUE`, `-s VALUE`, `-sVALUE`, `-s=VALUE`. */
export interface FlagSpec {
  readonly long: string;
  readonly short?: string;
  /** Variable that stands for the flag; the command line wins over it. */
  readonly env?: string;
  /** Second variable, which wins over `env`. */
  readonly also?: string;
  /** `switch` needs no value; a value of `number` is one of 16 bits; `duration` is in Go's notation. */
  readonly kind: "text" | "switch" | "number" | "duration";
  readonly default: string;
  readonly meaning: string;
}

const variable = (long: string): string => long.toUpperCase().replaceAll("-", "_");
const text = (long: string, short: string, fallback: string, meaning: string): FlagSpec => ({
  long,
  short,
  env: variable(long),
  kind: "text",
  default: fallback,
  meaning,
});
const toggle = (long: string, meaning: string, more: Partial<FlagSpec> = {}): FlagSpec => ({
  long,
  env: variable(long),
  kind: "switch",
  default: "false",
  meaning,
  ...more,
});

/** Flags of `pilot-agent istio-iptables` (VM protocol, ch. 7.1), with those that every command of that program takes. */
export const PEER_FLAGS: readonly FlagSpec[] = [
  {
    long: "envoy-port",
    short: "p",
    kind: "text",
    default: "15001",
    meaning: "where outbound connections are sent; ENVOY_PORT is logged by the peer and not read",
  },
  text("inbound-capture-port", "z", "15006", "where inbound connections are sent"),
  text("inbound-tunnel-port", "e", "15008", "port of HBONE, which is never captured"),
  text("proxy-uid", "u", "", "users of the proxy, separated by commas; empty: the uid of ENVOY_USER"),
  text("proxy-gid", "g", "", "groups of the proxy; empty: the same numbers as proxy-uid"),
  text("istio-inbound-interception-mode", "m", "", "TPROXY; every other word is REDIRECT"),
  text("istio-inbound-ports", "b", "", "inbound ports that are captured, or *"),
  text("istio-local-exclude-ports", "d", "", "inbound ports that are not captured, with *"),
  text("istio-exclude-interfaces", "c", "", "interfaces that are left alone"),
  text("istio-service-cidr", "i", "", "destinations that are captured, or *"),
  text("istio-service-exclude-cidr", "x", "", "destinations that are not captured"),
  text("istio-outbound-ports", "q", "", "destination ports that are captured whatever the address"),
  text("istio-local-outbound-ports-exclude", "o", "", "destination ports that are not captured"),
  text("kube-virt-interfaces", "k", "", "interfaces whose incoming traffic counts as outbound"),
  text("istio-inbound-tproxy-mark", "t", "1337", "mark of TPROXY"),
  text("istio-inbound-tproxy-route-table", "r", "133", "routing table of TPROXY"),
  toggle("dry-run", "log the rules, apply nothing", { short: "n" }),
  {
    long: "iptables-probe-port",
    env: "IPTABLES_PROBE_PORT",
    kind: "number",
    default: "15002",
    meaning: "port of the peer's check that the rules work",
  },
  {
    long: "probe-timeout",
    env: "PROBE_TIMEOUT",
    kind: "duration",
    default: "5s",
    meaning: "how long that check may take",
  },
  toggle("skip-rule-apply", "apply nothing"),
  toggle("run-validation", "check that the rules work"),
  toggle("redirect-dns", "capture questions for names", { also: "ISTIO_META_DNS_CAPTURE" }),
  toggle("drop-invalid", "drop segments that conntrack calls invalid", { also: "INVALID_DROP" }),
  toggle("dual-stack", "rules for IPv6 beside those for IPv4", { also: "ISTIO_DUAL_STACK" }),
  toggle("capture-all-dns", "capture all of port 53, not only towards the servers of resolv.conf"),
  {
    long: "network-namespace",
    env: "NETWORK_NAMESPACE",
    kind: "text",
    default: "",
    meaning: "namespace that gets the rules",
  },
  toggle("cni-mode", "called by the CNI plugin"),
  toggle("reconcile", "replace rules that are there and differ"),
  toggle("cleanup-only", "take rules out, apply nothing"),
  toggle("force-apply", "apply although the rules seem to be there"),
  toggle("native-nftables", "nft instead of iptables"),
  {
    long: "force-iptables-binary",
    env: "FORCE_IPTABLES_BINARY",
    kind: "text",
    default: "",
    meaning: "legacy or nft; empty: as the machine has it",
  },
  { long: "help", short: "h", kind: "switch", default: "false", meaning: "print help, apply nothing" },
  { long: "log_as_json", kind: "switch", default: "false", meaning: "log as JSON" },
  ...["log_caller", "log_output_level", "log_stacktrace_level", "log_target", "vklog"].map(
    (long): FlagSpec => ({ long, kind: "text", default: "", meaning: "what is logged, and where" }),
  ),
];

/** Variables of the peer that no flag stands for. An empty one counts as set. */
export const PEER_VARIABLES = [
  { env: "ENVOY_USER", default: "istio-proxy", meaning: "user whose uid is the default of proxy-uid" },
  { env: "ISTIO_OUTBOUND_OWNER_GROUPS", default: "*", meaning: "groups whose traffic is captured, or *" },
  {
    env: "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
    default: "",
    meaning: "groups whose traffic is not captured, with *",
  },
  {
    env: "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
    default: "127.0.0.1/32",
    meaning: "IPv4 destinations that are this machine itself",
  },
] as const;

/** The include lists become one rule; distributions take 128 matches and more in one. */
const MOST_GROUPS = 64;

/** What the peer would make its rules from, read from a command line and an environment. */
export interface CompatConfig {
  readonly envoyPort: string;
  readonly inboundCapturePort: string;
  readonly tunnelPort: string;
  /** undefined: the uid of `envoyUser`, else 1337. */
  readonly proxyUids: readonly string[] | undefined;
  /** undefined: the same as the uids. */
  readonly proxyGids: readonly string[] | undefined;
  readonly envoyUser: string;
  readonly tproxy: boolean;
  readonly tproxyMark: string;
  /** undefined: nothing inbound is captured; an empty list still hooks its chain in. */
  readonly inboundPorts: "*" | readonly string[] | undefined;
  readonly inboundExcludePorts: readonly string[];
  readonly excludeInterfaces: readonly string[];
  readonly kubeVirtInterfaces: readonly string[];
  readonly outboundCidrs: "*" | readonly Prefix[];
  readonly outboundExcludeCidrs: readonly Prefix[];
  readonly outboundPorts: readonly string[];
  readonly outboundExcludePorts: readonly string[];
  /** `all` but the listed ones, or only the listed ones. */
  readonly ownerGroups: { readonly all: boolean; readonly listed: readonly string[] };
  readonly ipv4Loopback: string;
  readonly redirectDns: boolean;
  readonly captureAllDns: boolean;
  readonly dropInvalid: boolean;
  readonly dualStack: boolean;
  /** False with flags that let the peer apply nothing. */
  readonly applies: boolean;
  /** Values of the caller's own flags, in the order given. */
  readonly own: ReadonlyMap<string, readonly string[]>;
}

/**
 * Reads a command line of `istio-iptables` as the peer does: a flag wins over its "also" variable, that over its variable,
 * the last of two flags over the first. A variable of the wrong form is ignored, except that a switch is off then; words
 * that belong to no flag are ignored, and all after `--`.
 *
 * @param argv words after `istio-iptables`
 * @param own flags of the caller that may stand among them
 * @throws {VmmeshError} USAGE where the peer ends with an error, and for `native-nftables`, whose rules are not iptables'
 */
export function parseCompat(
  argv: readonly string[],
  env: Readonly<Record<string, string | undefined>>,
  own: readonly FlagSpec[] = [],
): CompatConfig {
  const typed = readFlags(argv, [...PEER_FLAGS, ...own]);
  const values = new Map(
    PEER_FLAGS.map((spec) => [spec.long, typed.get(spec.long)?.at(-1) ?? fromEnvironment(spec, env)]),
  );
  const value = (long: string): string => values.get(long) ?? "";
  const on = (long: string): boolean => switchValue(value(long)) === true;
  const list = (long: string): readonly string[] => items(value(long));
  const given = (long: string): readonly string[] | undefined =>
    value(long) === "" ? undefined : list(long);
  const [ENVOY_USER, GROUPS, GROUPS_EXCLUDE, LOOPBACK] = PEER_VARIABLES.map(
    (known) => env[known.env] ?? known.default,
  );

  const ownerGroups =
    GROUPS === "*" ? { all: true, listed: items(GROUPS_EXCLUDE) } : { all: false, listed: items(GROUPS) };
  if (!ownerGroups.all && ownerGroups.listed.length > MOST_GROUPS)
    throw refused(
      `ISTIO_OUTBOUND_OWNER_GROUPS has ${ownerGroups.listed.length} groups, more than ${MOST_GROUPS}`,
    );
  if (!["", "legacy", "nft"].includes(value("force-iptables-binary")))
    throw refused(
      `--force-iptables-binary is legacy, nft or nothing, not \`${value("force-iptables-binary")}\``,
    );
  const ipv4Loopback = LOOPBACK ?? "";
  const [address = ""] = ipv4Loopback.split("/");
  const loopback = parsePrefix(ipv4Loopback);
  if (loopback === undefined || ipv4Bytes(address)?.[0] !== 127 || loopback.bits < 8)
    throw refused(`ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR is a range of 127.0.0.0/8, not \`${ipv4Loopback}\``);
  if (on("native-nftables"))
    throw refused("--native-nftables makes nft rules, which are not among what is printed here");

  // The peer looks at ranges only when it makes rules of them.
  const ranges = (long: string): string => (on("skip-rule-apply") ? "" : value(long));
  const [include, exclude] = [ranges("istio-service-cidr"), ranges("istio-service-exclude-cidr")];
  if (exclude === "*") throw refused("--istio-service-exclude-cidr is a list of ranges, not *");
  return {
    envoyPort: value("envoy-port"),
    inboundCapturePort: value("inbound-capture-port"),
    tunnelPort: value("inbound-tunnel-port"),
    proxyUids: given("proxy-uid"),
    proxyGids: given("proxy-gid"),
    envoyUser: ENVOY_USER ?? "",
    tproxy: value("istio-inbound-interception-mode") === "TPROXY",
    tproxyMark: value("istio-inbound-tproxy-mark"),
    inboundPorts: value("istio-inbound-ports") === "*" ? "*" : given("istio-inbound-ports"),
    inboundExcludePorts: list("istio-local-exclude-ports"),
    excludeInterfaces: list("istio-exclude-interfaces"),
    kubeVirtInterfaces: list("kube-virt-interfaces"),
    outboundExcludeCidrs: prefixes("istio-service-exclude-cidr", items(exclude)),
    outboundCidrs: include === "*" ? "*" : prefixes("istio-service-cidr", items(include)),
    outboundPorts: list("istio-outbound-ports"),
    outboundExcludePorts: list("istio-local-outbound-ports-exclude"),
    ownerGroups,
    ipv4Loopback,
    redirectDns: on("redirect-dns"),
    captureAllDns: on("capture-all-dns"),
    dropInvalid: on("drop-invalid"),
    dualStack: on("dual-stack"),
    applies: !["skip-rule-apply", "cleanup-only", "help"].some(on),
    own: new Map(own.map(({ long }) => [long, typed.get(long) ?? []])),
  };
}

/** Values in the order given, by long name. @throws {VmmeshError} USAGE naming the word that is wrong */
function readFlags(argv: readonly string[], specs: readonly FlagSpec[]): Map<string, string[]> {
  const found = new Map<string, string[]>();
  const words = [...argv];
  const take = (spec: FlagSpec | undefined, word: string, attached: string | undefined): void => {
    if (spec === undefined) throw refused(`there is no flag \`${word}\``);
    const value = attached ?? (spec.kind === "switch" ? "true" : words.shift());
    if (value === undefined) throw refused(`\`${word}\` needs a value`);
    if (!isOfKind(spec, value)) throw refused(`--${spec.long} cannot be \`${value}\``);
    found.set(spec.long, [...(found.get(spec.long) ?? []), value]);
  };
  for (let word = words.shift(); word !== undefined && word !== "--"; word = words.shift()) {
    if (word.startsWith("--")) {
      const [, name = "", attached] = /^--([^=]*)(?:=(.*))?$/s.exec(word) ?? [];
      if (name === "" || name.startsWith("-")) throw refused(`\`${word}\` is not the form of a flag`);
      take(
        specs.find(({ long }) => long === name),
        `--${name}`,
        attached,
      );
    } else if (word.startsWith("-")) {
      // `-np 15001`: a switch lets the next letter be a flag of its own; what follows any other letter is its value.
      for (let letters = word.slice(1); letters !== ""; ) {
        const [letter = "", rest] = [letters[0], letters.slice(1)];
        const spec = specs.find(({ short }) => short === letter);
        const attached = /^=./s.test(rest)
          ? rest.slice(1)
          : spec?.kind === "switch" || rest === ""
            ? undefined
            : rest;
        take(spec, `-${letter}`, attached);
        letters = spec?.kind === "switch" && attached === undefined ? rest : "";
      }
    }
  }
  return found;
}

function fromEnvironment(spec: FlagSpec, env: Readonly<Record<string, string | undefined>>): string {
  let value = spec.default;
  for (const name of [spec.env, spec.also]) {
    const set = name === undefined ? undefined : env[name];
    if (set === undefined) continue;
    if (isOfKind(spec, set)) value = set;
    // What is no truth value turns the peer's switch off, and then it goes on.
    else if (spec.kind === "switch") value = "false";
  }
  return value;
}

function isOfKind({ kind }: FlagSpec, value: string): boolean {
  switch (kind) {
    case "text":
      return true;
    case "switch":
      return switchValue(value) !== undefined;
    case "number":
      return /^(0x[\da-f]+|0b[01]+|0o?[0-7]*|[1-9]\d*)$/i.test(value) && Number(value) <= 65535;
    case "duration":
      return /^[-+]?(0|((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+)$/.test(value);
  }
}

/** Words of Go's strconv.ParseBool. */
function switchValue(word: string): boolean | undefined {
  if (["1", "t", "T", "true", "TRUE", "True"].includes(word)) return true;
  return ["0", "f", "F", "false", "FALSE", "False"].includes(word) ? false : undefined;
}

const items = (csv: string | undefined): readonly string[] =>
  (csv ?? "").split(",").filter((item) => item !== "");

function prefixes(long: string, texts: readonly string[]): readonly Prefix[] {
  return texts.map((item) => {
    const prefix = parsePrefix(item);
    if (prefix !== undefined) return prefix;
    throw refused(`--${long}: \`${item}\` is not a range of addresses`);
  });
}

function refused(sentence: string): VmmeshError {
  return new VmmeshError("USAGE", `vmmesh iptables plan --compat istio: ${sentence}`, {
    next: "The flags are those of `pilot-agent istio-iptables --help`.",
  });
}
