import { VmmeshError } from "../core/errors.ts";
import type { Command, CommandResult, Host } from "../platform/host.ts";
import { type BackendEvidence, evidenceOf, nftRulesMatter, settleBackend } from "./backend.ts";
import { runInTurn } from "./inTurn.ts";
import { and, asksForClear, type Bits, clearAfter, isCertain, NO_BITS } from "./marks.ts";
import {
  diverts,
  KNOWN_DIVERTERS,
  ownerOfChain,
  type ParsedRule,
  type ParsedTable,
  parseNftChains,
  parseRules,
  parseSave,
  SSH_SERVERS,
  sshPortsOf,
} from "./parse.ts";
import type { Backend, BackendWish, MachineFacts } from "./plan/wish.ts";
import type { CapturePlan, FamilyPlan } from "./plan.ts";
import { refusal } from "./refusal.ts";
import { ownChains, type SeenJump, TABLES, tableRules } from "./render.ts";
import { type Family, HOOKS, isOurLine, type Table } from "./rules.ts";

type Runs = Pick<Host, "run">;
export type Reads = Pick<Host, "run" | "files">;

/** The result, or undefined if the program is not installed. */
export async function tryRun(host: Runs, command: Command): Promise<CommandResult | undefined> {
  try {
    return await host.run(command);
  } catch (thrown) {
    if (thrown instanceof VmmeshError && thrown.code === "COMMAND_MISSING") return undefined;
    throw thrown;
  }
}

/** Does the file of one family's registered legacy tables name this table? Asking legacy for any other one would create it. */
export async function legacyTables(host: Pick<Host, "files">, family: Family): Promise<string[]> {
  const text = await host.files.readText(`/proc/net/ip${family === 6 ? "6" : ""}_tables_names`);
  return (text ?? "").split("\n").filter((name) => name !== "");
}

type Found = Pick<BackendEvidence, "program" | "fault">;

const VERSION = ["--version"] as const;
/** One chain by name costs the same beside any number of rules; legacy would make the table that it is asked for. */
const ASKED: Readonly<Record<Backend, readonly string[]>> = {
  nft: ["-t", "nat", "-S", "OUTPUT"],
  legacy: VERSION,
};
/** The program of nearly every machine. */
const LIKELY_IP6 = "ip6tables-nft";

/** The programs of both backends, and what the plain `iptables` says of itself; undefined: there is none. */
async function findBackends(
  host: Runs,
): Promise<Record<Backend, Found> & { plainIs: Backend | undefined; likelyIp6: boolean }> {
  const [plain, nft, legacy, ip6] = await runInTurn(host, [
    ["iptables", ...VERSION],
    ["iptables-nft", ...ASKED.nft],
    ["iptables-legacy", ...ASKED.legacy],
    [LIKELY_IP6, ...VERSION],
  ]);
  const plainIs = plain?.code === 0 ? (plain.stdout.includes("nf_tables") ? "nft" : "legacy") : undefined;
  const find = async (backend: Backend, named: CommandResult | undefined): Promise<Found> =>
    foundIn(`iptables-${backend}`, named) ??
    // Debian names both; where only the plain `iptables` is there it stands for the one that it is.
    (plainIs === backend
      ? foundIn("iptables", await tryRun(host, { argv: ["iptables", ...ASKED[backend]] }))
      : undefined) ??
    {};
  return {
    nft: await find("nft", nft),
    legacy: await find("legacy", legacy),
    plainIs,
    likelyIp6: ip6?.code === 0,
  };
}

/** undefined: there is no such program; a link to one that is not there is none either. */
function foundIn(program: string, result: CommandResult | undefined): Found | undefined {
  if (result === undefined || result.code === 127) return undefined;
  // 4: no privilege, or no nf_tables; a chain that is not there, or that iptables cannot show, is none of that.
  return result.code === 4 ? { fault: result.stderr.trim().split("\n")[0] ?? "" } : { program };
}

