/**
 * Readiness as a set of named blockers that tasks release (ztunnel's idea): `status` lists those that are left.
 */
export class Gates {
  readonly #open = new Set<string>();
  #whenReady: (() => void)[] = [];

  block(name: string): { release(): void; block(): void } {
    this.#open.add(name);
    return {
      release: () => {
        this.#open.delete(name);
        if (this.#open.size === 0) for (const resolve of this.#whenReady.splice(0)) resolve();
      },
      block: () => {
        this.#open.add(name);
      },
    };
  }

  /** Names of what is still awaited, sorted. */
  get waitingFor(): string[] {
    return [...this.#open].sort();
  }

  /** Resolves the first time that nothing is awaited. */
  ready(): Promise<void> {
    if (this.#open.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#whenReady.push(resolve));
  }
}
