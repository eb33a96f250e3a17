import { type ParsedRule, type ParsedTable, parseSave } from "../parse.ts";
import type { Backend } from "../plan/wish.ts";
import { legacyTables, type Reads, tryRun } from "../read.ts";
import { refused } from "../refusal.ts";
import type { Family } from "../rules.ts";
import {
  type Base,
  type Chain,
  chainKey,
  type HookName,
  opaque,
  type Ruleset,
  type Step,
  type TraceRule,
  test,
} from "./model.ts";
import { bag, compileExpressions, type Json, type Sets } from "./nftRule.ts";
import { compileRule } from "./xtables.ts";

/** What nft prints of its tables. */
export interface NativeListing {
  /** `nft -j list ruleset` and `nft -a list ruleset`: the first has the meaning, the second the words. */
  readonly nftJson: string;
  readonly nftText: string;
  /** `nft --debug=netlink list table` of those with a rule that `hidesFamily`: the kernel's own instructions. */
  readonly nftNetlink: string;
}

/** What the machine's programs print of its rules, for one address family. Empty: there is none of it. */
export interface Listing extends NativeListing {
  /** `iptables-nft-save` or `ip6tables-nft-save`. */
  readonly nftSave: string;
  readonly legacySave: string;
}

/** @throws {VmmeshError} RULES_PRIVILEGE */
export async function readListing(host: Reads, family: Family): Promise<Listing> {
  const six = family === 6 ? "6" : "";
  const print = async (...argv: [string, ...string[]]): Promise<string> => {
    const result = await tryRun(host, { argv });
    if (result !== undefined && result.code !== 0 && /permitted|denied|root/i.test(result.stderr))
      throw refused(result, argv.join(" "));
    return result?.code === 0 ? result.stdout : "";
  };
  const legacy = (await legacyTables(host, family)).length > 0;
  const [nftSave, legacySave, nftJson, nftText] = await Promise.all([
    print(`ip${six}tables-nft-save`),
    // Asked only if the kernel has such tables: the question alone would make them.
    legacy ? print(`ip${six}tables-legacy-save`) : "",
    print("nft", "-j", "list", "ruleset"),
    print("nft", "-a", "list", "ruleset"),
  ]);
  return {
    nftSave,
    legacySave,
    nftJson,
    nftText,
    nftNetlink: (
      await Promise.all(
        hidingTables(nftText).map((at) => print("nft", "--debug=netlink", "list", "table", ...at.split(" "))),
      )
    ).join(""),
  };
}

export const hidingTables = (nftText: string): string[] =>
  [...nftText.matchAll(/^table ((?:inet|netdev) \S+) \{([\s\S]*?)^\}/gm)].flatMap(([, at = "", body = ""]) =>
    hidesFamily(body) ? [at] : [],
  );

/**
 * In a table of both families nft prints a refusal by TCP reset, and a match of a TCP option, without the `meta nfproto ipv6`
 * that stands before it. Measured with nft 1.0.6: of 27,052 rules, printed and loaded again, no others lost their family.
 */
const hidesFamily = (text: string): boolean => /\b(reject with tcp reset|tcp option)\b/.test(text);

/** Where iptables' tables hang. @see netfilter_ipv4.h, ip_tables' own table modules */
const TABLES: Readonly<Record<string, { readonly type: string; readonly priority: number }>> = {
  raw: { type: "filter", priority: -300 },
  mangle: { type: "filter", priority: -150 },
  nat: { type: "nat", priority: -100 },
  filter: { type: "filter", priority: 0 },
  security: { type: "filter", priority: 50 },
};

/** Everything in force for one family, foreign rules included. Pure. */
export function buildRuleset(listing: Listing, family: Family): Ruleset {
  const saved = parseSave(listing.nftSave);
  const native = readNative(listing, family);
  const alone = saved.filter(
    ({ name }) => !native.some((table) => table.name === name && table.family !== "inet"),
  );
  return joined([
    ...native.map((table) => nativeParts(table, saved)),
    // Without nft its own tables are known only as iptables prints them.
    ...alone.map((table) => iptablesParts("nft", table)),
    ...parseSave(listing.legacySave).map((table) => iptablesParts("legacy", table)),
  ]);
}

/** One table's. */
export interface Parts {
  readonly bases: readonly Base[];
  readonly chains: readonly Chain[];
}

export function joined(parts: readonly Parts[]): Ruleset {
  return {
    bases: parts.flatMap(({ bases }) => bases),
    chains: new Map(
      parts.flatMap(({ chains }) => chains.map((chain) => [chainKey(chain.table, chain.name), chain])),
    ),
  };
}