async function backendEvidence(
  host: Reads,
  backend: Backend,
  { program, fault }: Found,
): Promise<BackendEvidence> {
  if (program === undefined) return { ...evidenceOf(undefined), ...(fault === undefined ? {} : { fault }) };
  if (backend === "legacy" && (await legacyTables(host, 4)).length === 0)
    return { ...evidenceOf([]), program };
  // Without -t, legacy's save prints the registered tables and registers none.
  const save = await tryRun(host, { argv: [`${program}-save`] });
  return { ...evidenceOf(parseSave(save?.stdout ?? "")), program };
}

/** What guard and fence need of the kernel. */
const NFT_PROBE = `table inet vmmesh-probe {
	chain refuse { type filter hook output priority 10; policy accept;
		ct original ip daddr 192.0.2.0/24 meta skuid 1 reject with tcp reset
	}
}
table ip vmmesh-probe {
	set lease { type mark; flags dynamic,timeout; timeout 3s; size 16; }
	chain guard { type nat hook output priority -120; policy accept;
		meta mark and 0 @lease fib daddr type local tcp dport 1 redirect to :1
	}
}
`;

/**
 * What decides how a wish becomes rules on this machine. Writes nothing, registers no legacy table.
 *
 * @throws {VmmeshError} RULES_PRIVILEGE without CAP_NET_ADMIN; RULES_REJECTED if the backend that was asked for cannot work here
 */
export async function readMachine(host: Reads, wished: BackendWish = "auto"): Promise<MachineFacts> {
  // The longest first: the kernel keeps the probe waiting, `ss` looks at every file of every process.
  // `--check` sends the tables to the kernel and commits nothing (nft(8)).
  const probed = tryRun(host, { argv: ["nft", "--check", "-f", "-"], input: NFT_PROBE });
  const ports = readSshPorts(host);
  const programs = findBackends(host);
  const [probe, sshPorts, { nft: nftFound, plainIs, likelyIp6 }, legacy, links] = await Promise.all([
    probed,
    ports,
    programs,
    programs.then((found) => backendEvidence(host, "legacy", found.legacy)),
    host.files.readText("/proc/net/dev"),
  ]);
  const refusal = [probe?.stderr, nftFound.fault].find((text) =>
    /not permitted|permission denied|must be root/i.test(text ?? ""),
  );
  if (refusal !== undefined) {
    throw new VmmeshError("RULES_PRIVILEGE", "the firewall cannot be read without CAP_NET_ADMIN", {
      cause: new Error(refusal.trim().split("\n")[0]),
      next: "Run the command as root, in the network namespace of the machine itself.",
    });
  }
  const nft =
    nftFound.program === undefined || (wished === "auto" && nftRulesMatter(legacy, plainIs))
      ? await backendEvidence(host, "nft", nftFound)
      : { ...evidenceOf([]), ...nftFound };
  const { backend, why } = settleBackend(wished, {
    nft,
    legacy,
    plainIs,
    nftables: probe?.code === 0,
    ...(probe === undefined || probe.code === 0 ? {} : { fault: probe.stderr.trim().split("\n")[0] ?? "" }),
  });
  const ip4 = backend === undefined ? undefined : (backend === "nft" ? nft : legacy).program;
  const ip6 = ip4?.replace("iptables", "ip6tables");
  const ip6Works =
    ip6 === LIKELY_IP6
      ? likelyIp6
      : ip6 !== undefined && (await tryRun(host, { argv: [ip6, ...VERSION] }))?.code === 0;
  return {
    backend,
    backendWhy: why,
    backendAsked: wished !== "auto",
    programs: { 4: ip4, 6: ip6Works ? ip6 : undefined },
    nft: probe?.code === 0,
    ipv6: ((await host.files.readText("/proc/net/if_inet6")) ?? "") !== "",
    sshPorts,
    ...(links === undefined ? {} : { interfaces: parseLinks(links) }),
  };
}

/** `  eth0: 1500 …`, after two lines of headings. @see proc_pid_net(5) */
function parseLinks(text: string): string[] {
  return [...text.matchAll(/^ *([^:|\s]+):/gm)].map(([, name = ""]) => name);
}

/**
 * The open files of every process with the name of an ssh server. `ss -p` looks at those of every process: on a machine with
 * many it takes longer than all else that is read.
 */
