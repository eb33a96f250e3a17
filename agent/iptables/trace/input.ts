import { VmmeshError } from "../../core/errors.ts";
import type { CommandResult } from "../../platform/host.ts";
import type { BaseChain, ParsedTable } from "../parse.ts";
import type { Backend } from "../plan/wish.ts";
import { type Reads, tryRun } from "../read.ts";
import type { Family } from "../rules.ts";
import { type IpSets, readIpSets } from "./ipset.ts";
import { opaque, type Ruleset, verdict } from "./model.ts";
import {
  hidingTables,
  iptablesParts,
  joined,
  type NativeListing,
  nativeParts,
  type Parts,
  readNative,
} from "./ruleset.ts";

/** An nft table that judges what comes in; without a listing nobody could read it. */
export interface InputTable {
  /** As nft names it: `inet firewalld`. */
  readonly table: string;
  readonly listing: NativeListing | undefined;
}

/** What iptables-nft calls its own, and prints unless somebody else has written into it. */
const OF_IPTABLES = /^ip6? (raw|mangle|filter|security)$/;
const OURS = /^(inet|ip6?) vmmesh/;
/** Refuses only the ports of its own services that have no endpoint; listing its maps takes seconds (20,000 services). */
const KUBE_PROXY = /^ip6? kube-proxy$/;
const PATIENCE_MS = 2000;

/**
 * The tables that nft shows with a chain in INPUT and iptables does not print. None of them: nothing is asked.
 *
 * @param bases of `nft list chains`
 */
async function readInputTables(
  host: Reads,
  bases: readonly BaseChain[],
  saves: Promise<readonly Saved[]>,
): Promise<InputTable[]> {
  const theirs = bases
    .filter(({ hook, type, table }) => hook === "input" && type === "filter" && /^(inet|ip6?) /.test(table))
    .filter(({ table }) => !OURS.test(table) && !KUBE_PROXY.test(table));
  const [shared, foreign] = [true, false].map((shares) =>
    theirs.filter(({ table }) => OF_IPTABLES.test(table) === shares),
  );
  const read = (from: readonly BaseChain[] = []): Promise<InputTable[]> =>
    Promise.all(
      [...new Set(from.map(({ table }) => table))].map(async (table) => ({
        table,
        listing: await list(host, table),
      })),
    );
  const [one, two] = await Promise.all([
    read(foreign),
    saves.then((known) => read(shared?.filter((base) => !isPrinted(known, base)))),
  ]);
  return [...one, ...two];
}

/** iptables-nft 1.8.9 leaves out a table with rules of nft, and another's base chains, and exits with 0. */
function isPrinted(saves: readonly Saved[], { table, chain }: BaseChain): boolean {
  const policy = saves
    .find(({ backend, family }) => backend === "nft" && table.startsWith(`${nftFamily(family)} `))
    ?.tables.find(({ name }) => table.endsWith(` ${name}`))
    ?.chains.get(chain);
  return policy !== undefined && policy !== "-";
}

const nftFamily = (family: Family): string => (family === 4 ? "ip" : "ip6");

async function list(host: Reads, table: string): Promise<NativeListing | undefined> {
  const print = async (...options: string[]): Promise<string | undefined> => {
    const argv = ["nft", ...options, "list", "table", ...table.split(" ")] as const;
    const result: CommandResult | undefined = await tryRun(host, { argv, timeoutMs: PATIENCE_MS }).catch(
      (thrown: unknown) => {
        if (thrown instanceof VmmeshError && thrown.code === "COMMAND_FAILED") return undefined;
        throw thrown;
      },
    );
    return result?.code === 0 ? result.stdout : undefined;
  };
  const [nftJson, nftText] = await Promise.all([print("-j"), print("-a")]);
  if (nftJson === undefined || nftText === undefined) return undefined;
  const nftNetlink = hidingTables(nftText).length === 0 ? "" : await print("--debug=netlink");
  return nftNetlink === undefined ? undefined : { nftJson, nftText, nftNetlink };
}

interface Saved {
  readonly backend: Backend;
  readonly family: Family;
  readonly tables: readonly ParsedTable[];
}

/** All that other programs have in INPUT, and the sets that it asks. */
export interface InputRules {
  readonly rules: Readonly<Record<Family, Ruleset>>;
  readonly ipSets: IpSets;
}

/** A machine on which nobody judges what comes in. */
export const NO_INPUT: InputRules = { rules: { 4: joined([]), 6: joined([]) }, ipSets: new Map() };

/** What is there of iptables in every backend and family, and the base chains of nft, are read by who asks. */
export async function readInput(
  host: Reads,
  saves: Promise<readonly Saved[]>,
  bases: Promise<readonly BaseChain[]>,
): Promise<InputRules> {
  const [saved, natives, ipSets] = await Promise.all([
    saves,
    bases.then((known) => readInputTables(host, known, saves)),
    saves.then((known) => (asksSets(known) ? readIpSets(host) : new Map())),
  ]);
  return {
    rules: { 4: inputRuleset(saved, natives, 4), 6: inputRuleset(saved, natives, 6) },
    ipSets,
  };
}

const asksSets = (saves: readonly Saved[]): boolean =>
  saves.some(({ tables }) =>
    tables.some(
      ({ name, rules }) => name !== "nat" && rules.some(({ words }) => words.includes("--match-set")),
    ),
  );

/** One family's part of it; nat has no say in INPUT. Pure. */
export function inputRuleset(
  saves: readonly Saved[],
  natives: readonly InputTable[],
  family: Family,
): Ruleset {
  const at = nftFamily(family);
  const own = saves.filter((save) => save.family === family);
  const printed = own.find(({ backend }) => backend === "nft")?.tables ?? [];
  const isListed = (name: string): boolean => natives.some(({ table }) => table === `${at} ${name}`);
  return joined([
    ...own.flatMap(({ backend, tables }) =>
      tables
        .filter(({ name }) => name !== "nat" && !(backend === "nft" && isListed(name)))
        .map((table) => iptablesParts(backend, table, "INPUT")),
    ),
    ...natives
      .filter(({ table }) => table.startsWith("inet ") || table.startsWith(`${at} `))
      .flatMap(({ table, listing }) =>
        listing === undefined
          ? [unread(table)]
          : readNative(listing, family).map((native) => onlyInput(nativeParts(native, printed))),
      ),
  ]);
}

const onlyInput = ({ bases, chains }: Parts): Parts => ({
  chains,
  bases: bases.filter(({ hook }) => hook === "input"),
});

function unread(table: string): Parts {
  const steps = [opaque("what it does: nft did not list it in time"), verdict({ do: "drop" })];
  const rules = [{ text: `table ${table}`, comment: undefined, steps }];
  const chain = { table: `nft ${table}`, name: "input", rules };
  return {
    chains: [chain],
    bases: [{ chain, hook: "input", type: "filter", priority: 0, policy: "accept", device: undefined }],
  };
}
