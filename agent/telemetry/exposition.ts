const NEWLINE = 0x0a;
const HASH = 0x23;
/** No sample is that long; a body without line breaks must not fill the memory. */
const MAX_LINE_BYTES = 1024 * 1024;

/**
 * Joins several bodies in Prometheus' text format 0.0.4 into one that strict parsers accept too, as a stream: it keeps
 * one unfinished line, and the names of the families seen.
 *
 * A family may be announced (`# TYPE`, `# HELP`, `# UNIT`) once in the whole, by whoever comes first; `# EOF` would end
 * the whole, so it is dropped. Samples pass untouched.
 */
export class Exposition {
  readonly #announced = new Set<string>();

  /** The filter for the next body. */
  part(openMetrics: boolean): ExpositionPart {
    return new ExpositionPart(this.#announced, openMetrics);
  }
}

class ExpositionPart {
  readonly #announced: Set<string>;
  readonly #openMetrics: boolean;
  #rest: Buffer = Buffer.alloc(0);

  constructor(announced: Set<string>, openMetrics: boolean) {
    this.#announced = announced;
    this.#openMetrics = openMetrics;
  }

  /**
   * The complete lines in what has come so far, in one or two pieces: the line that `chunk` completes is joined, the
   * rest of the chunk is passed on uncopied.
   *
   * @throws {Error} if a line is longer than 1 MiB
   */
  push(chunk: Buffer): Buffer[] {
    const first = this.#rest.length === 0 ? 0 : chunk.indexOf(NEWLINE) + 1;
    const end = chunk.lastIndexOf(NEWLINE) + 1;
    const joined = first === 0 ? undefined : Buffer.concat([this.#rest, chunk.subarray(0, first)]);
    const rest = chunk.subarray(end);
    // Copied, so that a few bytes do not hold the whole chunk.
    this.#rest = end === 0 ? Buffer.concat([this.#rest, rest]) : Buffer.from(rest);
    if (this.#rest.length > MAX_LINE_BYTES) throw new Error("a line of the metrics is longer than 1 MiB");
    const pieces = [...(joined === undefined ? [] : [joined]), chunk.subarray(first, Math.max(first, end))];
    return pieces.map((piece) => (this.#openMetrics ? this.#converted(piece) : this.#filtered(piece)));
  }

  /** The last line if the body ended without a line break. Not to be asked of a body that broke off. */
  end(): Buffer[] {
    return this.#rest.length === 0 ? [] : this.push(Buffer.from("\n"));
  }

  /** Looks only at lines that begin with `#`, found by a search in native code: 10 MB take a few milliseconds. */
  #filtered(lines: Buffer): Buffer {
    const kept: Buffer[] = [];
    let from = 0;
    let at = lines[0] === HASH ? 0 : nextHash(lines, 0);
    while (at < lines.length) {
      const next = lines.indexOf(NEWLINE, at) + 1;
      if (!this.#keeps(lines.toString("latin1", at, next))) {
        kept.push(lines.subarray(from, at));
        from = next;
      }
      at = lines[next] === HASH ? next : nextHash(lines, next);
    }
    if (from === 0) return lines;
    return Buffer.concat([...kept, lines.subarray(from)]);
  }

  #keeps(line: string): boolean {
    const [, keyword = "", family = ""] = line.trimEnd().split(/[ \t]+/);
    if (keyword === "EOF" && family === "") return false;
    if (keyword !== "TYPE" && keyword !== "HELP" && keyword !== "UNIT") return true;
    const key = `${keyword} ${family}`;
    if (this.#announced.has(key)) return false;
    this.#announced.add(key);
    return true;
  }

  /** OpenMetrics 1.0 as text 0.0.4: for applications that give it though they were asked for text. */
  #converted(lines: Buffer): Buffer {
    const kept: string[] = [];
    for (const line of lines.toString("latin1").split("\n")) {
      const text = line.startsWith("#") ? plainComment(line) : plainSample(line);
      if (text !== undefined && text !== "" && (!text.startsWith("#") || this.#keeps(text)))
        kept.push(`${text}\n`);
    }
    return Buffer.from(kept.join(""), "latin1");
  }
}

function nextHash(lines: Buffer, from: number): number {
  const at = lines.indexOf("\n#", from, "latin1");
  return at < 0 ? lines.length : at + 1;
}

/** Text 0.0.4 knows four types and names a counter's family with its suffix. */
function plainComment(line: string): string | undefined {
  const [, keyword, family, type] = line.split(" ");
  if (keyword !== "TYPE") return line;
  if (type === "counter") return `# TYPE ${family}_total counter`;
  return type === "gauge" || type === "histogram" || type === "summary" ? line : undefined;
}

/** Without exemplar, and the timestamp in milliseconds instead of seconds. */
function plainSample(line: string): string {
  const bare = line.replace(/^(.*\S) # \{[^{}]*\} \S+( \S+)?$/, "$1");
  const stamped = /^([^{\s]+(?:\{.*\})?) (\S+) (-?\d[\d.eE+-]*)$/.exec(bare);
  if (stamped === null) return bare;
  return `${stamped[1]} ${stamped[2]} ${Math.round(Number(stamped[3]) * 1000)}`;
}