const SSHD_FILES = `set -- $(grep -slxE '${SSH_SERVERS.source}' /proc/[0-9]*/comm)
for comm; do
  shift
  set -- "$@" "\${comm%comm}fd"
done
[ $# -eq 0 ] || exec ls -l "$@" 2>/dev/null`;

/** Ports on which sshd really listens; 22 if nobody can say. */
export async function readSshPorts(host: Reads): Promise<number[]> {
  const [sockets, files, units] = await runInTurn(host, [
    ["ss", "-ltneH"],
    ["sh", "-c", SSHD_FILES],
    ["systemctl", "show", "-p", "Listen", "ssh.socket", "sshd.socket"],
  ]);
  const ports = sshPortsOf(sockets?.stdout ?? "", files?.stdout ?? "", units?.stdout ?? "");
  return ports.length > 0 ? ports : [22];
}

/** Our part of one table of one family, as printed. */
export interface SeenTable {
  readonly family: Family;
  readonly table: Table;
  /** Rules of our own chains, in order, as `iptables -S CHAIN` prints them. */
  readonly own: readonly string[];
  /** Jumps from the hooks to our chains. */
  readonly jumps: readonly SeenJump[];
  /** For each hook that should jump to us: the first rule before our jump that can divert a packet. */
  readonly ahead: readonly Ahead[];
  /** Rules before our jumps that can keep no packet from us. */
  readonly benign: readonly string[];
  /** Rules before our jumps that untrack or choose a conntrack zone (table raw: the first one wins). */
  readonly untracking: readonly string[];
  /** Hooks that should have a jump and have none. */
  readonly missing: readonly string[];
}

export interface Ahead {
  readonly hook: string;
  readonly line: string;
  /** Name of the program whose chain it is. */
  readonly by: string | undefined;
  readonly position: number;
}

/**
 * A start of a program costs Node more than the program itself: one shell asks for a table's chains. It ends at the first
 * that could not be looked at, for a lock that is held is waited for once.
 */
const READ_CHAINS = String.raw`program=$1 wait=$2 table=$3
shift 3
for chain; do
  $program $wait -t $table -S "$chain"
  code=$?
  printf '\0%s\0' $code
  [ $code -le 2 ] || exit 0
done`;

/**
 * `-S CHAIN` of each, in their order; empty for one that is not there, or (legacy) in a table that is not there. By name:
 * its cost does not grow with the chains of others.
 *
 * @throws {VmmeshError} RULES_REJECTED, RULES_PRIVILEGE
 */
async function readChains(
  host: Reads,
  plan: Pick<CapturePlan, "backend" | "programs">,
  family: Family,
  table: Table,
  chains: readonly string[],
): Promise<ParsedRule[][]> {
  const program = plan.programs[family];
  if (program === undefined) return [];
  if (plan.backend === "legacy" && !(await legacyTables(host, family)).includes(table)) return [];
  const wait = plan.backend === "legacy" ? "-w 5" : "";
  const result = await host.run({
    argv: ["sh", "-c", READ_CHAINS, "read-chains", program, wait, table, ...chains],
  });
  // No rule can hold a NUL, whatever its comment says.
  const answers = result.stdout.split("\0");
  const rules: ParsedRule[][] = [];
  for (const [at, chain] of chains.entries()) {
    const code = result.code === 0 ? Number(answers[2 * at + 1]) : result.code;
    // 1 and 2 are its words for "no such chain"; beyond them it could not look.
    if (code > 2) throw await refusal(host, { ...result, code }, `${program} -t ${table} -S ${chain}`);
    rules.push(code === 0 ? parseRules(answers[2 * at] ?? "") : []);
  }
  return rules;
}

/** The chains of every table, by the table as nft names it (`ip nat`). */
export type NftChains = ReadonlyMap<string, ReadonlySet<string>>;

/**
 * Every table and its chains, without a rule (65 ms beside 16,000 chains of kube-proxy's; `nft list tables` of 1.0.6 reads the
 * rules, too). undefined: nobody can say.
 */
export async function listNftChains(host: Runs): Promise<NftChains | undefined> {
  const result = await tryRun(host, { argv: ["nft", "list", "chains"] });
  return result?.code === 0 ? parseNftChains(result.stdout) : undefined;
}

