import { VmmeshError } from "../core/errors.ts";

/** What a shell would expand, substitute or run outside single quotes; a file that needs it is no list of values any more. */
const EXPANDS = new Set(["$", "`"]);
const OPERATORS = new Set(["&", "|", "<", ">", "(", ")"]);

/**
 * Reads a file of shell assignments as `istio-start.sh` would source it, but runs nothing: comments, `export`, several
 * assignments in a line, single and double quotes, backslashes and any mix of them in one word (POSIX.1, 2.2 Quoting).
 * What a shell would expand (`$X`, `` `cmd` ``, a leading `~`) is an error: its value would not be the one that stands there.
 *
 * @param file named in errors
 * @returns keys in file order; of a key that stands twice, the later value
 * @throws {VmmeshError} ENV_FILE_MALFORMED with file and line
 */
export function parseEnv(text: string, file: string): Map<string, string> {
  const values = new Map<string, string>();
  for (const { word, line } of words(text, file)) {
    const match = /^([A-Za-z_][A-Za-z0-9_]*)=([\s\S]*)$/.exec(word);
    if (match === null) {
      throw malformed(file, line, `\`${shorten(word)}\` is not an assignment`);
    }
    const [, key = "", value = ""] = match;
    values.set(key, value);
  }
  return values;
}

/** Words of the text with their quotes taken off; `export` at the head of a command is dropped. */
function* words(text: string, file: string): Generator<{ word: string; line: number }> {
  const source = new Source(text, file);
  let atCommand = true;
  for (;;) {
    const char = source.peek();
    if (char === "") return;
    if (char === "\n" || char === ";") {
      source.take();
      atCommand = true;
    } else if (char === " " || char === "\t") {
      source.take();
    } else if (char === "#") {
      while (source.peek() !== "" && source.peek() !== "\n") source.take();
    } else {
      const { line } = source;
      const word = readWord(source);
      if (word === "") continue;
      if (!(atCommand && word === "export")) yield { word, line };
      atCommand = false;
    }
  }
}

/** The text, a character at a time, and the line that the next one stands in. */
class Source {
  line = 1;
  #at = 0;
  readonly #text: string;
  readonly #file: string;

  constructor(text: string, file: string) {
    this.#text = text;
    this.#file = file;
  }

  /** Empty at the end. */
  peek(): string {
    return this.#text[this.#at] ?? "";
  }

  take(): string {
    const char = this.peek();
    if (char === "\0") throw this.malformed("holds a NUL byte");
    if (char === "\r") throw this.malformed("holds a carriage return (was it saved on Windows?)");
    this.#at += 1;
    if (char === "\n") this.line += 1;
    return char;
  }

