import { VmmeshError } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import type { Files, Owner } from "../platform/host.ts";

/**
 * How to take one step back, as data: it is written down before the step is made, so that whoever comes after a crash
 * can still do it. Each is idempotent, and a no-op when the step never happened.
 */
export type Undo =
  | { readonly do: "restore-file"; readonly path: string; readonly before: FileBefore | null }
  | { readonly do: "remove-tree"; readonly path: string }
  | {
      readonly do: "restore-unit";
      readonly unit: string;
      readonly active: boolean;
      readonly enabled: boolean;
    }
  | { readonly do: "remove-rules" }
  /** Envoy's unit is again what its package says. */
  | { readonly do: "revoke-envoy" };

/** A file as it was. Content is base64 so that any bytes survive JSON. */
export interface FileBefore {
  readonly content: string;
  readonly mode: number;
  readonly owner: Owner;
}

export interface Entry {
  /** Names the step within one join: a second join that meets it keeps the first `undo`. */
  readonly key: string;
  readonly undo: Undo;
}

/** `joining`: a join was begun; `joined`: it came to its end; `leaving`: a leave was begun. */
export type JournalState = "joining" | "joined" | "leaving";

export interface Journal {
  readonly version: 1;
  readonly state: JournalState;
  readonly startedAt: string;
  /** For people: how this machine was joined. */
  readonly how: string;
  readonly entries: readonly Entry[];
}

const VERSION = 1;

/** @throws {VmmeshError} STATE_UNREADABLE if the file is damaged or of a newer vmmesh */
export async function readJournal(
  files: Pick<Files, "readText">,
  paths: Paths,
): Promise<Journal | undefined> {
  const text = await files.readText(paths.journal);
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new VmmeshError("STATE_UNREADABLE", `the journal ${paths.journal} is damaged`, {
      cause,
      next: "Restore it from a backup, or remove vmmesh's parts by hand as README.md tells under `leave`.",
    });
  }
  const { version } = value as { version?: unknown };
  if (version !== VERSION) {
    throw new VmmeshError(
      "STATE_UNREADABLE",
      `the journal ${paths.journal} has format ${String(version)}, this vmmesh reads ${VERSION}`,
      {
        next: "Use the vmmesh version that joined this machine, or a newer one.",
      },
    );
  }
  return value as Journal;
}

export async function writeJournal(
  files: Pick<Files, "writeAtomic" | "makeDir">,
  paths: Paths,
  journal: Journal,
): Promise<void> {
  await files.makeDir(paths.hostState, { mode: 0o700 });
  await files.writeAtomic(paths.journal, `${JSON.stringify(journal, null, 2)}\n`, { mode: 0o600 });
}

/** Adds a step, unless an earlier, interrupted join has recorded it: what was there before is what *that* one found. */
export function withEntry(journal: Journal, entry: Entry): Journal {
  if (journal.entries.some((known) => known.key === entry.key)) return journal;
  return { ...journal, entries: [...journal.entries, entry] };
}

export async function fileBefore(
  files: Pick<Files, "read" | "stat">,
  path: string,
): Promise<FileBefore | null> {
  const stat = await files.stat(path);
  const content = await files.read(path);
  if (stat === undefined || content === undefined) return null;
  return {
    content: Buffer.from(content).toString("base64"),
    mode: stat.mode,
    owner: { uid: stat.uid, gid: stat.gid },
  };
}
