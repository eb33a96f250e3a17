import { VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Command, CommandResult, Files, Host } from "../platform/host.ts";
import { REPAIRS, UNITS } from "../platform/services.ts";
import { accepted, acceptedElsewhere } from "./accept.ts";
import { findOurs } from "./elsewhere.ts";
import { ahead, MENDED, mendedSentences, missing, renderMendScript } from "./mend.ts";
import { withoutCounters } from "./parse.ts";
import { backendWords } from "./plan/describe.ts";
import { type CaptureWish, DEFAULT_ROUTE_TABLE } from "./plan/wish.ts";
import { type CapturePlan, type FamilyPlan, planCapture } from "./plan.ts";
import {
  foreignIstio,
  isNew,
  listNftChains,
  listNftTables,
  type NftChains,
  nftName,
  readMachine,
  readTable,
  readTables,
  type SeenTable,
  tryRun,
  writtenTables,
} from "./read.ts";
import { Lacking, refusal, refused } from "./refusal.ts";
import { commentsOf, type RenderedPlan, renderPlan, renderTable, TABLES, tableRules } from "./render.ts";
import { leftRouting, refuseSharedRouting, undoRouting } from "./routing.ts";
import { CHAIN, type Family, PASSTHROUGH } from "./rules.ts";
import {
  nftTables,
  removeTables,
  renderChainsOut,
  renderLoadScript,
  renderUndoScript,
  restoreCommand,
} from "./undo.ts";

export type Applies = Pick<Host, "run" | "files" | "random">;

export interface ApplyOptions {
  /** Without a confirmation within this time the rules go out again by themselves. */
  readonly confirmWithinMs: number;
  /** Root's own directory (0700); what is in it decides what root feeds to the kernel. */
  readonly rulesDir: string;
  /** Who keeps the timer: systemd, or a detached shell where there is none (a network namespace). */
  readonly unit: "systemd" | "detached";
}

/** Rules that are in force but not yet kept. */
export interface Trial {
  readonly generation: string;
  /** What is in force: the plan that was asked for, without comments where the machine cannot have them. */
  readonly plan: CapturePlan;
  /** From the start of applying to the last table in force. */
  readonly appliedInMs: number;
  /** Keeps the rules, from now on and after a reboot. @throws {VmmeshError} RULES_NOT_CONFIRMED if they are out again already */
  confirm(): Promise<void>;
  /** Takes them out at once. */
  rollBack(): Promise<void>;
}

/** State of one generation beside its texts. */
export interface GenerationFile {
  readonly version: 1;
  readonly plan: CapturePlan;
  readonly bootId: string;
  /** Seconds of /proc/uptime at which the rollback fires. */
  readonly deadline: number;
  /** How the kernel prints what we gave it: drift is a difference from this. Empty until applied. */
  readonly printed: readonly PrintedTable[];
  readonly nft: Readonly<Record<string, string>>;
}

export interface PrintedTable {
  readonly family: Family;
  readonly table: SeenTable["table"];
  readonly own: readonly string[];
}

const ROLLBACK_UNIT = "vmmesh-rollback";
/** A rollback beside 50,000 foreign rules takes some; iptables-legacy's may wait for a lock, too. */
const ROLLBACK_SECONDS = "30";
/** A note of the plan: capture does without the reasons, as with --rule-comments off. */
const NO_COMMENTS =
  "iptables has no comment match here (xt_comment), so the rules stand without their reasons and are known by the record alone";
const PRIVATE = { mode: 0o600 } as const;
/** So long a person waits for iptables-legacy's lock; the timer waits for as long as it takes. */
const LOCK_SECONDS = "10";
/** Another program may change the rules between our look and our restore; then the kernel refuses our `-D` and we look again. */
const ATTEMPTS = 3;

/**
 * Puts a plan into force for `confirmWithinMs`. Everything is tested first and the rollback is armed before the first rule
 * is applied, so nothing that happens to this process can leave an unconfirmed rule behind. nat comes last in
 * each family; guard and fence come beside them in one transaction.
 *
 * @throws {VmmeshError} BUSY while another trial runs; RULES_REJECTED, RULES_PRIVILEGE by the kernel, and then nothing is left
 */