/** @param saved what `iptables-nft-save` says of its own tables, which nft lists as well */
export function nativeParts(table: NativeTable, saved: readonly ParsedTable[] = []): Parts {
  const save = table.family === "inet" ? undefined : saved.find(({ name }) => name === table.name);
  const label = save === undefined ? `nft ${table.family} ${table.name}` : `iptables-nft ${table.name}`;
  const lines = Map.groupBy(save?.rules ?? [], ({ chain }) => chain);
  const chains = table.chains.map(({ name, base, rules }) => ({
    base,
    chain: { table: label, name, rules: mergeRules(rules, lines.get(name) ?? [], table.sets, save) },
  }));
  return {
    chains: chains.map(({ chain }) => chain),
    bases: chains.flatMap(({ base, chain }) => (base === undefined ? [] : [{ ...base, chain }])),
  };
}

/** @param only the built-in chain that is asked for, with all that it can come to; default: all */
export function iptablesParts(backend: Backend, table: ParsedTable, only?: string): Parts {
  const lines = Map.groupBy(table.rules, ({ chain }) => chain);
  const names = new Set(table.chains.keys());
  const wanted = only === undefined ? [...names] : reached(only, lines, names);
  const chains = wanted.map(
    (name): Chain => ({
      table: `iptables-${backend} ${table.name}`,
      name,
      rules: (lines.get(name) ?? []).map((rule) => fromLine(rule, names)),
    }),
  );
  return {
    chains,
    bases: chains.flatMap((chain): Base[] => {
      const policy = table.chains.get(chain.name);
      const hook = HOOKS[chain.name];
      const place = TABLES[table.name];
      if (hook === undefined || policy === "-" || place === undefined) return [];
      const late = place.type === "nat" && (hook === "input" || hook === "postrouting");
      return [
        {
          chain,
          hook,
          type: table.name === "mangle" && hook === "output" ? "route" : place.type,
          priority: late ? 100 : place.priority,
          policy: policy === "DROP" ? "drop" : "accept",
          device: undefined,
        },
      ];
    }),
  };
}

/** A chain and those that it jumps to, and so on. */
function reached(
  first: string,
  lines: ReadonlyMap<string, readonly ParsedRule[]>,
  names: ReadonlySet<string>,
): string[] {
  const found = new Set(names.has(first) ? [first] : []);
  for (const name of found) {
    for (const { target } of lines.get(name) ?? [])
      if (target !== undefined && names.has(target)) found.add(target);
  }
  return [...found];
}

const HOOKS: Readonly<Record<string, HookName>> = {
  PREROUTING: "prerouting",
  INPUT: "input",
  FORWARD: "forward",
  OUTPUT: "output",
  POSTROUTING: "postrouting",
};

function fromLine(rule: ParsedRule, chains: ReadonlySet<string>): TraceRule {
  return { text: rule.line, comment: rule.comment, steps: compileRule(rule, chains) };
}

/**
 * iptables' own words are right where nft sees only "xt", nft's are where somebody put a native rule into iptables' table
 * (iptables misprints those). Both print every rule of a chain, in order.
 */
function mergeRules(
  rules: readonly NativeRule[],
  lines: readonly ParsedRule[],
  sets: Sets,
  save: ParsedTable | undefined,
): TraceRule[] {
  const chains = new Set(save?.chains.keys());
  const paired = lines.length === rules.length;
  return rules.map(({ hidden, expressions, text, comment }, index) => {
    const line = paired ? lines[index] : undefined;
    const foreign = expressions.some((each) => "xt" in bag(each));
    if (line !== undefined && foreign) return fromLine(line, chains);
    return {
      text: line?.line ?? text,
      comment: comment ?? line?.comment,
      steps: [...hidden, ...compileExpressions(expressions, sets)],
    };
  });
}

interface NativeRule {
  /** What its program does not print of it. */
  readonly hidden: readonly Step[];
  readonly expressions: readonly Json[];
  readonly text: string;
  readonly comment: string | undefined;
}
export interface NativeTable {
  readonly family: string;
  readonly name: string;
  readonly sets: Sets;
  readonly chains: readonly {
    readonly name: string;
    readonly base: Omit<Base, "chain"> | undefined;
    readonly rules: readonly NativeRule[];
  }[];
}

const HOOK_NAMES: ReadonlySet<string> = new Set([
  "ingress",
  "prerouting",
  "input",
  "forward",
  "output",
  "postrouting",
  "egress",
]);