/** Had the nft backend of iptables nothing in this family? */
export function isNew(
  { backend }: Pick<CapturePlan, "backend">,
  before: NftChains | undefined,
  family: Family,
): boolean {
  return (
    backend === "nft" &&
    before !== undefined &&
    ["raw", "mangle", "nat", "filter", "security"].every((table) => !before.has(nftName(family, table)))
  );
}

/** A table of iptables as nft names it. */
export function nftName(family: Family, table: string): string {
  return `${family === 4 ? "ip" : "ip6"} ${table}`;
}

/** The tables of iptables that a plan writes. */
export function writtenTables(plan: CapturePlan): { readonly of: FamilyPlan; readonly table: Table }[] {
  if (plan.backend === undefined) return [];
  return plan.families
    .filter(({ family }) => plan.programs[family] !== undefined)
    .flatMap((of) =>
      TABLES.filter((table) => tableRules(of, table).length > 0).map((table) => ({ of, table })),
    );
}

/**
 * What of the plan is in the kernel's iptables now. A few milliseconds a chain, whatever other rules there are.
 *
 * @param before what was there before us; undefined: not known
 * @param now of families that were new to iptables: are they still, or do they hold our rules and next to no others
 */
export async function readTables(
  host: Reads,
  plan: CapturePlan,
  before?: NftChains,
  now: "nothing" | "ours" = "ours",
): Promise<SeenTable[]> {
  const written = writtenTables(plan);
  const fresh = [...new Set(written.map(({ of }) => of.family))].filter((family) =>
    isNew(plan, before, family),
  );
  const saved = now === "nothing" ? new Map<Family, ParsedTable[]>() : await readWhole(host, plan, fresh);
  return Promise.all(
    written.map(({ of, table }) =>
      readTable(
        host,
        plan,
        of,
        table,
        fresh.includes(of.family) ? { rules: rulesOf(saved.get(of.family) ?? [], table) } : {},
      ),
    ),
  );
}

function rulesOf(saved: readonly ParsedTable[], table: Table): readonly ParsedRule[] {
  return saved.find(({ name }) => name === table)?.rules ?? [];
}

/** All tables of some families: a program for each, whose cost grows with the rules of others. */
async function readWhole(
  host: Reads,
  plan: Pick<CapturePlan, "programs">,
  families: readonly Family[],
): Promise<Map<Family, ParsedTable[]>> {
  if (families.length === 0) return new Map();
  const argvs = families.map((family) => [`${plan.programs[family]}-save`]);
  const results = await runInTurn(host, argvs);
  const failed = results.findIndex(({ code }) => code !== 0);
  const result = results[failed];
  if (result !== undefined) throw await refusal(host, result, argvs[failed]?.join(" ") ?? "");
  return new Map(families.map((family, at) => [family, parseSave(results[at]?.stdout ?? "")]));
}

/**
 * One table of one family.
 * @param known what is in our own chains, or in the whole table, if that is known already
 */
export async function readTable(
  host: Reads,
  plan: CapturePlan,
  wanted: FamilyPlan,
  table: Table,
  known: { readonly own?: readonly string[]; readonly rules?: readonly ParsedRule[] } = {},
): Promise<SeenTable> {
  const { family } = wanted;
  const chains = ownChains(wanted, table);
  const asked = [...HOOKS, ...(known.own === undefined ? chains : [])];
  const found =
    known.rules === undefined
      ? await readChains(host, plan, family, table, asked)
      : asked.map((chain) => known.rules?.filter((rule) => rule.chain === chain) ?? []);
  const hookRules = found.slice(0, HOOKS.length);
  const own =
    known.own ??
    found
      .slice(HOOKS.length)
      .flat()
      .map(({ line }) => line);
  const jumps: SeenJump[] = [];
  const ahead: Ahead[] = [];
  const benign: string[] = [];
  const untracking: string[] = [];
  const missing: string[] = [];
  for (const [at, hook] of HOOKS.entries()) {
    const rules = hookRules[at] ?? [];
    const ours = rules.filter((rule) => rule.target !== undefined && chains.includes(rule.target));
    jumps.push(...ours.map((rule) => ({ table, line: rule.line })));
    if (!tableRules(wanted, table).some((rule) => rule.chain === hook)) continue;
    const first = rules.findIndex((rule) => ours.includes(rule));
    if (first < 0) missing.push(hook);
    let clear = NO_BITS;
    for (const [index, rule] of rules.slice(0, Math.max(first, 0)).entries()) {
      if (rule.target === "CT" || rule.target === "NOTRACK") untracking.push(rule.line);
      const end = await walkAhead(host, plan, family, table, rule, clear, 0);
      const { by } = end;
      clear = end.clear;
      if (by === undefined) {
        benign.push(rule.line);
        continue;
      }
      ahead.push({ hook, line: rule.line, by: by === "" ? undefined : by, position: index + 1 });
      break;
    }
  }
  return { family, table, own, jumps, ahead, benign, untracking, missing };
}

