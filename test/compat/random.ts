import fc from "fast-check";
import { compatFacts } from "../../agent/iptables/compat/facts.ts";
import { type FlagSpec, PEER_FLAGS, parseCompat } from "../../agent/iptables/compat/flags.ts";
import { compatRules } from "../../agent/iptables/compat/rules.ts";
import { type Documents, PASSWD, type PeerMachine } from "./peer.ts";

/** Flags that are left out: they end the peer's dry run, change its log, or choose rules that are not iptables'. */
const LEFT_OUT = /^(dry-run|help|run-validation|native-nftables|log_.*|vklog|network-namespace)$/;

/** A random option set of the peer, with the machine that it meets. */
export interface OptionSet {
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  readonly families: readonly (4 | 6)[];
  readonly nameservers: readonly string[];
}

/** The second list once in thirty times: what is refused says little about rules. */
const mostly = (good: readonly string[], bad: readonly string[]): fc.Arbitrary<string> =>
  fc.oneof(
    { weight: 30, arbitrary: fc.constantFrom(...good) },
    { weight: 1, arbitrary: fc.constantFrom(...bad) },
  );
const listOf = (item: fc.Arbitrary<string>): fc.Arbitrary<string> =>
  fc
    .array(fc.oneof({ weight: 12, arbitrary: item }, { weight: 1, arbitrary: fc.constant("") }), {
      maxLength: 4,
    })
    .map((items) => items.join(","));
const starOr = (list: fc.Arbitrary<string>): fc.Arbitrary<string> => fc.oneof(fc.constant("*"), list, list);
const port = fc.integer({ min: 1, max: 65535 }).map(String);
const id = fc.oneof(fc.integer({ min: 0, max: 70000 }).map(String), fc.constantFrom("java", "ftp"));
const nic = fc.constantFrom("eth0", "eth1", "not-istio-nic", "lo", "veth+");
const ipv6Text = fc.oneof(
  fc.ipV6(),
  fc.constantFrom(
    "::1",
    "::",
    "2001:DB8::",
    "fd00:0:0:1::",
    "::ffff:127.0.0.1",
    "::ffff:10.1.2.3",
    "::7f00:1",
  ),
);
const cidr = fc.oneof(
  {
    weight: 60,
    arbitrary: fc.tuple(fc.ipV4(), fc.integer({ min: 0, max: 32 })).map(([ip, bits]) => `${ip}/${bits}`),
  },
  {
    weight: 60,
    arbitrary: fc.tuple(ipv6Text, fc.integer({ min: 0, max: 128 })).map(([ip, bits]) => `${ip}/${bits}`),
  },
  { weight: 3, arbitrary: fc.constantFrom("127.0.0.1/32", "127.9.9.9/8", "::1/128") },
  {
    weight: 1,
    arbitrary: fc.constantFrom(
      "10.0.0.0",
      "10.0.0.0/33",
      "010.0.0.0/8",
      "x",
      "fe80::1%e/64",
      "1.2.3.4::/9",
      " 10.0.0.0/8",
      "*",
    ),
  },
);
const truth = mostly("1 t T true TRUE True 0 f F false FALSE False".split(" "), ["", "yes", "tRUE", "2"]);
const text = fc.constantFrom("", "15001", "15106", "0x539", "9", "=5", "-p");
const VALUES: Readonly<Record<string, fc.Arbitrary<string>>> = {
  "istio-inbound-interception-mode": fc.constantFrom("TPROXY", "TPROXY", "REDIRECT", "tproxy", "NONE", ""),
  "istio-inbound-ports": starOr(listOf(port)),
  "istio-local-exclude-ports": listOf(port),
  "istio-exclude-interfaces": listOf(nic),
  "istio-service-cidr": starOr(listOf(cidr)),
  "istio-service-exclude-cidr": listOf(cidr),
  "istio-outbound-ports": listOf(port),
  "istio-local-outbound-ports-exclude": listOf(port),
  "kube-virt-interfaces": listOf(nic),
  "proxy-uid": listOf(id),
  "proxy-gid": listOf(id),
  "force-iptables-binary": mostly(["", "nft", "legacy"], ["other"]),
  "iptables-probe-port": mostly(["15002", "0x10", "0", "010"], ["65536", "", "-1", "08"]),
  "probe-timeout": mostly(["5s", "1m2.5s", "0", ".5h", "-1ns"], ["5", ""]),
};
const NOTHING_APPLIED = /^(skip-rule-apply|cleanup-only)$/;
const VARIABLES = fc.record(
  {
    ENVOY_USER: fc.constantFrom("istio-proxy", "nobody", "nosuch", ""),
    ENVOY_PORT: port,
    ISTIO_OUTBOUND_OWNER_GROUPS: fc.oneof(
      { weight: 20, arbitrary: starOr(listOf(id)) },
      { weight: 1, arbitrary: fc.constantFrom("g,".repeat(64), "g,".repeat(65)) },
    ),
    ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: listOf(id),
    ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: mostly(
      ["127.0.0.1/8", "127.0.0.1/32", "127.1.2.3/24"],
      ["127.0.0.0/7", "10.0.0.0/8", "::1/128", "::ffff:127.0.0.1/120", ""],
    ),
  },
  { requiredKeys: [] },
);

