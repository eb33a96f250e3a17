import { mkdirSync, readFileSync, rmdirSync } from "node:fs";

/** A group of cgroup2 with one below it, gone with this value. */
export class Cgroup implements Disposable {
  /** Relative to the root of cgroup2, as rules name it. */
  readonly path: string;
  readonly directory: string;
  readonly #made: readonly string[];

  constructor(name: string) {
    const mount = /^\S+ (\S+) cgroup2 /m.exec(readFileSync("/proc/mounts", "utf8"))?.[1];
    if (mount === undefined) throw new Error("this machine has no cgroup2");
    this.path = `${name}/app`;
    this.directory = `${mount}/${this.path}`;
    this.#made = [`${mount}/${name}`, this.directory, `${this.directory}/deeper`];
    for (const directory of this.#made) mkdirSync(directory);
  }

  [Symbol.dispose](): void {
    for (const directory of this.#made.toReversed()) rmdirSync(directory);
  }
}