const MAX_DEPTH = 5;

/** What it fits meets no more rules of this chain; in a hook itself there is no other chain to come back to. */
const leavesChain = (rule: ParsedRule): boolean => rule.target === "RETURN" || rule.words.includes("-g");

interface Passed {
  /** undefined: the rule keeps no packet from us; else the program whose chain it is, empty if unknown. */
  readonly by: string | undefined;
  /** Bits of the mark that are certainly 0 in a packet that has come past it. */
  readonly clear: Bits;
}

async function walkAhead(
  host: Reads,
  plan: CapturePlan,
  family: Family,
  table: Table,
  rule: ParsedRule,
  clear: Bits,
  depth: number,
): Promise<Passed> {
  const kind = depth === 0 && leavesChain(rule) ? "yes" : diverts(rule);
  if (kind === "no") return { by: undefined, clear: clearAfter(rule, clear) };
  if (asksForClear(rule, clear)) return { by: undefined, clear };
  const chain = rule.target ?? "";
  // Ours end nothing there: what is dropped ahead of them would be dropped behind them.
  if (table === "raw" && chain === "DROP") return { by: undefined, clear };
  if (kind === "yes" || depth >= MAX_DEPTH || KNOWN_DIVERTERS.has(chain))
    return { by: ownerOfChain(chain) ?? ownerOfChain(rule.chain) ?? "", clear };
  const [rules = []] = await readChains(host, plan, family, table, [chain]);
  let inside = clear;
  // Who goes around the chain, or leaves it before its end, meets no more of its rules.
  let leaves: Bits | undefined = isCertain(rule) ? undefined : clear;
  for (const inner of rules) {
    const passed = await walkAhead(host, plan, family, table, inner, inside, depth + 1);
    if (passed.by !== undefined) return { by: passed.by || (ownerOfChain(chain) ?? ""), clear };
    if (leavesChain(inner)) leaves = and(leaves ?? inside, and(inside, passed.clear));
    inside = passed.clear;
  }
  return { by: undefined, clear: leaves === undefined ? inside : and(leaves, inside) };
}

/**
 * Rules in chains of our names that do not carry our comment: somebody else's istio-iptables.
 *
 * @param recorded of a generation of ours, as printed: ours without a comment
 */
export function foreignIstio(
  seen: readonly SeenTable[],
  recorded: ReadonlySet<string> = new Set(),
): string[] {
  return seen.flatMap((table) =>
    table.own
      .filter((line) => !isOurLine(line) && !recorded.has(line))
      .map((line) => `${table.table} (IPv${table.family}): ${line}`),
  );
}

/** A table of ours as nft prints it, without counters and set elements; undefined if it is not there. */
export async function listNftTable(host: Runs, table: string): Promise<string | undefined> {
  return (await listNftTables(host, [table]))[table];
}

/** The same of several. */
export async function listNftTables(
  host: Runs,
  names: readonly string[],
): Promise<Readonly<Record<string, string | undefined>>> {
  if (names.length === 0) return {};
  const results = await runInTurn(
    host,
    names.map((name) => ["nft", "-s", "-t", "list", "table", ...words(name)]),
  );
  return Object.fromEntries(
    names.map((name, at) => [name, results[at]?.code === 0 ? results[at].stdout : undefined]),
  );
}

function words(table: string): string[] {
  return table.split(" ");
}
