import type { Base, Chain, Step, TraceRule } from "../../agent/iptables/trace/model.ts";
import type { Trace } from "../../agent/iptables/trace/trace.ts";

/** What a firewall may use, by the words in which its programs print it. */
const FEATURES: Readonly<Record<string, RegExp>> = {
  TPROXY: /-j TPROXY|\btproxy (ip6? )?to/,
  "a socket match": /-m socket|\bsocket (transparent|wildcard)/,
  "a cgroup match": /-m cgroup|\bsocket cgroupv2/,
  "an ipset": /--match-set/,
  "a set with intervals": /@(nets|ports)/,
  "a set of concatenations": /\. tcp dport (!= )?(@|\{)/,
  "a verdict map": /\bvmap\b/,
  "a conntrack zone": /CT --zone|\bct zone set/,
  NOTRACK: /--notrack|\bnotrack\b/,
  "the mark of a connection": /CONNMARK|-m connmark|\bct mark/,
  "a range of ports (multiport)": /-m multiport/,
  "a negated match": / ! | != /,
  "the original destination": /--ctorigdst|\bct original/,
  "a user": /--uid-owner|\bskuid/,
  "a type of ICMP": /--icmp-type 8|--icmpv6-type 128|type echo-request/,
  "a return from a chain": /-j RETURN|\breturn$/,
  DNAT: /-j DNAT|\bdnat\b/,
  REDIRECT: /-j REDIRECT|\bredirect\b/,
  "a change of the source": /-j (SNAT|MASQUERADE)|\b(snat|masquerade)\b/,
  REJECT: /-j REJECT|\breject\b/,
  chance: /-m statistic|\bnumgen\b/,
  "a limit": /-m limit|\blimit rate/,
};

export const CLOSED = "a chain with policy drop";
export const EQUAL_NAT = "a nat chain with the priority of another one";
export const EQUAL_FILTER = "a filter chain with the priority of another one of its table";
export const KINDS: readonly string[] = [...Object.keys(FEATURES), CLOSED, EQUAL_NAT, EQUAL_FILTER];

/** The same rules, which tell what a packet met that a rule was true of. */
export function watched(trace: Trace, met: (feature: string) => void): Trace {
  const chains = new Map<Chain, Chain>();
  const { bases } = trace.rules;
  const equal = (base: Base): Base[] =>
    bases.filter(
      ({ hook, type, priority }) => hook === base.hook && type === base.type && priority === base.priority,
    );
  const watchedChain = (chain: Chain): Chain => {
    const known = chains.get(chain);
    if (known !== undefined) return known;
    const base = bases.find((each) => each.chain === chain);
    const peers =
      base === undefined ? [] : equal(base).filter((each) => each !== base && each.chain.rules.length > 0);
    const more = [
      ...(base?.type === "nat" && peers.length > 0 ? [EQUAL_NAT] : []),
      ...(peers.some((each) => each.chain.table === chain.table) ? [EQUAL_FILTER] : []),
    ];
    const made = { ...chain, rules: chain.rules.map((rule) => watchedRule(rule, more, met)) };
    chains.set(chain, made);
    return made;
  };
  return {
    ...trace,
    rules: {
      bases: bases.map((base) => ({ ...base, chain: watchedChain(base.chain) })),
      chains: new Map([...trace.rules.chains].map(([key, chain]) => [key, watchedChain(chain)])),
    },
  };
}

function watchedRule(rule: TraceRule, more: readonly string[], met: (feature: string) => void): TraceRule {
  const features = [
    ...Object.entries(FEATURES)
      .filter(([, words]) => words.test(rule.text))
      .map(([name]) => name),
    ...more,
  ];
  const last = rule.steps.at(-1);
  if (features.length === 0 || last === undefined) return rule;
  const telling: Step = (packet, world) => {
    const turns = last(packet, world);
    if (turns.some(({ does }) => does !== "miss")) for (const feature of features) met(feature);
    return turns;
  };
  return { ...rule, steps: [...rule.steps.slice(0, -1), telling] };
}
