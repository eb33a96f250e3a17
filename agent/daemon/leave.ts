import { messageOf, VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import { adminClient } from "../telemetry/admin.ts";
import { type Machine, unwind } from "./execute.ts";
import { readJournal, writeJournal } from "./journal.ts";

/** Between "no longer among the endpoints that we see" and "no peer calls any more": pushes to peers go out together. */
const SETTLE_MS = SECOND_MS;
/** Without a probe the entry goes when the stream ends: istiod's grace (PILOT_WORKLOAD_ENTRY_GRACE_PERIOD, 10 s) and the pushes after it. */
const GRACE_MS = 13 * SECOND_MS;
/** What drains in this time drains; longer connections are the applications' own matter. */
const DRAIN_MS = 2 * SECOND_MS;

export interface LeaveOptions {
  readonly withdrawWithinMs: number;
  /** Do not wait for peers. */
  readonly now: boolean;
}

/**
 * Takes the machine out of the mesh: out of the endpoints, drained, rules out, then the journal read backwards. Each part
 * can be given again; an agent that does not answer is no reason to stay.
 *
 * @throws {VmmeshError} NOT_JOINED; STATE_UNREADABLE, RULES_REJECTED: what could not be undone, everything else is
 */
export async function leaveMesh(
  machine: Machine,
  options: LeaveOptions,
  progress: (line: string) => void,
  signal: AbortSignal,
): Promise<void> {
  const { host, paths } = machine;
  const journal = await readJournal(host.files, paths);
  if (journal === undefined) {
    throw new VmmeshError("NOT_JOINED", "this machine is not joined to a mesh", {
      next: "There is nothing to leave.",
    });
  }
  await writeJournal(host.files, paths, { ...journal, state: "leaving" });
  // Also when a leave was interrupted: how far it came with the mesh is not known, and asking twice costs seconds only.
  if (!options.now && journal.state !== "joining") {
    try {
      await withdraw(machine, options.withdrawWithinMs, progress, signal);
    } catch (thrown) {
      signal.throwIfAborted();
      progress(`the mesh could not be told (${messageOf(thrown)}): going on`);
    }
  }
  progress("taking the rules out");
  await machine.removeRules();
  progress("stopping Envoy and the agent, restoring files");
  await unwind({ ...journal, state: "leaving" }, machine, progress);
}

async function withdraw(
  machine: Machine,
  withinMs: number,
  progress: (line: string) => void,
  signal: AbortSignal,
): Promise<void> {
  const { clock, net } = machine.host;
  const admin = adminClient(net, machine.paths.adminSocket, clock);
  const before = await admin.status();
  progress("telling the mesh that this machine leaves");
  await admin.unhealthy("vmmesh leave");
  const deadline = clock.monotonicMs() + withinMs;
  if (before.health === undefined) {
    await clock.sleep(Math.min(GRACE_MS, withinMs), signal);
  } else {
    while (clock.monotonicMs() < deadline && (await admin.status()).registration.listed)
      await clock.sleep(100, signal);
    await clock.sleep(SETTLE_MS, signal);
  }
  progress("draining Envoy");
  await admin.drain();
  await clock.sleep(DRAIN_MS, signal);
}