export async function applyPlan(
  host: Applies & Pick<Host, "clock">,
  rendered: RenderedPlan,
  options: ApplyOptions,
): Promise<Trial> {
  const { plan } = rendered;
  try {
    return await tryPlan(host, rendered, options);
  } catch (thrown) {
    if (plan.comments === false || !(thrown instanceof Lacking) || thrown.extension !== "comment")
      throw thrown;
    // Nothing of it is left. What is missing besides is told by this second one.
    const bare = renderPlan({ ...plan, comments: false, notes: [...plan.notes, NO_COMMENTS] });
    return await tryPlan(host, bare, options);
  }
}

async function tryPlan(
  host: Applies & Pick<Host, "clock">,
  rendered: RenderedPlan,
  options: ApplyOptions,
): Promise<Trial> {
  const { rulesDir } = options;
  const { plan } = rendered;
  await host.files.makeDir(rulesDir, { mode: 0o700 });
  await dropDeadTrial(host, rulesDir);
  if ((await host.files.readLink(`${rulesDir}/trial`)) !== undefined) {
    throw new VmmeshError("BUSY", "other rules are on trial at this moment", {
      next: "Wait until they are confirmed or taken back (at most some minutes), then run the same command again.",
    });
  }
  await awaitRollback(host, rulesDir);
  await removeOldGenerations(host.files, rulesDir);
  const generation = `gen-${Buffer.from(host.random(4)).toString("hex")}`;
  const here = `${rulesDir}/${generation}`;
  await host.files.makeDir(here, { mode: 0o700 });
  const state: GenerationFile = {
    version: 1,
    plan,
    bootId: await bootId(host.files),
    deadline: (await uptime(host.files)) + options.confirmWithinMs / 1000,
    printed: [],
    nft: {},
  };
  let before: NftChains | undefined;
  let own: readonly SeenTable[];
  try {
    // The kernel lets a test wait for its readers: all that changes nothing is done meanwhile.
    [, { before, own }] = await together([
      testNft(host, rendered),
      lookAndTest(host, here, rendered, rulesDir),
      refuseSharedRouting(host, plan),
      writeGeneration(host, here, rendered, state),
    ]);
    // Not beside the tests: one that waits for a lock could outlast it, and it would find no trial to take back.
    await arm(host, here, options);
  } catch (thrown) {
    await stopTimer(host, options.unit);
    await host.files.remove(here);
    throw thrown;
  }
  await host.files.swapLink(`${rulesDir}/trial`, generation);
  const rollBack = async (): Promise<void> => {
    await undo(host, here, "trial");
    await stopTimer(host, options.unit);
    await host.files.remove(here);
    await host.files.remove(`${rulesDir}/undone`);
  };
  try {
    await endRepairs(host, options.unit);
    const started = host.clock.monotonicMs();
    const former = await readState(host.files, rulesDir, "confirmed");
    // Its chains would stay behind. Those of another backend are in nobody's way: they go when the new ones are in force.
    const moves = former !== undefined && former.state.plan.backend !== plan.backend;
    const shrinks = former !== undefined && !moves && !covers(plan, former.state.plan);
    if (shrinks) await takeOutFormer(host, former, rendered, here);
    const seen = shrinks ? await readTables(host, plan) : own;
    await layRouting(host, here, plan);
    await together([
      // It takes the longest.
      applyNft(host, rendered, here, moves ? goneTables(former.state.plan, plan) : [], before),
      ...plan.families.map(({ family }) => applyFamily(host, plan, family, TABLES, seen)),
      addPassthroughAddress(host, here, plan),
    ]);
    await takeOutElsewhere(host, plan.backend, former?.here ?? here);
    if (moves && former.state.plan.routeTable !== plan.routeTable)
      await takeOutRouting(host, former.state.plan);
    const appliedInMs = host.clock.monotonicMs() - started;
    await writeState(host.files, here, {
      ...state,
      ...(await printed(host, plan, before)),
    });
    return {
      generation,
      plan,
      appliedInMs,
      confirm: () => confirm(host, rulesDir, generation, options.unit),
      rollBack,
    };
  } catch (thrown) {
    await rollBack();
    throw thrown;
  }
}

