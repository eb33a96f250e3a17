import { VmmeshError } from "../core/errors.ts";
import type { Files, Host } from "../platform/host.ts";
import type { CapturePlan } from "./plan.ts";
import type { SeenTable } from "./read.ts";
import type { Family } from "./rules.ts";

export type Applies = Pick<Host, "run" | "files" | "random">;

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

export const PRIVATE = { mode: 0o600 } as const;

export async function bootId(files: Pick<Files, "readText">): Promise<string> {
  return ((await files.readText("/proc/sys/kernel/random/boot_id")) ?? "").trim();
}

/** Seconds since boot, also while suspended. */
export async function uptime(files: Pick<Files, "readText">): Promise<number> {
  return Number(((await files.readText("/proc/uptime")) ?? "0").split(" ")[0]);
}

export function writeState(files: Files, here: string, state: GenerationFile): Promise<void> {
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

/** A record that cannot be read must not keep anybody from leaving: it counts as lost. */
export async function readableState(...args: Parameters<typeof readState>): ReturnType<typeof readState> {
  try {
    return await readState(...args);
  } catch (thrown) {
    if (thrown instanceof VmmeshError && thrown.code === "STATE_UNREADABLE") return undefined;
    throw thrown;
  }
}

/** What a rollback by the timer has left behind: texts only, nothing of it is in force. */
export async function removeOldGenerations(files: Files, rulesDir: string): Promise<void> {
  const inForce = await Promise.all(
    (["confirmed", "retired"] as const).map((link) => files.readLink(`${rulesDir}/${link}`)),
  );
  for (const name of (await files.list(rulesDir)) ?? []) {
    if (name === "undone" || (name.startsWith("gen-") && !inForce.includes(name)))
      await files.remove(`${rulesDir}/${name}`);
  }
}

/** What the former generation made (tables, the address) is still ours to take back. */
export async function carryMarks(files: Files, from: string, to: string): Promise<void> {
  for (const name of (await files.list(from)) ?? []) {
    if (name.startsWith("made.")) await files.writeAtomic(`${to}/${name}`, "", PRIVATE);
  }
}
