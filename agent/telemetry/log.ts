import type { Host } from "../platform/host.ts";
import { redact } from "./redact.ts";

/** Levels in falling order of weight with their numbers in sd-daemon(3). */
export const LEVELS = { error: 3, warning: 4, info: 6, debug: 7 } as const;
export type Level = keyof typeof LEVELS;

/** What belongs to a line beside its sentence. `code` is an error code of core/errors. undefined is left out. */
export type Fields = Readonly<Record<string, string | number | boolean | undefined>>;

/** One line, before it has a form. */
export interface LogLine {
  readonly level: Level;
  readonly task: string | undefined;
  readonly message: string;
  readonly fields: Fields;
}

/** Where lines go; `journal` and the others are forms of the same line. */
export type Sink = (line: LogLine) => void;

/** `journal`: `<N>` in front for systemd. `terminal`: with the time. `json`: one object per line. */
export type LogFormat = "journal" | "terminal" | "json";

/**
 * Log lines of one task. Secrets are taken out of message and fields; a line never holds a line break, so that no
 * message can pretend to be another.
 */
export class Logger {
  readonly #sink: Sink;
  readonly #threshold: Level;
  readonly #task: string | undefined;

  constructor(sink: Sink, threshold: Level, task?: string) {
    this.#sink = sink;
    this.#threshold = threshold;
    this.#task = task;
  }

  /** The same log under the name of a task. */
  child(task: string): Logger {
    return new Logger(this.#sink, this.#threshold, task);
  }

  error(message: string, fields: Fields = {}): void {
    this.#log("error", message, fields);
  }
  warning(message: string, fields: Fields = {}): void {
    this.#log("warning", message, fields);
  }
  info(message: string, fields: Fields = {}): void {
    this.#log("info", message, fields);
  }
  debug(message: string, fields: Fields = {}): void {
    this.#log("debug", message, fields);
  }

  #log(level: Level, message: string, fields: Fields): void {
    if (LEVELS[level] > LEVELS[this.#threshold]) return;
    const safe: Record<string, string | number | boolean> = {};
    for (const [key, value] of Object.entries(fields)) {
      if (value !== undefined) safe[key] = typeof value === "string" ? redact(value) : value;
    }
    this.#sink({ level, task: this.#task, message: redact(message), fields: safe });
  }
}

/** A line as text without its line break. Pure. */
export function renderLine(line: LogLine, format: LogFormat, now: Date): string {
  const fields = line.task === undefined ? line.fields : { task: line.task, ...line.fields };
  if (format === "json") {
    return JSON.stringify({ ...fields, time: now.toISOString(), level: line.level, message: line.message });
  }
  const words = [line.message.replace(/[\r\n]+/g, " ⏎ ")];
  for (const [key, value] of Object.entries(fields)) words.push(`${key}=${quoted(String(value))}`);
  const text = words.join(" ");
  return format === "journal"
    ? `<${LEVELS[line.level]}>${text}`
    : `${now.toISOString()} ${line.level} ${text}`;
}

function quoted(value: string): string {
  return /^[\w.:/@+-]+$/.test(value) ? value : JSON.stringify(value);
}

/** Lines as text to `write`, usually `process.stderr`. */
export function textSink(format: LogFormat, now: () => Date, write: (text: string) => void): Sink {
  return (line) => write(`${renderLine(line, format, now())}\n`);
}

/**
 * Whether stderr is the journal's stream: systemd names its inode in JOURNAL_STREAM, and a program whose output was
 * redirected since has another one (systemd.exec(5)).
 */
export async function stderrIsJournal(
  files: Pick<Host["files"], "readLink">,
  journalStream: string | undefined,
): Promise<boolean> {
  const inode = journalStream?.split(":")[1];
  if (inode === undefined) return false;
  return (await files.readLink("/proc/self/fd/2")) === `socket:[${inode}]`;
}

/** The one function of the optional native package `systemd-journald` that we need. */
export type SendToJournal = (
  level: "err" | "warning" | "info" | "debug",
  message: string,
  fields: Fields,
) => void;

/** Lines with real journal fields: PRIORITY, VMMESH_TASK, VMMESH_CODE and VMMESH_* for every other field. */
export function journalSink(send: SendToJournal): Sink {
  return ({ level, task, message, fields }) => {
    const named: Record<string, string> = task === undefined ? {} : { VMMESH_TASK: task };
    for (const [key, value] of Object.entries(fields)) {
      named[
        `VMMESH_${key
          .replace(/([a-z])([A-Z])/g, "$1_$2")
          .replace(/\W/g, "_")
          .toUpperCase()}`
      ] = String(value);
    }
    send(level === "error" ? "err" : level, message, named);
  };
}

/** The native package if it is installed, else undefined: it is an optional dependency and needs a compiler. */
export async function loadJournal(identifier: string): Promise<SendToJournal | undefined> {
  try {
    const name = "systemd-journald";
    const module = (await import(name)) as {
      default: new (defaults: object) => Record<string, (message: string, fields: Fields) => void>;
    };
    const journal = new module.default({ syslog_identifier: identifier });
    return (level, message, fields) => journal[level]?.(message, fields);
  } catch {
    return undefined;
  }
}

export interface LogOptions {
  readonly level: Level;
  /** `auto`: the journal's form if stderr is the journal, else a terminal's. */
  readonly format: "auto" | "json";
  readonly journalStream: string | undefined;
}

/** The logger of this process: real journal fields if they can be had, else lines on stderr. */
export async function openLog(
  host: Pick<Host, "files" | "clock">,
  options: LogOptions,
  write: (text: string) => void,
  load: typeof loadJournal = loadJournal,
): Promise<Logger> {
  const isJournal = await stderrIsJournal(host.files, options.journalStream);
  if (options.format === "auto" && isJournal) {
    const send = await load("vmmesh");
    if (send !== undefined) return new Logger(journalSink(send), options.level);
  }
  const format = options.format === "json" ? "json" : isJournal ? "journal" : "terminal";
  return new Logger(textSink(format, host.clock.now, write), options.level);
}