/** Waits for all of them before the first failure, in their order, is thrown: nothing goes on behind a rollback's back. */
async function together<T extends readonly Promise<unknown>[]>(
  started: readonly [...T],
): Promise<{ -readonly [K in keyof T]: Awaited<T[K]> }> {
  await Promise.allSettled(started);
  for (const each of started) await each;
  return Promise.all(started);
}

/**
 * Our part of the tables before anything is applied.
 *
 * @throws {VmmeshError} RULES_REJECTED if there are chains of Istio's names that are not ours
 */
async function readOwn(
  host: Applies,
  plan: CapturePlan,
  rulesDir: string,
  before: NftChains | undefined,
): Promise<SeenTable[]> {
  const [seen, confirmed] = await Promise.all([
    readTables(host, plan, before, "nothing"),
    readState(host.files, rulesDir, "confirmed"),
  ]);
  const recorded = (confirmed?.state.printed ?? []).flatMap(({ own }) => own);
  const [foreign] = foreignIstio(seen, new Set(recorded));
  if (foreign === undefined) return seen;
  throw new VmmeshError(
    "RULES_REJECTED",
    `chains of Istio's names are there that vmmesh did not make: ${foreign}`,
    {
      next: "Stop the other owner (istio-iptables, pilot-agent or istio-cni) and remove its rules, then join again.",
    },
  );
}

/**
 * Takes back a trial whose owner is gone, without waiting for its timer. Only for a caller that holds the lock of the
 * machine: then nobody else can be waiting to confirm it.
 *
 * @throws {VmmeshError} RULES_REJECTED, RULES_PRIVILEGE, STATE_UNREADABLE
 */
export async function takeBackTrial(
  host: Applies,
  rulesDir: string,
  unit: ApplyOptions["unit"],
): Promise<void> {
  const found = await readState(host.files, rulesDir, "trial");
  if (found === undefined) return;
  if (found.state.bootId === (await bootId(host.files))) await undo(host, found.here, "trial");
  else await host.files.remove(`${rulesDir}/trial`);
  await stopTimer(host, unit);
  await removeOldGenerations(host.files, rulesDir);
}

/**
 * Takes a former generation's chains out before another's go in. Guard and fence of the new one hold the traffic
 * meanwhile; where it has none, nothing captures for a moment.
 */
async function takeOutFormer(
  host: Applies,
  { here, state }: { readonly here: string; readonly state: GenerationFile },
  rendered: RenderedPlan,
  next: string,
): Promise<void> {
  if (!rendered.plan.guard) return undo(host, here, "now");
  await applyNft(host, rendered, next, goneTables(state.plan, rendered.plan));
  const script = `${here}/chains.sh`;
  await host.files.writeAtomic(script, renderUndoScript({ ...state.plan, guard: false }), PRIVATE);
  const result = await host.run({ argv: ["sh", script, "now", LOCK_SECONDS] });
  if (result.code !== 0) throw await refusal(host, result, `${script} now`);
}

/** Tables of nft that `next` does not have any more. */
function goneTables(former: CapturePlan, next: CapturePlan): string[] {
  const kept = nftTables(next);
  return nftTables(former).filter((table) => !kept.includes(table));
}

/**
 * Rules of ours are in one backend of iptables only.
 *
 * @param but the one in which they belong; undefined: in none
 * @param here directory of the generation that may have made them
 * @returns the backends in which there were some
 */
async function takeOutElsewhere(host: Applies, but: CapturePlan["backend"], here: string): Promise<string[]> {
  const found = await findOurs(host, but);
  for (const ours of found) {
    const result = await host.run({
      argv: ["sh", "-s", here, LOCK_SECONDS],
      input: renderChainsOut(ours, ours.chains),
    });
    if (result.code !== 0) throw await refusal(host, result, `the way out of iptables-${ours.backend}`);
  }
  return found.map(({ backend }) => backend);
}

