import { messageOf, VmmeshError } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import type { Host } from "../platform/host.ts";
import { type Services, UNITS } from "../platform/services.ts";
import type { Owners } from "../platform/users.ts";
import { grantEnvoy } from "./envoyCapability.ts";
import { fileBefore, type Journal, type Undo, withEntry, writeJournal } from "./journal.ts";
import { describeStep, type Step, type StepArgs, stepKey } from "./steps.ts";

/** What the steps work on. The last three reach into feature rooms; `join.ts` wires them. */
export interface Machine {
  readonly host: Host;
  readonly paths: Paths;
  readonly owners: Owners;
  readonly services: Services;
  enroll(signal: AbortSignal): Promise<void>;
  awaitReady(withinMs: number, signal: AbortSignal): Promise<void>;
  /** `appliedInMs`: from the start of applying to the last table in force, without tests before and checks after. */
  installRules(confirmWithinMs: number, signal: AbortSignal): Promise<{ readonly appliedInMs: number }>;
  removeRules(): Promise<void>;
}

interface Executor<Args> {
  /** How this step will be undone, found before it is done. */
  undo(args: Args, machine: Machine): Promise<Undo | undefined>;
  run(args: Args, machine: Machine, signal: AbortSignal): Promise<void>;
}

const EXECUTORS: { readonly [K in keyof StepArgs]: Executor<StepArgs[K]> } = {
  "make-dir": {
    undo: async ({ path }, { host }) =>
      (await host.files.stat(path)) === undefined ? { do: "remove-tree", path } : undefined,
    run: ({ path, mode, owner }, { host, owners }) =>
      host.files.makeDir(path, { mode, owner: owners[owner] }),
  },
  "empty-dir": {
    undo: async ({ path }) => ({ do: "remove-tree", path }),
    async run({ path }, { host, owners, services }) {
      if ((await services.state(UNITS.agent)).active) await services.stop(UNITS.agent);
      await host.files.remove(path);
      await host.files.makeDir(path, { mode: 0o700, owner: owners.agent });
    },
  },
  "write-file": {
    undo: async ({ path }, { host }) => ({
      do: "restore-file",
      path,
      before: await fileBefore(host.files, path),
    }),
    run: ({ path, content, mode, owner }, { host, owners }) =>
      host.files.writeAtomic(path, content, { mode, owner: owners[owner] }),
  },
  link: {
    undo: async ({ path }) => ({ do: "remove-tree", path }),
    run: ({ path, target }, { host }) => host.files.swapLink(path, target),
  },
  enroll: {
    undo: async (_, { paths }) => ({ do: "remove-tree", path: paths.identity }),
    run: (_, machine, signal) => machine.enroll(signal),
  },
  "start-unit": {
    undo: async ({ unit }, { services }) => ({ do: "restore-unit", unit, ...(await services.state(unit)) }),
    async run({ unit, enable }, { services }) {
      if (enable) await services.enable(unit);
      // Left running by a join that was killed: it has read what that one rendered, not what was rendered now.
      if (!enable && (await services.state(unit)).active) await services.restart(unit);
      else await services.start(unit);
    },
  },
  "grant-envoy": {
    // Also for REDIRECT: the mode may be changed after the join.
    undo: async () => ({ do: "revoke-envoy" }),
    async run({ mode }, machine) {
      await grantEnvoy(machine, mode);
    },
  },
  "await-ready": {
    undo: async () => undefined,
    run: ({ withinMs }, machine, signal) => machine.awaitReady(withinMs, signal),
  },
  "install-rules": {
    undo: async () => ({ do: "remove-rules" }),
    async run({ confirmWithinMs }, machine, signal) {
      await machine.installRules(confirmWithinMs, signal);
    },
  },
};

function run<K extends keyof StepArgs>(
  step: { do: K } & StepArgs[K],
  machine: Machine,
  signal: AbortSignal,
): Promise<void> {
  return EXECUTORS[step.do].run(step, machine, signal);
}

function undoFor<K extends keyof StepArgs>(
  step: { do: K } & StepArgs[K],
  machine: Machine,
): Promise<Undo | undefined> {
  return EXECUTORS[step.do].undo(step, machine);
}

/**
 * Does the steps in order. Each step's undo is on disk before the step begins; if one fails, all are undone in reverse
 * and the machine is as it was.
 *
 * @throws the step's own error, after the unwinding
 */
export async function execute(
  steps: readonly Step[],
  journal: Journal,
  machine: Machine,
  progress: (line: string) => void,
  signal: AbortSignal,
): Promise<Journal> {
  let written = journal;
  await writeJournal(machine.host.files, machine.paths, written);
  try {
    for (const step of steps) {
      signal.throwIfAborted();
      progress(describeStep(step));
      const undo = await undoFor(step, machine);
      if (undo !== undefined) {
        written = withEntry(written, { key: stepKey(step), undo });
        await writeJournal(machine.host.files, machine.paths, written);
      }
      await run(step, machine, signal);
    }
  } catch (thrown) {
    progress("it failed: taking back what was done");
    await unwind(written, machine, progress);
    throw thrown;
  }
  const joined: Journal = { ...written, state: "joined" };
  await writeJournal(machine.host.files, machine.paths, joined);
  return joined;
}

/**
 * Undoes a journal, last step first, then removes the journal itself. A step that cannot be undone does not keep the
 * others from it: all failures come together, and the journal stays so that the command can be given again.
 *
 * @throws {VmmeshError} STATE_UNREADABLE naming each step that could not be undone
 */
export async function unwind(
  journal: Journal,
  machine: Machine,
  progress: (line: string) => void,
): Promise<void> {
  const failures: string[] = [];
  for (const { key, undo } of [...journal.entries].reverse()) {
    try {
      await takeBack(undo, machine);
    } catch (thrown) {
      failures.push(`${key}: ${messageOf(thrown)}`);
      progress(`could not undo: ${key}`);
    }
  }
  if (failures.length > 0) {
    throw new VmmeshError(
      "STATE_UNREADABLE",
      `${failures.length} of ${journal.entries.length} steps could not be undone`,
      {
        cause: new Error(failures.join("; ")),
        next: "Mend what the reason names, then run `vmmesh leave` again: it goes on where it stopped.",
      },
    );
  }
  // What systemd keeps for an agent that restarts (RuntimeDirectoryPreserve=) nobody needs any more. The journal goes last.
  const { paths } = machine;
  for (const path of [
    paths.run,
    paths.envoyRun,
    paths.envoyLogRun,
    paths.nftRun,
    paths.resolvedRun,
    paths.holdRun,
    paths.captureState,
    paths.hostState,
  ]) {
    await machine.host.files.remove(path);
  }
}

async function takeBack(undo: Undo, machine: Machine): Promise<void> {
  const { files } = machine.host;
  switch (undo.do) {
    case "restore-file":
      if (undo.before === null) return files.remove(undo.path);
      return files.writeAtomic(undo.path, Buffer.from(undo.before.content, "base64"), {
        mode: undo.before.mode,
        owner: undo.before.owner,
      });
    case "remove-tree":
      return files.remove(undo.path);
    case "restore-unit":
      if (!undo.active) await machine.services.stop(undo.unit);
      if (!undo.enabled) await machine.services.disable(undo.unit);
      return;
    case "remove-rules":
      return machine.removeRules();
    case "revoke-envoy":
      await grantEnvoy(machine, "REDIRECT");
      return;
  }
}
