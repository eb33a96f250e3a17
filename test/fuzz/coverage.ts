import { Session } from "node:inspector/promises";

/** Source positions reached, by script. */
export type Reach = ReadonlyMap<string, Uint8Array>;

/** V8's block coverage of the sources that count. */
export class Coverage {
  readonly #session = new Session();
  #covers = /./;
  #seen = new Map<string, Uint8Array>();
  #atLoad = new Map<string, Uint8Array>();

  /** To be called before the sources are loaded: what is compiled already counts no blocks. */
  async start(): Promise<void> {
    this.#session.connect();
    await this.#session.post("Profiler.enable");
    await this.#session.post("Profiler.startPreciseCoverage", { callCount: true, detailed: true });
  }

  /** What was reached since it was last asked. */
  async take(): Promise<Reach> {
    const { result } = await this.#session.post("Profiler.takePreciseCoverage");
    const reach = new Map<string, Uint8Array>();
    for (const { url, functions } of result) {
      if (!this.#covers.test(url)) continue;
      const ranges = functions.flatMap((each) => each.ranges);
      const painted = new Uint8Array(Math.max(...ranges.map(({ endOffset }) => endOffset)));
      // Outer ranges come before those within them.
      for (const { startOffset, endOffset, count } of ranges)
        painted.fill(count > 0 ? 1 : 0, startOffset, endOffset);
      reach.set(url, painted);
    }
    return reach;
  }

  isNew(reach: Reach): boolean {
    for (const [url, painted] of reach) {
      const seen = this.#seen.get(url);
      // By index: a call for each character would take longer than the runs that it looks at.
      for (let at = 0; at < painted.length; at += 1) if (painted[at] === 1 && seen?.[at] !== 1) return true;
    }
    return false;
  }

  add(reach: Reach): void {
    for (const [url, painted] of reach) {
      const seen = this.#seen.get(url) ?? new Uint8Array();
      // What ends the script need not be told of each time.
      const both = new Uint8Array(Math.max(seen.length, painted.length));
      both.set(seen);
      for (let at = 0; at < painted.length; at += 1) if (painted[at] === 1) both[at] = 1;
      this.#seen.set(url, both);
    }
  }

  /** The sources are loaded: from here on it counts what is reached of those with such a URL. */
  async loaded(covers: RegExp): Promise<void> {
    this.#covers = covers;
    this.add(await this.take());
    this.#atLoad = this.#seen;
    this.forget();
  }

  /** Back to what loading reached. */
  forget(): void {
    this.#seen = new Map(this.#atLoad.entries().map(([url, seen]) => [url, Uint8Array.from(seen)]));
  }

  /** Characters reached beyond loading. */
  get size(): number {
    const sum = (of: Map<string, Uint8Array>): number =>
      of.values().reduce((all, seen) => all + seen.reduce((one, at) => one + at, 0), 0);
    return sum(this.#seen) - sum(this.#atLoad);
  }
}