  malformed(what: string, line = this.line): VmmeshError {
    return malformed(this.#file, line, what);
  }
}

function readWord(source: Source): string {
  let word = "";
  // Beside the word: to look into a text that grows by characters costs its whole length each time.
  let named = false;
  let last = "";
  for (;;) {
    const char = source.peek();
    if (["", " ", "\t", "\n", ";"].includes(char)) return word;
    if (char === "'" || char === '"' || char === "\\") {
      const { line } = source;
      const value =
        char === "'" ? singleQuoted(source) : char === '"' ? doubleQuoted(source) : escaped(source);
      if (value === undefined) continue;
      if (!named) throw source.malformed("the name of a variable cannot be quoted", line);
      word += value;
      last = "";
    } else if (EXPANDS.has(char)) {
      throw source.malformed(`has an unquoted \`${char}\`, which a shell would expand; vmmesh never does`);
    } else if (OPERATORS.has(char)) {
      throw source.malformed(`has an unquoted \`${char}\`, which is an operator of the shell`);
    } else if (char === "~" && (last === "=" || last === ":")) {
      throw source.malformed("has an unquoted `~`, which a shell would expand; vmmesh never does");
    } else {
      last = source.take();
      word += last;
      named ||= last === "=";
    }
  }
}

/** @returns undefined for an escaped end of line, which joins two lines and adds nothing */
function escaped(source: Source): string | undefined {
  source.take();
  if (source.peek() === "") throw source.malformed("ends with a backslash");
  const char = source.take();
  return char === "\n" ? undefined : char;
}

function singleQuoted(source: Source): string {
  const { line } = source;
  source.take();
  let value = "";
  while (source.peek() !== "'") {
    if (source.peek() === "") throw source.malformed("a single quote is never closed", line);
    value += source.take();
  }
  source.take();
  return value;
}

function doubleQuoted(source: Source): string {
  const { line } = source;
  source.take();
  let value = "";
  for (;;) {
    const char = source.peek();
    if (char === "") throw source.malformed("a double quote is never closed", line);
    if (EXPANDS.has(char)) {
      throw source.malformed(
        `has a \`${char}\` in double quotes, which a shell would expand; vmmesh never does (use single quotes)`,
      );
    }
    source.take();
    if (char === '"') return value;
    if (char === "\\" && ["$", "`", '"', "\\", "\n"].includes(source.peek())) {
      const next = source.take();
      if (next !== "\n") value += next;
    } else {
      value += char;
    }
  }
}

function shorten(word: string): string {
  return word.length > 40 ? `${word.slice(0, 40)}…` : word;
}

function malformed(file: string, line: number, what: string): VmmeshError {
  return new VmmeshError("ENV_FILE_MALFORMED", `${file}, line ${line}: ${what}`, {
    next: `Write ${file} as lines of KEY='value' (a quote inside a value is written '"'"'), then run the same command again.`,
  });
}

export interface RenderEnvOptions {
  /** `sorted`: bytewise, as istioctl does. Default `given`. */
  readonly order?: "sorted" | "given";
  /** Key → what it means; printed above its line. */
  readonly comments?: Readonly<Record<string, string>>;
  /** Stands at the top of the file. */
  readonly header?: string;
}

const SAFE_KEY = /^[A-Z_][A-Z0-9_]*$/;

/**
 * Text that a POSIX shell may source and that `parseEnv` reads back: every value is single-quoted, an inner quote is
 * written `'"'"'` (as istioctl does), so that nothing in a value can be run.
 *
 * @throws {VmmeshError} CONFIG_MALFORMED for a key outside `[A-Z_][A-Z0-9_]*` or a value with a NUL byte or a carriage return
 */
export function renderEnv(
  values: Iterable<readonly [string, string]>,
  options: RenderEnvOptions = {},
): string {
  const entries = [...values];
  if (options.order === "sorted") entries.sort(([a], [b]) => (a < b ? -1 : Number(a > b)));
  const lines = options.header === undefined ? [] : [...commentLines(options.header), ""];
  for (const [key, value] of entries) {
    const comment = options.comments?.[key];
    if (comment !== undefined) lines.push(...commentLines(comment));
    lines.push(`${checkedKey(key, value)}=${quote(value)}`);
  }
  return lines.map((line) => `${line}\n`).join("");
}

/** A value as one word of a POSIX shell. */
function quote(value: string): string {
  return `'${value.replaceAll("'", `'"'"'`)}'`;
}

/** Each line of a text as a comment. */
export function commentLines(text: string): string[] {
  return text.split(/\r\n|[\r\n]/).map((line) => (line === "" ? "#" : `# ${line}`));
}

function checkedKey(key: string, value: string): string {
  if (!SAFE_KEY.test(key)) {
    throw new VmmeshError(
      "CONFIG_MALFORMED",
      `\`${shorten(key)}\` cannot be a key of an environment file: only A-Z, 0-9 and _`,
      { next: "Take the key out of the mesh's proxyMetadata, then run the same command again." },
    );
  }
  if (/[\0\r]/.test(value)) {
    throw new VmmeshError(
      "CONFIG_MALFORMED",
      `the value of ${key} holds a byte that an environment file cannot carry (NUL or carriage return)`,
      { next: `Correct ${key} where it comes from, then run the same command again.` },
    );
  }
  return key;
}

/** Families of keys that Istio writes into cluster.env; `proxyMetadata` of the mesh may add to them. */
const MESH_PREFIXES = ["CANONICAL_", "CA_", "CLUSTER_", "ISTIO_", "POD_", "PROXY_"] as const;
const MESH_KEYS = new Set([
  "SERVICE_ACCOUNT",
  "TRUST_DOMAIN",
  "REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION",
  "EXIT_ON_ZERO_ACTIVE_CONNECTIONS",
  "MINIMUM_DRAIN_DURATION",
  "OUTPUT_CERTS",
  "PROV_CERT",
  "SECRET_TTL",
]);
/**
 * Of the right family, but Istio's start script puts them on a root command line, runs what they name, or reads the
 * rules' exemptions from them: a machine's own sidecar.env may hold them, the mesh may not.
 */
const MACHINE_ONLY = new Set([
  "ISTIO_AGENT_FLAGS",
  "ISTIO_BIN_BASE",
  "ISTIO_BOOTSTRAP",
  "ISTIO_BOOTSTRAP_OVERRIDE",
  "ISTIO_CFG",
  "ISTIO_CLUSTER_CONFIG",
  "ISTIO_CUSTOM_IP_TABLES",
  "ISTIO_LOG_DIR",
  "ISTIO_SIDECAR_CONFIG",
  "PROXY_CONFIG",
  "PROXY_GID",
  "PROXY_UID",
]);

/**
 * May a key that came from the mesh (WorkloadGroup annotation, mesh config, a bundle's cluster.env) be written where a
 * root shell sources it? An allow-list, because a list of what is dangerous (NODE_OPTIONS, LD_PRELOAD, PATH, BASH_ENV, IFS) never ends.
 */
export function isMeshKey(key: string): boolean {
  if (!SAFE_KEY.test(key) || MACHINE_ONLY.has(key)) return false;
  return MESH_KEYS.has(key) || MESH_PREFIXES.some((prefix) => key.startsWith(prefix));
}

/** Parts what the mesh sent into what is kept and the names of what is refused, each in the order given. */
export function sieveMeshEnv(values: Iterable<readonly [string, string]>): {
  readonly kept: Map<string, string>;
  readonly refused: readonly string[];
} {
  const kept = new Map<string, string>();
  const refused: string[] = [];
  for (const [key, value] of values) {
    if (isMeshKey(key)) kept.set(key, value);
    else refused.push(key);
  }
  return { kept, refused };
}