async function takeOutRouting(host: Applies, former: CapturePlan): Promise<void> {
  await host.run({ argv: ["sh", "-s"], input: undoRouting(former).join("\n") });
}

/** What a rollback by the timer has left behind: texts only, nothing of it is in force. */
async function removeOldGenerations(files: Files, rulesDir: string): Promise<void> {
  const inForce = await Promise.all(
    (["confirmed", "retired"] as const).map((link) => files.readLink(`${rulesDir}/${link}`)),
  );
  for (const name of (await files.list(rulesDir)) ?? []) {
    if (name === "undone" || (name.startsWith("gen-") && !inForce.includes(name)))
      await files.remove(`${rulesDir}/${name}`);
  }
}

/** What is there before us; the texts of iptables, both families, are tested against it. */
async function lookAndTest(
  host: Applies,
  here: string,
  rendered: RenderedPlan,
  rulesDir: string,
): Promise<{ before: NftChains | undefined; own: readonly SeenTable[] }> {
  const { plan } = rendered;
  const before = await listNftChains(host);
  const [own] = await together([
    readOwn(host, plan, rulesDir, before),
    testFamily(host, rendered, 4, before),
    testFamily(host, rendered, 6, before),
    markMadeTables(host, here, plan, before),
  ]);
  return { before, own };
}

async function testFamily(
  host: Applies,
  { plan, ipv4, ipv6 }: RenderedPlan,
  family: Family,
  before: NftChains | undefined,
): Promise<void> {
  const input = family === 4 ? ipv4 : ipv6;
  if (input === undefined) return;
  const command = restoreCommand(plan, family);
  if (isNew(plan, before, family) && (await acceptedElsewhere(host, command, input))) return;
  const [program, ...args] = command;
  await accept(host, [program, "--test", ...args], `${program} --test`, input);
}

async function testNft(host: Applies, rendered: RenderedPlan): Promise<void> {
  const input = nftText(rendered);
  if (input !== undefined) await accept(host, ["nft", "--check", "-f", "-"], "nft --check", input);
}

async function accept(host: Applies, argv: Command["argv"], what: string, input: string): Promise<void> {
  const result = await host.run({ argv, input });
  if (!accepted(result)) throw await refusal(host, result, what);
}

async function writeGeneration(
  host: Applies,
  here: string,
  rendered: RenderedPlan,
  state: GenerationFile,
): Promise<void> {
  const texts: [string, string | undefined][] = [
    ["load.sh", renderLoadScript(rendered.plan)],
    // One file, so that `nft -f` at boot loads guard and fence as one transaction.
    ["boot.nft", nftText(rendered)],
    ["routing.sh", rendered.routing],
    ["held.nft", rendered.held],
    ["scope.sh", rendered.scope],
    ["undo.sh", rendered.undo],
    ["mend.sh", renderMendScript(rendered)],
  ];
  await together([
    ...texts.map(async ([name, text]) => {
      if (text !== undefined) await host.files.writeAtomic(`${here}/${name}`, text, PRIVATE);
    }),
    writeState(host.files, here, state),
  ]);
}

/** iptables-nft makes its tables on first use. Those that are not there yet go again with our rules. */
async function markMadeTables(
  host: Applies,
  here: string,
  plan: CapturePlan,
  before: NftChains | undefined,
): Promise<void> {
  if (plan.backend !== "nft" || before === undefined) return;
  await together(
    writtenTables(plan)
      .map(({ of, table }) => nftName(of.family, table))
      // One without OUTPUT is somebody's empty shell, or an undo of ours was interrupted in it.
      .filter((name) => before.get(name)?.has("OUTPUT") !== true)
      .map((name) => host.files.writeAtomic(`${here}/made.${name.replace(" ", ".")}`, "", PRIVATE)),
  );
}

