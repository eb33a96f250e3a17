import type { Host } from "../platform/host.ts";
import { type ParsedTable, parseSave } from "./parse.ts";
import type { Backend } from "./plan/wish.ts";
import { legacyTables, tryRun } from "./read.ts";
import { CHAIN, COMMENT_PREFIX, type Family, type Table } from "./rules.ts";
import type { Chains } from "./undo.ts";

/** Rules of ours in one backend of iptables. */
export interface Ours {
  readonly backend: Backend;
  readonly programs: Readonly<Record<Family, string>>;
  readonly chains: readonly Chains[];
  /** The rules, with program and table, for a person. */
  readonly lines: readonly string[];
}

const OUR_CHAINS: ReadonlySet<string> = new Set(Object.values(CHAIN));
const isOurTable = (name: string): name is Table => name === "raw" || name === "mangle" || name === "nat";

/**
 * Rules of ours in every backend but this one. A machine has them after a change of backend that was interrupted, or when
 * the record of what was applied is lost. Chains of our names with rules that do not carry our comment are somebody else's.
 *
 * @param but undefined: in every backend
 */
export async function findOurs(host: Pick<Host, "run" | "files">, but: Backend | undefined): Promise<Ours[]> {
  const backends = (["nft", "legacy"] as const).filter((backend) => backend !== but);
  const found = await Promise.all(
    backends.map(async (backend) => {
      const programs = { 4: `iptables-${backend}`, 6: `ip6tables-${backend}` } as const;
      const families = await Promise.all(
        ([4, 6] as const).map(async (family) => {
          if (backend === "legacy" && (await legacyTables(host, family)).length === 0) return [];
          const save = await tryRun(host, { argv: [`${programs[family]}-save`] });
          return save?.code === 0 ? oursIn(parseSave(save.stdout), family) : [];
        }),
      );
      const ours = families.flat();
      return {
        backend,
        programs,
        chains: ours,
        lines: ours.flatMap(({ family, table, lines }) =>
          lines.map((line) => `${programs[family]} ${table}: ${line}`),
        ),
      };
    }),
  );
  return found.filter(({ chains }) => chains.length > 0);
}

/** Pure. */
export function oursIn(
  tables: readonly ParsedTable[],
  family: Family,
): (Chains & { readonly lines: readonly string[] })[] {
  return tables.flatMap(({ name, chains, rules }) => {
    if (!isOurTable(name)) return [];
    const own = rules.filter(({ chain }) => OUR_CHAINS.has(chain));
    const lines = rules.filter(({ line }) => line.includes(`"${COMMENT_PREFIX}`)).map(({ line }) => line);
    if (lines.length === 0 || own.some(({ line }) => !lines.includes(line))) return [];
    return [{ family, table: name, chains: [...chains.keys()].filter((it) => OUR_CHAINS.has(it)), lines }];
  });
}
