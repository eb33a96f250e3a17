import type { FamilyPlan } from "./plan.ts";
import {
  COMMENT_PREFIX,
  type Family,
  type FenceRule,
  type Hook,
  isHook,
  LEASE_SECONDS,
  type Match,
  type Rule,
  type Table,
  TPROXY_MARK,
  unitSet,
} from "./rules.ts";

export const FENCE_TABLE = "inet vmmesh-fence";
export const HELD_TABLE = "inet vmmesh-hold";
export const GUARD_PRIORITY = -120;

/** One table a family, so that each has its own leases and the rules need no family match. */
export function guardTable(family: Family): string {
  return family === 4 ? "ip vmmesh" : "ip6 vmmesh";
}

/** A set needs a key and ours asks only "when last": this one is always 0. */
const LEASE_KEY = "meta mark and 0";

/**
 * Priorities: the smaller runs first. Zones before iptables' raw (-300); leases and marks before its mangle (-150) but after
 * conntrack (-200), for a connection's mark is in its entry; nat before every other program's (kube-proxy and Docker use -100).
 */
const BASE: Readonly<Record<Table, { readonly type: string; readonly priority: number }>> = {
  raw: { type: "filter", priority: -310 },
  mangle: { type: "filter", priority: -155 },
  nat: { type: "nat", priority: GUARD_PRIORITY },
};

/** After what kube-proxy and Docker translate (-100): who is readdressed to a container is no longer on the way to this machine. */
const LATE_PRIORITY = -90;

/** The same rules once more as a table of our own, whose place no other program can take. Replaces an older one in one step. */
export function renderGuard(plan: FamilyPlan): string {
  const table = guardTable(plan.family);
  const leases = new Set(
    plan.rules.flatMap((rule) => [
      ...rule.when.flatMap((match) => (match.is === "leased" ? [match.lease] : [])),
      ...(rule.verdict.do === "refresh" ? [rule.verdict.lease] : []),
    ]),
  );
  const lines: string[] = [];
  for (const lease of leases) {
    lines.push(
      `\tset lease_${lease} { type mark; flags dynamic,timeout; timeout ${LEASE_SECONDS}s; size 16; }`,
    );
  }
  lines.push(...unitSets(plan.rules));
  for (const name of new Set(plan.rules.map(chainOf))) {
    const rules = plan.rules.filter((rule) => chainOf(rule) === name);
    const [first] = rules;
    if (first === undefined) continue;
    lines.push(`\tchain ${name} {`);
    if (isHook(first.chain)) lines.push(`\t\t${baseChain(first, first.chain, plan)}`);
    for (const rule of rules) lines.push(`\t\t${guardRule(rule)}`);
    lines.push("\t}");
  }
  return [`add table ${table}`, `delete table ${table}`, `table ${table} {`, ...lines, "}", ""].join("\n");
}

/** Empty: what names a cgroup that is not there cannot be loaded. `scope.sh` fills them. */
function unitSets(rules: readonly { readonly when: readonly Match[] }[]): string[] {
  const sets = rules.flatMap(({ when }) =>
    when.flatMap((match) => (match.is === "unit" ? [unitSet(match.list, match.level)] : [])),
  );
  return [...new Set(sets)].map((set) => `\tset ${set} { type cgroupsv2; }`);
}

/** iptables has a name space of chains for each table, an nft table has one. */
function chainName(table: Table, chain: string): string {
  return `${table}_${chain}`;
}

const chainOf = ({ table, chain, late }: Rule): string =>
  `${chainName(table, chain)}${late === true ? "_late" : ""}`;

function baseChain({ table, late }: Rule, hook: Hook, plan: FamilyPlan): string {
  const { type: usual, priority: early } = BASE[table];
  const priority = late === true ? LATE_PRIORITY : early;
  // Only a chain of this type has the kernel look for another route when it changes a mark (nft(8)).
  const reroutes =
    table === "mangle" && hook === "OUTPUT" && plan.rules.some(({ verdict }) => verdict.do === "restoreMark");
  const type = reroutes ? "route" : usual;
  return `type ${type} hook ${hook.toLowerCase()} priority ${priority}; policy accept;`;
}

/** First segments that the fence refused, and those that it let go past Envoy; one of each for a direction. */
const FENCE_COUNTERS = [
  { verdict: "reset", name: "refused" },
  { verdict: "count", name: "bypassed" },
] as const;

/** The fence as one table for both families. Replaces an older one in one step. */
export function renderFence(rules: readonly FenceRule[]): string {
  const chain = (name: FenceRule["chain"]): string[] => {
    const own = rules.filter((rule) => rule.chain === name);
    if (own.length === 0) return [];
    return [
      ...FENCE_COUNTERS.filter((counter) => own.some(({ verdict }) => verdict.do === counter.verdict)).map(
        (counter) => `\tcounter ${counter.name}_${name} { }`,
      ),
      `\tchain ${name} {`,
      `\t\ttype filter hook ${name} priority 10; policy accept;`,
      ...own.flatMap((rule) => fenceRule(rule).map((line) => `\t\t${line}`)),
      "\t}",
    ];
  };
  return [
    `add table ${FENCE_TABLE}`,
    `delete table ${FENCE_TABLE}`,
    `table ${FENCE_TABLE} {`,
    ...unitSets(rules),
    ...chain("output"),
    ...chain("input"),
    "}",
    "",
  ].join("\n");
}

/**
 * The fence a second time, for the one process that holds it (vmmesh-hold.service): nobody else can flush or delete a table
 * with `flags owner`, so it stands while `nft flush ruleset` has taken the fence and repair has not brought it back. It only
 * refuses. Its nat chain is empty: with the last nat chain the kernel would forget to translate connections that are open,
 * and what an application writes into one would leave for the address that it dialled. One command a line, as nft reads
 * its standard input.
 */