/** Istio's Envoy connects to IPv6 applications from ::6, which no machine has by itself (VM protocol, ch. 7.3). */
async function addPassthroughAddress(host: Applies, here: string, plan: CapturePlan): Promise<void> {
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
async function layRouting(host: Applies, here: string, plan: CapturePlan): Promise<string[]> {
  if (plan.routeTable === undefined) return [];
  const result = await host.run({ argv: ["sh", `${here}/routing.sh`] });
  if (result.code !== 0) throw refused(result, `${here}/routing.sh`);
  return result.stdout.split("\n").filter((line) => line !== "");
}

/** Does `next` write every chain that `former` wrote? What only the guard holds is in no table of iptables. Pure. */
export function covers(next: CapturePlan, former: CapturePlan): boolean {
  const chains = (plan: CapturePlan): string[] => [
    ...plan.families.flatMap((wanted) =>
      TABLES.flatMap((table) => tableRules(wanted, table)).map(
        ({ table, chain }) =>
          `${plan.backend} ${plan.programs[wanted.family]} ${wanted.family} ${table} ${chain}`,
      ),
    ),
    ...nftTables(plan),
    ...(plan.routeTable === undefined ? [] : [`routing table ${plan.routeTable}`]),
  ];
  const there = new Set(chains(next));
  return chains(former).every((chain) => there.has(chain));
}

/**
 * One that begins from now on finds the trial and does nothing. One that has begun already would write the former rules
 * over the new ones.
 */
async function endRepairs(host: Applies, unit: ApplyOptions["unit"]): Promise<void> {
  if (unit !== "systemd") return;
  const result = await host.run({ argv: ["systemctl", "stop", ...REPAIRS] });
  if (result.code === 0) return;
  throw new VmmeshError(
    "UNIT_FAILED",
    "a repair of the former rules is under way and does not end, so none were applied",
    {
      cause: new Error(result.stderr.trim().split("\n")[0]),
      next: `Look at \`systemctl status ${UNITS.repairRun}\`, then run the same command again.`,
    },
  );
}

async function arm(host: Applies, here: string, { confirmWithinMs, unit }: ApplyOptions): Promise<void> {
  const seconds = confirmWithinMs / 1000;
  if (unit === "detached") {
    const result = await host.run({
      argv: ["setsid", "--fork", "sh", `${here}/undo.sh`, "after", String(seconds)],
    });
    if (result.code !== 0) throw notArmed(result.stderr);
    return;
  }
  await stopTimer(host, unit);
  const result = await host.run({
    argv: [
      "systemd-run",
      `--unit=${ROLLBACK_UNIT}`,
      `--on-active=${seconds}s`,
      // systemd's default would let it be a minute late (systemd.timer(5)).
      "--timer-property=AccuracySec=100ms",
      "--collect",
      "/bin/sh",
      `${here}/undo.sh`,
      "trial",
    ],
  });
  if (result.code !== 0) throw notArmed(result.stderr);
}

function notArmed(stderr: string): VmmeshError {
  return new VmmeshError(
    "RULES_NOT_CONFIRMED",
    "the timer that would take the rules back could not be started, so none were applied",
    {
      cause: new Error(stderr.trim().split("\n")[0]),
      next: "Read `journalctl -u vmmesh-rollback`, mend what it names, and run the same command again.",
    },
  );
}

async function stopTimer(host: Applies, unit: ApplyOptions["unit"]): Promise<void> {
  // A timer that is not there is as good as a stopped one. A detached sleeper finds its trial gone and ends by itself.
  if (unit === "systemd") await tryRun(host, { argv: ["systemctl", "stop", `${ROLLBACK_UNIT}.timer`] });
}

/** These tables of a family in one call, each one transaction; looks again when somebody else was quicker. */
async function applyFamily(
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
function nftText(rendered: Pick<RenderedPlan, "guard" | "fence">): string | undefined {
  const text = `${rendered.guard ?? ""}${rendered.fence ?? ""}`;
  return text === "" ? undefined : text;
}

function scopeCommand(here: string, what: "load" | "refresh"): readonly [string, ...string[]] {
  return ["sh", `${here}/scope.sh`, what];
}

/**
 * @param here directory of the generation
 * @param gone tables that go in the same transaction
 * @param before what was there before us; undefined: not known
 */
async function applyNft(
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

async function printed(
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

async function confirm(
  host: Applies,
  rulesDir: string,
  generation: string,
  unit: ApplyOptions["unit"],
): Promise<void> {
  const former = await host.files.readLink(`${rulesDir}/confirmed`);
  const still = await host.files.readLink(`${rulesDir}/trial`);
  // First: who is killed after the decision would leave what the former generation made to nobody.
  if (still === generation && former !== undefined && former !== generation)
    await carryMarks(host.files, `${rulesDir}/${former}`, `${rulesDir}/${generation}`);
  // The rename is the decision: the undo script claims the trial by renaming the same link.
  const kept =
    still === generation &&
    (await host.run({ argv: ["mv", "-fT", `${rulesDir}/trial`, `${rulesDir}/confirmed`] })).code === 0;
  if (!kept) {
    throw new VmmeshError("RULES_NOT_CONFIRMED", "the rules were not confirmed in time and are out again", {
      next: "See why connectivity could not be proven in time, then run the same command again.",
    });
  }
  await stopTimer(host, unit);
  // What it holds is of the former generation. It does not wait for the target, which a first join starts later.
  if (unit === "systemd") await tryRun(host, { argv: ["systemctl", "restart", UNITS.hold] });
  if (former !== undefined && former !== generation) await host.files.remove(`${rulesDir}/${former}`);
}

/** What the former generation made (tables, the address) is still ours to take back. */
async function carryMarks(files: Files, from: string, to: string): Promise<void> {
  for (const name of (await files.list(from)) ?? []) {
    if (name.startsWith("made.")) await files.writeAtomic(`${to}/${name}`, "", PRIVATE);
  }
}

async function undo(host: Applies, here: string, mode: "trial" | "now"): Promise<void> {
  const result = await host.run({ argv: ["sh", `${here}/undo.sh`, mode, LOCK_SECONDS] });
  if (result.code !== 0) throw await refusal(host, result, `${here}/undo.sh ${mode}`);
}

async function bootId(files: Pick<Files, "readText">): Promise<string> {
  return ((await files.readText("/proc/sys/kernel/random/boot_id")) ?? "").trim();
}

/** Seconds since boot, also while suspended. */
async function uptime(files: Pick<Files, "readText">): Promise<number> {
  return Number(((await files.readText("/proc/uptime")) ?? "0").split(" ")[0]);
}

function writeState(files: Files, here: string, state: GenerationFile): Promise<void> {
  return files.writeAtomic(`${here}/plan.json`, `${JSON.stringify(state, null, 1)}\n`, PRIVATE);
}

export async function readState(
  files: Files,
  rulesDir: string,
  link: "confirmed" | "trial" | "retired",
): Promise<{ here: string; state: GenerationFile } | undefined> {
  const generation = await files.readLink(`${rulesDir}/${link}`);
  if (generation === undefined) return undefined;
  const here = `${rulesDir}/${generation}`;
  const text = await files.readText(`${here}/plan.json`);
  const unreadable = (why: string): VmmeshError =>
    new VmmeshError("STATE_UNREADABLE", `${here}/plan.json ${why}`, {
      next: "Run `vmmesh iptables clean` to take all rules of vmmesh out, then `vmmesh iptables apply`.",
    });
  if (text === undefined) throw unreadable("is missing");
  let state: GenerationFile;
  try {
    // Root wrote it, in a directory only root can enter.
    state = JSON.parse(text) as GenerationFile;
  } catch {
    throw unreadable("is not JSON");
  }
  if (state.version !== 1)
    throw unreadable(`was written by a newer vmmesh (version ${String(state.version)})`);
  return { here, state };
}

/** A trial that has been claimed by its rollback is none any more, and its rules are still going out. */
async function awaitRollback(host: Pick<Applies, "files" | "run">, rulesDir: string): Promise<void> {
  if (!(await rollsBack(host, rulesDir, ["--wait", ROLLBACK_SECONDS]))) return;
  throw new VmmeshError("BUSY", `rules on trial have been going out for ${ROLLBACK_SECONDS} s`, {
    next: "Read `journalctl -u vmmesh-rollback`, then run the same command again.",
  });
}

/**
 * The rollback holds a lock on the directory, which the kernel takes back when its last program has ended or died.
 * @param patience options of flock(1): what it does about a lock that another holds
 */
async function rollsBack(
  { files, run }: Pick<Applies, "files" | "run">,
  rulesDir: string,
  patience: readonly string[],
): Promise<boolean> {
  if ((await files.stat(rulesDir)) === undefined) return false;
  const waited = await run({ argv: ["flock", ...patience, rulesDir, "true"], timeoutMs: 60 * SECOND_MS });
  return waited.code !== 0;
}

/** A trial of a former boot, or one whose timer was lost, is no trial any more. */
async function dropDeadTrial(host: Applies, rulesDir: string): Promise<"none" | "running" | "dropped"> {
  if ((await host.files.readLink(`${rulesDir}/trial`)) === undefined) return "none";
  const trial = await readState(host.files, rulesDir, "trial");
  if (trial === undefined) return "none";
  const { here, state } = trial;
  const rebooted = state.bootId !== (await bootId(host.files));
  // The timer has ten seconds beyond its time before it counts as lost.
  if (!rebooted && (await uptime(host.files)) < state.deadline + 10) return "running";
  if (rebooted) await host.files.remove(`${rulesDir}/trial`);
  else await undo(host, here, "trial");
  await host.files.remove(here);
  await host.files.remove(`${rulesDir}/undone`);
  return "dropped";
}

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

/** What `leave` can prove. */
export interface RemoveReport {
  /** Generations that were taken out. */
  readonly removed: readonly string[];
  /** Lines of ours that are still there; empty if all went well. */
  readonly residue: readonly string[];
  /** Everybody else's rules are what they were, line by line, counters aside. */
  readonly foreignUnchanged: boolean;
}

/**
 * Takes out what was applied, by the record in `rulesDir`, and then the record. Other programs' rules are not touched.
 *
 * @param endRepairs ends a repair that is under way, and who holds the second fence: both would keep what is being taken out
 * @throws {VmmeshError} RULES_REJECTED, RULES_PRIVILEGE; the record stays, so that the command can be given again
 */
export async function removeCapture(
  host: Applies,
  rulesDir: string,
  endRepairs: () => Promise<void> = async () => undefined,
): Promise<RemoveReport> {
  await awaitRollback(host, rulesDir);
  const removed: string[] = [];
  let residue: string[] = [];
  let foreignUnchanged = true;
  // A repair that begins after this finds nothing confirmed; whoever comes after a kill still finds the record.
  const confirmed = await host.files.readLink(`${rulesDir}/confirmed`);
  if (confirmed !== undefined) {
    await host.files.swapLink(`${rulesDir}/retired`, confirmed);
    await host.files.remove(`${rulesDir}/confirmed`);
  }
  await endRepairs();
  for (const link of ["trial", "retired"] as const) {
    const found = await readableState(host.files, rulesDir, link);
    if (found === undefined) continue;
    const { here, state } = found;
    const before = await foreignLines(host, state.plan);
    // The text that was rendered then may be older than this program; both know the same chains.
    await undo(host, here, "now");
    const after = await foreignLines(host, state.plan);
    foreignUnchanged &&= before.foreign.join("\n") === after.foreign.join("\n");
    residue = [
      ...after.ours,
      ...(await tablesThere(host, state.plan)),
      ...(await leftRouting(host, state.plan)),
    ];
    removed.push(here);
  }
  await tryRun(host, { argv: ["systemctl", "stop", `${ROLLBACK_UNIT}.timer`] });
  if (removed.length === 0 && (await removeUnrecorded(host))) removed.push("rules without a record");
  const strays = await takeOutElsewhere(host, undefined, rulesDir);
  removed.push(...strays.map((backend) => `rules in iptables-${backend}`));
  if (residue.length === 0) await host.files.remove(rulesDir);
  return { removed, residue, foreignUnchanged };
}

async function tablesThere(host: Applies, plan: CapturePlan): Promise<string[]> {
  const texts = await listNftTables(host, nftTables(plan));
  return nftTables(plan).filter((name) => texts[name] !== undefined);
}

/** A record that cannot be read must not keep anybody from leaving: it counts as lost. */
async function readableState(...args: Parameters<typeof readState>): ReturnType<typeof readState> {
  try {
    return await readState(...args);
  } catch (thrown) {
    if (thrown instanceof VmmeshError && thrown.code === "STATE_UNREADABLE") return undefined;
    throw thrown;
  }
}

/** Its plans, for each kind of inbound capture, have every chain, in both families: for finding what is ours when the record is lost. */
const EVERYTHING: CaptureWish = {
  agentUid: 1,
  envoyUid: 1,
  inbound: { kind: "all", excludePorts: [] },
  sshPorts: [],
  outbound: { cidrs: ["*"], excludeCidrs: [], excludePorts: [] },
  meshCidrs: ["192.0.2.0/24"],
  senders: { only: { uids: [2], gids: [] }, never: { uids: [], gids: [] } },
  dns: { servers: ["192.0.2.1", "2001:db8::1"] },
  ipv6: true,
  istiod: [],
  keep: [],
};

/** Takes out rules that carry our comment although no record knows them. Somebody else's ISTIO_* chains are left alone. */
async function removeUnrecorded(host: Applies): Promise<boolean> {
  const machine = await readMachine(host);
  if (machine.backend === undefined && !machine.nft) return false;
  const tproxy = { mode: "TPROXY", routeTable: DEFAULT_ROUTE_TABLE } as const;
  const plans = ([EVERYTHING.inbound, { kind: "ports", ports: [1] }] as const).flatMap((inbound) =>
    ([{ mode: "REDIRECT" }, tproxy] as const).map((interception) =>
      planCapture({ ...EVERYTHING, inbound, interception }, machine),
    ),
  );
  const plan: CapturePlan = {
    ...planCapture({ ...EVERYTHING, interception: tproxy }, machine),
    families: ([4, 6] as const).map((family) => ({
      family,
      rules: plans.flatMap(({ families }) => families.find((it) => it.family === family)?.rules ?? []),
    })),
  };
  const seen = await readTables(host, plan);
  const tables = Object.values(await listNftTables(host, nftTables(plan)));
  const ours =
    seen.some((table) => table.own.length > 0 || table.jumps.length > 0) ||
    tables.some((it) => it !== undefined);
  const foreign = foreignIstio(seen);
  // Where not one rule carries a comment, our own tables beside them say whose they are.
  const commented = foreign.length < seen.reduce((sum, { own }) => sum + own.length, 0);
  const witnessed = !commented && tables.some((it) => it !== undefined);
  if (!ours || (foreign.length > 0 && !witnessed)) return false;
  const result = await host.run({ argv: ["sh", "-s", "now", LOCK_SECONDS], input: renderUndoScript(plan) });
  if (result.code !== 0) throw await refusal(host, result, "the undo script");
  return true;
}

const OURS = new RegExp(`\\b(${Object.values(CHAIN).join("|")})\\b`);

async function foreignLines(
  host: Applies,
  plan: CapturePlan,
): Promise<{ foreign: string[]; ours: string[] }> {
  const lines: string[] = [];
  for (const { family } of plan.families) {
    const program = plan.programs[family];
    if (program === undefined) continue;
    const save = await host.run({ argv: [`${program}-save`] });
    lines.push(...withoutCounters(save.stdout));
  }
  // Headings of tables and policies come and go with tables that only we used.
  const rules = lines.filter((line) => line.startsWith("-A") || / -$/.test(line));
  return { foreign: rules.filter((line) => !OURS.test(line)), ours: rules.filter((line) => OURS.test(line)) };
}
