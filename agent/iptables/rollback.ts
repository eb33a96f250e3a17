import { VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import { type Applies, bootId, readState, removeOldGenerations, uptime } from "./generation.ts";
import { tryRun } from "./read.ts";
import { refusal } from "./refusal.ts";

export interface ApplyOptions {
  /** Without a confirmation within this time the rules go out again by themselves. */
  readonly confirmWithinMs: number;
  /** Root's own directory (0700); what is in it decides what root feeds to the kernel. */
  readonly rulesDir: string;
  /** Who keeps the timer: systemd, or a detached shell where there is none (a network namespace). */
  readonly unit: "systemd" | "detached";
}

const ROLLBACK_UNIT = "vmmesh-rollback";

/** A rollback beside 50,000 foreign rules takes some; iptables-legacy's may wait for a lock, too. */
const ROLLBACK_SECONDS = "30";

/** So long a person waits for iptables-legacy's lock; the timer waits for as long as it takes. */
export const LOCK_SECONDS = "10";

export async function arm(
  host: Applies,
  here: string,
  { confirmWithinMs, unit }: ApplyOptions,
): Promise<void> {
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

export async function stopTimer(host: Applies, unit: ApplyOptions["unit"]): Promise<void> {
  // A timer that is not there is as good as a stopped one. A detached sleeper finds its trial gone and ends by itself.
  if (unit === "systemd") await tryRun(host, { argv: ["systemctl", "stop", `${ROLLBACK_UNIT}.timer`] });
}

export async function undo(host: Applies, here: string, mode: "trial" | "now"): Promise<void> {
  const result = await host.run({ argv: ["sh", `${here}/undo.sh`, mode, LOCK_SECONDS] });
  if (result.code !== 0) throw await refusal(host, result, `${here}/undo.sh ${mode}`);
}

/** A trial that has been claimed by its rollback is none any more, and its rules are still going out. */
export async function awaitRollback(host: Pick<Applies, "files" | "run">, rulesDir: string): Promise<void> {
  if (!(await rollsBack(host, rulesDir, ["--wait", ROLLBACK_SECONDS]))) return;
  throw new VmmeshError("BUSY", `rules on trial have been going out for ${ROLLBACK_SECONDS} s`, {
    next: "Read `journalctl -u vmmesh-rollback`, then run the same command again.",
  });
}

/**
 * The rollback holds a lock on the directory, which the kernel takes back when its last program has ended or died.
 * @param patience options of flock(1): what it does about a lock that another holds
 */
export async function rollsBack(
  { files, run }: Pick<Applies, "files" | "run">,
  rulesDir: string,
  patience: readonly string[],
): Promise<boolean> {
  if ((await files.stat(rulesDir)) === undefined) return false;
  const waited = await run({ argv: ["flock", ...patience, rulesDir, "true"], timeoutMs: 60 * SECOND_MS });
  return waited.code !== 0;
}

/** A trial of a former boot, or one whose timer was lost, is no trial any more. */
export async function dropDeadTrial(
  host: Applies,
  rulesDir: string,
): Promise<"none" | "running" | "dropped"> {
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
