import { findOurs } from "./elsewhere.ts";
import { type Applies, readableState } from "./generation.ts";
import { withoutCounters } from "./parse.ts";
import { type CaptureWish, DEFAULT_ROUTE_TABLE } from "./plan/wish.ts";
import { type CapturePlan, planCapture } from "./plan.ts";
import { foreignIstio, listNftTables, readMachine, readTables } from "./read.ts";
import { refusal } from "./refusal.ts";
import { awaitRollback, LOCK_SECONDS, stopTimer, undo } from "./rollback.ts";
import { leftRouting } from "./routing.ts";
import { CHAIN } from "./rules.ts";
import { nftTables, renderChainsOut, renderUndoScript } from "./undo.ts";

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
  await stopTimer(host, "systemd");
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

/**
 * Rules of ours are in one backend of iptables only.
 *
 * @param but the one in which they belong; undefined: in none
 * @param here directory of the generation that may have made them
 * @returns the backends in which there were some
 */
export async function takeOutElsewhere(
  host: Applies,
  but: CapturePlan["backend"],
  here: string,
): Promise<string[]> {
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
