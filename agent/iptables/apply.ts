import { VmmeshError } from "../core/errors.ts";
import type { Command, Host } from "../platform/host.ts";
import { REPAIRS, UNITS } from "../platform/services.ts";
import { accepted, acceptedElsewhere } from "./accept.ts";
import {
  type Applies,
  bootId,
  carryMarks,
  type GenerationFile,
  PRIVATE,
  readState,
  removeOldGenerations,
  uptime,
  writeState,
} from "./generation.ts";
import { renderMendScript } from "./mend.ts";
import type { CapturePlan } from "./plan.ts";
import {
  foreignIstio,
  isNew,
  listNftChains,
  type NftChains,
  nftName,
  readTables,
  type SeenTable,
  tryRun,
  writtenTables,
} from "./read.ts";
import { Lacking, refusal } from "./refusal.ts";
import { takeOutElsewhere } from "./remove.ts";
import { type RenderedPlan, renderPlan, TABLES, tableRules } from "./render.ts";
import {
  type ApplyOptions,
  arm,
  awaitRollback,
  dropDeadTrial,
  LOCK_SECONDS,
  stopTimer,
  undo,
} from "./rollback.ts";
import { refuseSharedRouting, undoRouting } from "./routing.ts";
import type { Family } from "./rules.ts";
import { nftTables, renderLoadScript, renderUndoScript, restoreCommand } from "./undo.ts";
import {
  addPassthroughAddress,
  applyFamily,
  applyNft,
  layRouting,
  nftText,
  printed,
  together,
} from "./write.ts";

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

/** A note of the plan: capture does without the reasons, as with --rule-comments off. */
const NO_COMMENTS =
  "iptables has no comment match here (xt_comment), so the rules stand without their reasons and are known by the record alone";

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

async function takeOutRouting(host: Applies, former: CapturePlan): Promise<void> {
  await host.run({ argv: ["sh", "-s"], input: undoRouting(former).join("\n") });
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
export async function endRepairs(host: Applies, unit: ApplyOptions["unit"]): Promise<void> {
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
