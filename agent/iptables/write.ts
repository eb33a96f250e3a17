import type { CommandResult } from "../platform/host.ts";
import { type Applies, type GenerationFile, PRIVATE } from "./generation.ts";
import type { CapturePlan } from "./plan.ts";
import { listNftTables, type NftChains, readTables, type SeenTable, tryRun } from "./read.ts";
import { refusal, refused } from "./refusal.ts";
import { commentsOf, type RenderedPlan, renderTable, TABLES } from "./render.ts";
import { type Family, PASSTHROUGH } from "./rules.ts";
import { nftTables, removeTables, restoreCommand } from "./undo.ts";

/** Another program may change the rules between our look and our restore; then the kernel refuses our `-D` and we look again. */
const ATTEMPTS = 3;

/** Waits for all of them before the first failure, in their order, is thrown: nothing goes on behind a rollback's back. */
export async function together<T extends readonly Promise<unknown>[]>(
  started: readonly [...T],
): Promise<{ -readonly [K in keyof T]: Awaited<T[K]> }> {
  await Promise.allSettled(started);
  for (const each of started) await each;
  return Promise.all(started);
}

/** These tables of a family in one call, each one transaction; looks again when somebody else was quicker. */
export async function applyFamily(
  host: Applies,
  plan: CapturePlan,
  family: Family,
  tables: readonly SeenTable["table"][],
  seen: readonly SeenTable[],
): Promise<void> {
  const wanted = plan.families.find((it) => it.family === family);
  if (wanted === undefined || plan.backend === undefined || plan.programs[family] === undefined) return;
  const argv = restoreCommand(plan, family);
  let now = seen;
  for (let attempt = 1; ; attempt += 1) {
    const jumps = now.filter((table) => table.family === family).flatMap((table) => table.jumps);
    const text = TABLES.filter((table) => tables.includes(table))
      .map((table) => renderTable(wanted, table, jumps, commentsOf(plan)))
      .join("");
    const result = await host.run({ argv, input: text });
    if (result.code === 0) return;
    if (result.code !== 1 || attempt >= ATTEMPTS) throw await refusal(host, result, argv.join(" "));
    now = await readTables(host, plan);
  }
}

/** Guard and fence as one transaction; undefined if there is neither. */
export function nftText(rendered: Pick<RenderedPlan, "guard" | "fence">): string | undefined {
  const text = `${rendered.guard ?? ""}${rendered.fence ?? ""}`;
  return text === "" ? undefined : text;
}

export function scopeCommand(here: string, what: "load" | "refresh"): readonly [string, ...string[]] {
  return ["sh", `${here}/scope.sh`, what];
}

/**
 * @param here directory of the generation
 * @param gone tables that go in the same transaction
 * @param before what was there before us; undefined: not known
 */
export async function applyNft(
  host: Applies,
  rendered: Pick<RenderedPlan, "guard" | "fence" | "scope">,
  here: string,
  gone: readonly string[] = [],
  before?: NftChains,
): Promise<void> {
  const text = nftText(rendered);
  if (text === undefined) return;
  const argv = rendered.scope === undefined ? (["nft", "-f", "-"] as const) : scopeCommand(here, "load");
  const load = (input: string): Promise<CommandResult> => host.run({ argv, input });
  // Whoever deletes a table waits for the kernel to have forgotten it (12 ms), also one that it has just made for that.
  const created = before !== undefined && gone.length === 0 ? createdOnly(text, before) : undefined;
  if (created !== undefined && (await load(created)).code === 0) return;
  const result = await load(`${removeTables(gone)}${text}`);
  if (result.code !== 0) throw refused(result, argv.join(" "));
}

/** The text for a machine without these tables: it is refused where there is one. undefined: there was one. */
function createdOnly(text: string, before: NftChains): string | undefined {
  const replaced = /^add table (.+)\ndelete table \1$/gm;
  return [...text.matchAll(replaced)].some(([, name = ""]) => before.has(name))
    ? undefined
    : text.replace(replaced, "create table $1");
}

/** Istio's Envoy connects to IPv6 applications from ::6, which no machine has by itself (VM protocol, ch. 7.3). */
export async function addPassthroughAddress(host: Applies, here: string, plan: CapturePlan): Promise<void> {
  if (!plan.families.some(({ family }) => family === 6)) return;
  const mark = `${here}/made.address`;
  const marked = (await host.files.stat(mark)) !== undefined;
  // First: who is killed in between leaves a mark that has nothing to take back, not an address that nobody does.
  if (!marked) await host.files.writeAtomic(mark, "", PRIVATE);
  const added = await tryRun(host, {
    argv: ["ip", "-6", "addr", "add", `${PASSTHROUGH[6]}/128`, "dev", "lo"],
  });
  if (!marked && added?.code !== 0) await host.files.remove(mark);
}

/** @returns what was missing, one sentence each */
export async function layRouting(host: Applies, here: string, plan: CapturePlan): Promise<string[]> {
  if (plan.routeTable === undefined) return [];
  const result = await host.run({ argv: ["sh", `${here}/routing.sh`] });
  if (result.code !== 0) throw refused(result, `${here}/routing.sh`);
  return result.stdout.split("\n").filter((line) => line !== "");
}

export async function printed(
  host: Applies,
  plan: CapturePlan,
  before?: NftChains,
): Promise<Pick<GenerationFile, "printed" | "nft">> {
  const [texts, tables] = await together([
    listNftTables(host, nftTables(plan)),
    readTables(host, plan, before),
  ]);
  return {
    printed: tables.map(({ family, table, own }) => ({ family, table, own })),
    nft: Object.fromEntries(nftTables(plan).map((name) => [name, texts[name] ?? ""])),
  };
}
