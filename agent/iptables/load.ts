import type { Files } from "../platform/host.ts";
import { type Applies, type GenerationFile, type PrintedTable, readState, writeState } from "./generation.ts";
import { ahead, MENDED, mendedSentences, missing } from "./mend.ts";
import { backendWords } from "./plan/describe.ts";
import type { FamilyPlan } from "./plan.ts";
import { listNftTables, readTable, type SeenTable } from "./read.ts";
import { refused } from "./refusal.ts";
import { renderPlan, TABLES, tableRules } from "./render.ts";
import { dropDeadTrial, rollsBack } from "./rollback.ts";
import type { Family } from "./rules.ts";
import { nftTables } from "./undo.ts";
import { addPassthroughAddress, applyFamily, applyNft, layRouting, printed, scopeCommand } from "./write.ts";

/** What boot and repair found, and did. */
export interface LoadReport {
  readonly state: "nothing confirmed" | "trial running" | "in place" | "repaired";
  /** One sentence for each thing that was mended, with who is likely to have moved it. */
  readonly repaired: readonly string[];
  /** Whose tables they are in, and why there. */
  readonly backend?: string;
  /** Whose port 53 they capture. */
  readonly resolvers?: readonly string[];
  /** A trial that a reboot or a lost timer had left over was dropped. */
  readonly droppedTrial: boolean;
}

/**
 * Holds the kernel equal to the confirmed rules; what boot and every repair call. Reads first, and writes only tables in
 * which something is missing, changed or displaced, each in one transaction without a gap. Giving it twice changes nothing.
 *
 * What others displace is looked at first: order in nat, guard and fence, some seven programs; then every chain, some thirty.
 */
export async function loadConfirmed(host: Applies, rulesDir: string): Promise<LoadReport> {
  const dropped = (await dropDeadTrial(host, rulesDir)) === "dropped";
  // A trial replaces the confirmed rules in the kernel: putting these back would undo it behind its back.
  if (
    (await host.files.readLink(`${rulesDir}/trial`)) !== undefined ||
    (await rollsBack(host, rulesDir, ["--nonblock"]))
  ) {
    return { state: "trial running", repaired: [], droppedTrial: false };
  }
  const confirmed = await readState(host.files, rulesDir, "confirmed");
  if (confirmed === undefined) return { state: "nothing confirmed", repaired: [], droppedTrial: dropped };
  const { here, state } = confirmed;
  const { plan } = state;
  // Both families and nft side by side: none waits for another's thousand rules.
  const first = await Promise.all([
    ...plan.families.map((wanted) => mendTable(host, state, wanted, "nat", "order")),
    mendNft(host, here, state),
  ]);
  await addPassthroughAddress(host, here, plan);
  const laid = await layRouting(host, here, plan);
  const rest = await Promise.all(
    plan.families.flatMap((wanted) =>
      // One after the other within a family: legacy has one lock.
      TABLES.reduce<Promise<string[]>>(
        async (before, table) => [
          ...(await before),
          ...(await mendTable(host, state, wanted, table, "everything")),
        ],
        Promise.resolve([]),
      ),
    ),
  );
  const mended = [...first, laid, ...rest].flat();
  if (mended.length > 0) await writeState(host.files, here, { ...state, ...(await printed(host, plan)) });
  const repaired = [...(await takeMended(host.files, here)), ...mended];
  return {
    state: repaired.length > 0 ? "repaired" : "in place",
    repaired,
    backend: backendWords(plan),
    ...(plan.resolvers === undefined ? {} : { resolvers: plan.resolvers }),
    droppedTrial: dropped,
  };
}

/** What `mend.sh` mended since it was last asked. It never runs beside us. */
async function takeMended(files: Files, here: string): Promise<string[]> {
  const text = await files.readText(`${here}/${MENDED}`);
  if (text === undefined) return [];
  await files.remove(`${here}/${MENDED}`);
  return mendedSentences(text);
}

/** Guard and fence: what is gone or changed is loaded again, both in one transaction. @returns what was mended */
async function mendNft(host: Applies, here: string, { plan, nft }: GenerationFile): Promise<string[]> {
  const now = await listNftTables(host, nftTables(plan));
  const lost = nftTables(plan).filter((name) => now[name] !== nft[name]);
  if (lost.length === 0) {
    if (plan.units !== undefined) await refreshUnits(host, here);
    return [];
  }
  const { guard, fence, scope } = renderPlan(plan);
  const isFence = (name: string): boolean => name.endsWith("-fence");
  await applyNft(
    host,
    {
      guard: lost.every(isFence) ? undefined : guard,
      fence: lost.some(isFence) ? fence : undefined,
      // A part of the tables only: the elements of the others are there already.
      scope,
    },
    here,
  );
  return lost.map((name) => `table ${name} was ${now[name] === undefined ? "gone" : "changed"}`);
}

/** The sets as they should be, whoever emptied them; elements are no drift of a table. */
async function refreshUnits(host: Applies, here: string): Promise<void> {
  const argv = scopeCommand(here, "refresh");
  const result = await host.run({ argv });
  if (result.code !== 0) throw refused(result, argv.join(" "));
}

/**
 * One iptables table of one family.
 * @param what `order`: are the jumps there and ahead; our own chains are not read
 * @returns what was mended
 */
async function mendTable(
  host: Applies,
  { plan, printed: wantedPrint }: GenerationFile,
  wanted: FamilyPlan,
  table: SeenTable["table"],
  what: "order" | "everything",
): Promise<string[]> {
  const { family } = wanted;
  if (plan.backend === undefined || plan.programs[family] === undefined) return [];
  if (tableRules(wanted, table).length === 0) return [];
  const known = what === "order" ? printedOwn(wantedPrint, family, table) : undefined;
  const seen = await readTable(host, plan, wanted, table, known === undefined ? {} : { own: known });
  const why = tableDrift(seen, wantedPrint);
  if (why === undefined) return [];
  await applyFamily(host, plan, family, [table], [seen]);
  return [why];
}

function printedOwn(
  printed: readonly PrintedTable[],
  family: Family,
  table: SeenTable["table"],
): readonly string[] {
  return printed.find((it) => it.family === family && it.table === table)?.own ?? [];
}

/** Why a table has to be written again, in one sentence; undefined if it is as it should be. Pure. */
export function tableDrift(seen: SeenTable, wanted: readonly PrintedTable[]): string | undefined {
  const name = `${seen.table} (IPv${seen.family})`;
  const own = printedOwn(wanted, seen.family, seen.table);
  const [first] = seen.ahead;
  if (seen.missing.length > 0) return missing(name, seen.missing);
  if (first !== undefined) return ahead(name, first.line, first.by);
  if (seen.jumps.length > new Set(seen.jumps.map((jump) => jump.line)).size)
    return `${name}: a jump was there twice`;
  if (own.length !== seen.own.length || own.some((line, index) => line !== seen.own[index]))
    return `${name}: our own chains were changed`;
  return undefined;
}