/** @see libnftables-json(5) */
export function readNative({ nftJson, nftText, nftNetlink }: NativeListing, family: Family): NativeTable[] {
  const at = nftJson.indexOf("{");
  if (at < 0) return [];
  const objects = listOf(bag(JSON.parse(nftJson.slice(at)))["nftables"]);
  const words = wordsByHandle(nftText);
  const families = familyByHandle(nftNetlink);
  const wanted = new Set(["inet", "netdev", family === 4 ? "ip" : "ip6"]);
  const of = (kind: string): Record<string, Json>[] =>
    objects.flatMap((object) => {
      const found = bag(object)[kind];
      return found !== undefined && wanted.has(String(bag(found)["family"])) ? [{ ...bag(found) }] : [];
    });
  const [sets, maps, chains, rules] = [of("set"), of("map"), of("chain"), of("rule")];
  const ofTable = (things: Record<string, Json>[], table: Record<string, Json>) =>
    things.filter(({ family: its, table: name }) => its === table["family"] && name === table["name"]);
  return of("table")
    .filter(({ flags }) => !(Array.isArray(flags) && flags.includes("dormant")))
    .map((table): NativeTable => {
      const byChain = Map.groupBy(ofTable(rules, table), ({ chain }) => String(chain));
      return {
        family: String(table["family"]),
        name: String(table["name"]),
        sets: new Map(
          [...ofTable(sets, table), ...ofTable(maps, table)].map(({ name, elem }) => [
            String(name),
            listOf(elem).map((each): [Json, Json] =>
              Array.isArray(each) ? [each[0], each[1]] : [each, undefined],
            ),
          ]),
        ),
        chains: ofTable(chains, table).map((chain) => ({
          name: String(chain["name"]),
          base: baseOf(chain),
          rules: (byChain.get(String(chain["name"])) ?? []).map(({ expr, handle, comment }) => {
            const at = [table["family"], table["name"], chain["name"], handle].map(String).join(" ");
            const text = words.get(at) ?? `rule with handle ${String(handle)}`;
            const hidden = /^(inet|netdev) /.test(at) && hidesFamily(text);
            return {
              hidden: hidden ? hiddenFamily(families.get(at)) : [],
              expressions: listOf(expr),
              text,
              comment: typeof comment === "string" ? comment : undefined,
            };
          }),
        })),
      };
    });
}

/** Left out where it is empty. */
const listOf = (value: Json): readonly Json[] => (Array.isArray(value) ? value : []);

function baseOf(chain: Record<string, Json>): Omit<Base, "chain"> | undefined {
  const { hook, type, prio, policy, dev } = chain;
  if (typeof hook !== "string" || !HOOK_NAMES.has(hook)) return undefined;
  return {
    hook: hook as HookName,
    type: String(type),
    priority: Number(prio),
    policy: policy === "drop" ? "drop" : "accept",
    device: typeof dev === "string" ? dev : undefined,
  };
}

/** The match that nft does not print. @param family undefined: nobody can say */
function hiddenFamily(family: Family | "both" | undefined): Step[] {
  if (family === "both") return [];
  return [
    family === undefined ? opaque("for which family it is") : test((packet) => packet.family === family),
  ];
}

/** NFPROTO_* and ETH_P_*, as libnftnl prints what the kernel compares. */
const FAMILIES: Readonly<Record<string, Family>> = {
  "nfproto 0x00000002": 4,
  "nfproto 0x0000000a": 6,
  "protocol 0x00000008": 4,
  "protocol 0x0000dd86": 6,
};

/** The family that each rule's instructions ask for first, by table, chain and handle. */
function familyByHandle(text: string): Map<string, Family | "both" | undefined> {
  const found = new Map<string, Family | "both" | undefined>();
  for (const [, at = "", instructions = ""] of text.matchAll(
    /^(\w+ \S+ \S+ \d+)(?: \d+)?[^\n]*\n((?: +\[.*\n)+)/gm,
  )) {
    const [, key, , value] =
      /\[ meta load (nfproto|protocol) => (reg \d+) \]\s+\[ cmp eq \2 (0x\w+) \]/.exec(instructions) ?? [];
    found.set(at, key === undefined ? "both" : FAMILIES[`${key} ${value}`]);
  }
  return found;
}

/** Every rule in nft's own words, by table, chain and handle. */
function wordsByHandle(text: string): Map<string, string> {
  const found = new Map<string, string>();
  let table = "";
  let chain = "";
  for (const line of text.split("\n")) {
    const opened = /^\s*(table|chain) (.+) \{/.exec(line);
    if (opened?.[1] === "table") table = opened[2] ?? "";
    else if (opened?.[1] === "chain") chain = opened[2] ?? "";
    else {
      const rule = /^\s*(.+) # handle (\d+)$/.exec(line);
      if (rule !== null)
        found.set(
          `${table} ${chain} ${rule[2]}`,
          (rule[1] ?? "").replace(/counter packets \d+ bytes \d+/, "counter"),
        );
    }
  }
  return found;
}
