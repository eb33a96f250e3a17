import type { FileInfo, Files, Owner } from "../../agent/platform/host.ts";

interface Node {
  readonly kind: FileInfo["kind"];
  readonly data: Uint8Array;
  readonly mode: number;
  readonly owner: Owner;
  readonly target?: string;
}

const ROOT: Owner = { uid: 0, gid: 0 };

/** A tree of files in memory that refuses what a kernel refuses: no write into a directory that does not exist. */
export class MemoryFiles implements Files {
  readonly nodes = new Map<string, Node>();

  constructor(start: Readonly<Record<string, string>> = {}) {
    for (const [path, text] of Object.entries(start)) {
      this.#makeParents(path);
      this.nodes.set(path, { kind: "file", data: Buffer.from(text), mode: 0o644, owner: ROOT });
    }
  }

  /** Path → kind, mode, owner and text: equal before and after means that nothing is left behind. */
  snapshot(): Record<string, string> {
    return Object.fromEntries(
      [...this.nodes]
        .sort(([a], [b]) => a.localeCompare(b))
        .map(([path, it]) => [
          path,
          `${it.kind} ${it.mode.toString(8)} ${it.owner.uid} ${it.target ?? Buffer.from(it.data).toString()}`,
        ]),
    );
  }

  #makeParents(path: string): void {
    const parts = path.split("/").slice(1, -1);
    for (let depth = 1; depth <= parts.length; depth += 1) {
      const folder = `/${parts.slice(0, depth).join("/")}`;
      if (!this.nodes.has(folder))
        this.nodes.set(folder, { kind: "directory", data: new Uint8Array(), mode: 0o755, owner: ROOT });
    }
  }

  #parentMustExist(path: string): void {
    const parent = path.slice(0, path.lastIndexOf("/"));
    if (parent !== "" && this.nodes.get(parent)?.kind !== "directory") {
      throw Object.assign(new Error(`ENOENT: no such directory ${parent}`), { code: "ENOENT" });
    }
  }

  async read(path: string): Promise<Uint8Array | undefined> {
    const node = this.nodes.get(path);
    if (node?.target !== undefined) return this.read(node.target);
    return node?.kind === "file" ? node.data : undefined;
  }
  async readText(path: string): Promise<string | undefined> {
    const data = await this.read(path);
    return data === undefined ? undefined : Buffer.from(data).toString();
  }
  async list(path: string): Promise<string[] | undefined> {
    if (this.nodes.get(path)?.kind !== "directory") return undefined;
    return [...this.nodes.keys()]
      .filter((name) => name.startsWith(`${path}/`) && !name.slice(path.length + 1).includes("/"))
      .map((name) => name.slice(path.length + 1))
      .sort();
  }
  async stat(path: string): Promise<FileInfo | undefined> {
    const node = this.nodes.get(path);
    if (node === undefined) return undefined;
    return { kind: node.kind, mode: node.mode, ...node.owner, size: node.data.length, modifiedMs: 0 };
  }
  async writeAtomic(
    path: string,
    data: string | Uint8Array,
    options: { mode: number; owner?: Owner },
  ): Promise<void> {
    this.#parentMustExist(path);
    this.nodes.set(path, {
      kind: "file",
      data: Buffer.from(data),
      mode: options.mode,
      owner: options.owner ?? ROOT,
    });
  }
  async swapLink(path: string, target: string): Promise<void> {
    this.#parentMustExist(path);
    this.nodes.set(path, { kind: "link", data: new Uint8Array(), mode: 0o777, owner: ROOT, target });
  }
  async readLink(path: string): Promise<string | undefined> {
    return this.nodes.get(path)?.target;
  }
  async makeDir(path: string, options: { mode: number; owner?: Owner }): Promise<void> {
    this.#makeParents(path);
    this.nodes.set(path, {
      kind: "directory",
      data: new Uint8Array(),
      mode: options.mode,
      owner: options.owner ?? ROOT,
    });
  }
  async remove(path: string): Promise<void> {
    for (const name of [...this.nodes.keys()])
      if (name === path || name.startsWith(`${path}/`)) this.nodes.delete(name);
  }
  async touch(path: string): Promise<void> {
    if (!this.nodes.has(path)) await this.writeAtomic(path, "", { mode: 0o660 });
  }
  async *lines(path: string): AsyncIterable<string> {
    yield* ((await this.readText(path)) ?? "").split("\n").slice(0, -1);
  }
  async lock(): Promise<AsyncDisposable> {
    return { async [Symbol.asyncDispose]() {} };
  }
}