/** One flag or variable in one of its spellings. */
function spelled(spec: FlagSpec): fc.Arbitrary<Pick<OptionSet, "argv" | "env">> {
  const value = spec.kind === "switch" ? truth : (VALUES[spec.long] ?? text);
  const onLine = value.chain((word) => {
    const { long, short } = spec;
    const spellings = [
      [`--${long}=${word}`],
      ...(spec.kind === "switch" ? [[`--${long}`], [`--${long}`, word]] : [[`--${long}`, word]]),
      ...(short === undefined
        ? []
        : [[`-${short}=${word}`], [`-${short}${word}`], [`-${short}`, word], [`-n${short}`, word]]),
    ];
    return fc.constantFrom(...spellings).map((argv) => ({ argv, env: {} }));
  });
  const inEnvironment = [spec.env, spec.also].flatMap((name) =>
    name === undefined ? [] : [value.map((word) => ({ argv: [], env: { [name]: word } }))],
  );
  return fc.oneof(onLine, ...inEnvironment, ...inEnvironment);
}

const flagOf = (wanted: (long: string) => boolean): fc.Arbitrary<Pick<OptionSet, "argv" | "env">> =>
  fc.constantFrom(...PEER_FLAGS.filter(({ long }) => !LEFT_OUT.test(long) && wanted(long))).chain(spelled);

const server = fc.oneof(
  { weight: 8, arbitrary: fc.oneof(fc.constant("127.0.0.53"), fc.ipV4(), ipv6Text) },
  { weight: 1, arbitrary: fc.constantFrom("localhost", "fe80::1%eth0", "1.2.3", "FE80::A%b") },
);
export const optionSet: fc.Arbitrary<OptionSet> = fc
  .record({
    parts: fc.array(
      fc.oneof(
        { weight: 60, arbitrary: flagOf((long) => !NOTHING_APPLIED.test(long)) },
        { weight: 1, arbitrary: flagOf((long) => NOTHING_APPLIED.test(long)) },
      ),
      { maxLength: 12 },
    ),
    // What decides about most rules is asked for more often than the other forty words.
    dns: fc.constantFrom([], ["--redirect-dns"], ["--redirect-dns", "--capture-all-dns"]),
    stray: fc.oneof(
      { weight: 20, arbitrary: fc.constant<string[]>([]) },
      {
        weight: 1,
        arbitrary: fc.constantFrom(["word"], ["--"], ["--zap"], ["-Z"], ["---x"], ["-"], ["--="]),
      },
    ),
    variables: VARIABLES,
    families: fc.constantFrom([4], [6], [6], [4, 6]) as fc.Arbitrary<(4 | 6)[]>,
    nameservers: fc.array(server, { maxLength: 3 }),
  })
  .map(({ parts, dns, stray, variables, families, nameservers }) => ({
    argv: [...dns, ...stray, ...parts.flatMap(({ argv }) => argv)],
    env: Object.assign({}, ...parts.map(({ env }) => env), variables) as Record<string, string>,
    families,
    nameservers,
  }));

/** What `iptables plan --compat istio` prints; undefined: it refuses. */
export function printed({ argv, env }: OptionSet, machine: PeerMachine): Documents {
  try {
    const config = parseCompat(argv, env);
    const facts = compatFacts(config, {
      addresses: machine.addresses,
      resolvConf: machine.resolvConf,
      passwd: PASSWD,
    });
    return { 4: compatRules(config, facts, 4), 6: compatRules(config, facts, 6) };
  } catch {
    return undefined;
  }
}

/** Lines that only one of the two has, and what both were given. */
export function difference(set: OptionSet, ours: Documents, theirs: Documents): string {
  const lines = (document: string | undefined): readonly string[] => document?.split("\n") ?? ["refused"];
  return [
    JSON.stringify(set),
    ...([4, 6] as const).flatMap((family) => {
      const [mine, peers] = [lines(ours?.[family]), lines(theirs?.[family])];
      const at = peers.findIndex((line, index) => line !== mine[index]);
      if (at < 0 && mine.length === peers.length) return [];
      return [
        `IPv${family}, line ${at + 1}:`,
        `  peer: ${peers[at] ?? "(end)"}`,
        `  ours: ${mine[at] ?? "(end)"}`,
      ];
    }),
  ].join("\n");
}