export function renderHeld(rules: readonly FenceRule[]): string {
  const hooks = (["output", "input"] as const).filter((hook) => rules.some(({ chain }) => chain === hook));
  const opening = expression({ is: "opening" }, true).replace(" == ", " != ");
  return [
    `add table ${HELD_TABLE} { flags owner; }`,
    `add chain ${HELD_TABLE} translation { type nat hook output priority 10; policy accept; }`,
    ...hooks.flatMap((hook) => [
      `add counter ${HELD_TABLE} refused_${hook}`,
      `add chain ${HELD_TABLE} ${hook} { type filter hook ${hook} priority 11; policy accept; }`,
      `add rule ${HELD_TABLE} ${hook} meta l4proto != tcp return`,
      `add rule ${HELD_TABLE} ${hook} ${opening} return`,
    ]),
    ...rules.flatMap((rule) =>
      fenceRule(rule.verdict.do === "count" ? { ...rule, verdict: { do: "return" } } : rule).map(
        (line) => `add rule ${HELD_TABLE} ${rule.chain} ${line}`,
      ),
    ),
    "",
  ].join("\n");
}

/** What conntrack does not track has no original destination: it is judged by the one that it carries. */
function fenceRule(rule: FenceRule): string[] {
  const verdict = {
    return: "return",
    reset: `counter name "refused_${rule.chain}" reject with tcp reset`,
    count: `counter name "bypassed_${rule.chain}" return`,
  }[rule.verdict.do];
  const variants = rule.when.some((match) => match.is === "addressedTo" || match.is === "addressedToPorts")
    ? [true, false]
    : [true];
  return variants.map((tracked) =>
    [
      ...(tracked ? [] : ["ct state untracked"]),
      ...rule.when.map((match) => expression(match, tracked)),
      verdict,
      comment(rule.why),
    ].join(" "),
  );
}

function guardRule(rule: Rule): string {
  return [...rule.when.map((match) => expression(match, true)), action(rule), comment(rule.why)].join(" ");
}

function comment(why: string): string {
  return `comment "${COMMENT_PREFIX}${why}"`;
}

const not = (match: Match): string => ("not" in match && match.not === true ? "!= " : "");

/** `docker+` of iptables is `docker*` of nft. */
const wildcard = (name: string): string => name.replace(/\+$/, "*");

/** @see nft(8): meta, payload, ct, fib and set reference expressions */
function expression(match: Match, tracked: boolean): string {
  const ip = (cidr: string): string => (cidr.includes(":") ? "ip6" : "ip");
  switch (match.is) {
    case "protocol":
      return `meta l4proto ${match.protocol}`;
    case "from":
      return `${ip(match.cidr)} saddr ${match.cidr}`;
    case "to":
      return `${ip(match.cidr)} daddr ${not(match)}${match.cidr}`;
    case "addressedTo":
      return tracked
        ? `ct original ${ip(match.cidr)} daddr ${match.cidr}`
        : `${ip(match.cidr)} daddr ${match.cidr}`;
    case "addressedToPorts":
      return `${tracked ? "ct original proto-dst" : "th dport"} { ${match.ports.join(", ")} }`;
    case "in":
      return `iifname ${not(match)}"${wildcard(match.interface)}"`;
    case "out":
      return `oifname ${not(match)}"${wildcard(match.interface)}"`;
    case "fromPorts":
      return `th sport { ${match.ports.join(", ")} }`;
    case "toPorts":
      return `th dport { ${match.ports.join(", ")} }`;
    case "owner":
      return `meta skuid ${not(match)}${match.uid}`;
    case "unit":
      return `socket cgroupv2 level ${match.level} @${unitSet(match.list, match.level)}`;
    case "ownerGroup":
      return `meta skgid ${match.gid}`;
    case "toThisMachine":
      return "fib daddr type local";
    case "family":
      return `meta nfproto ipv${match.family}`;
    case "opening":
      return "tcp flags & (fin | syn | rst | ack) == syn";
    case "accepted":
      return "tcp flags & (fin | syn | rst | ack) == (syn | ack)";
    case "invalid":
      return "ct state invalid";
    case "leased":
      return `${LEASE_KEY} @lease_${match.lease}`;
    case "marked":
      return `${match.on === "packet" ? "meta" : "ct"} mark & ${hex(TPROXY_MARK.mask)} == ${hex(TPROXY_MARK.value)}`;
    case "handedOver":
      return "socket transparent 1";
  }
}

const hex = (bits: number): string => `0x${bits.toString(16)}`;
const OTHER_BITS = hex((~TPROXY_MARK.mask & 0xffff_ffff) >>> 0);

function action({ table, verdict }: Rule): string {
  switch (verdict.do) {
    case "return":
    case "drop":
      return verdict.do;
    case "reset":
      return "reject with tcp reset";
    case "jump":
      return `jump ${chainName(table, verdict.chain)}`;
    case "redirect":
      return `counter redirect to :${verdict.port}`;
    case "tproxy":
      return `counter tproxy to :${verdict.port}`;
    case "saveMark":
      return `ct mark set ct mark & ${OTHER_BITS} | ${hex(TPROXY_MARK.value)}`;
    case "restoreMark":
      return `meta mark set meta mark & ${OTHER_BITS} | ${hex(TPROXY_MARK.value)}`;
    case "zone":
      return `ct zone set ${verdict.zone}`;
    case "refresh":
      return `update @lease_${verdict.lease} { ${LEASE_KEY} timeout ${LEASE_SECONDS}s }`;
  }
}
