import { createHash } from "node:crypto";
import { messageOf, VmmeshError } from "../core/errors.ts";
import type { Host } from "../platform/host.ts";
import {
  type DeltaResponse,
  type Resource,
  readDeltaResponse,
  writeDeltaResponse,
} from "../proto/discovery.ts";

/** Resources of each type, as istiod sent them. */
export type ResourceSet = ReadonlyMap<string, readonly Resource[]>;

/**
 * Whose configuration it is. The address is not in it, for it may change at a boot, nor is the rest of Envoy's node: a set
 * for labels that have changed since is an old one, not a wrong one. The mode stands apart (see `LastGood`).
 */
export interface Owner {
  readonly spiffe: string;
  readonly node: string;
  /** Istio's cluster id. */
  readonly cluster: string;
  /** `host:port` of the control plane; its name has the revision in it. */
  readonly discovery: string;
}

interface Header extends Owner {
  readonly format: number;
  /** RFC 3339. */
  readonly savedAt: string;
  /** What the listeners are made for: REDIRECT or TPROXY. Files of an older vmmesh do not say. */
  readonly mode?: string;
  /** End of the certificate of that time, RFC 3339: what is older than its identity is not served. */
  readonly notAfter: string;
}

export interface LastGood {
  readonly savedAt: Date;
  readonly notAfter: Date;
  /** Interception mode of the Envoy that accepted it; undefined: not known. */
  readonly mode: string | undefined;
  readonly types: ResourceSet;
}

export interface LastGoodDeps {
  readonly host: {
    readonly files: Pick<Host["files"], "read" | "writeAtomic" | "remove">;
    readonly clock: Pick<Host["clock"], "now">;
  };
  readonly path: string;
  readonly owner: Owner;
  /** End of the certificate in use; without one nothing is written. */
  notAfter(): Date | undefined;
}

const FORMAT = 1;
const NEWLINE = 10;
const OWNER_FIELDS = ["spiffe", "node", "cluster", "discovery"] as const satisfies readonly (keyof Owner)[];

/**
 * The configuration that Envoy accepted last, on disk: for a start without a control plane.
 *
 * A line of JSON, a line with the SHA-256 of that line and of what follows, then one discovery response per type, each
 * behind its length. The hash finds damage; who can write the file could make a new hash, and owns the agent anyway.
 */
export class LastGoodFile {
  readonly #deps: LastGoodDeps;
  #written = "";

  constructor(deps: LastGoodDeps) {
    this.#deps = deps;
  }

  /** Is the set of that revision (a number of this process) on disk, under the certificate in use? */
  isSaved(revision: number): boolean {
    return this.#written === this.#mark(revision);
  }

  /**
   * Replaces the file in one step; nothing happens without a certificate.
   * @param mode interception mode of the Envoy that accepted it
   * @throws the errno error of the write; the file before is whole then
   */
  async save(types: ResourceSet, revision: number, mode: string): Promise<void> {
    const { host, owner, path } = this.#deps;
    const notAfter = this.#deps.notAfter();
    if (notAfter === undefined) return;
    const mark = this.#mark(revision);
    const header: Header = {
      format: FORMAT,
      savedAt: host.clock.now().toISOString(),
      notAfter: notAfter.toISOString(),
      mode,
      ...owner,
    };
    await host.files.writeAtomic(path, encode(header, types), { mode: 0o600 });
    this.#written = mark;
  }

  /**
   * @returns undefined if there is no file
   * @throws {VmmeshError} STATE_UNREADABLE: damaged, of another workload or mesh, or older than its certificate; the
   * file is set aside under the name `<path>.refused`
   */
  async load(): Promise<LastGood | undefined> {
    const { host, path, owner } = this.#deps;
    const bytes = await host.files.read(path);
    if (bytes === undefined) return undefined;
    try {
      const { header, types } = decode(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
      for (const field of OWNER_FIELDS)
        if (header[field] !== owner[field])
          throw new Error(`its ${field} is ${header[field]}, this machine's is ${owner[field]}`);
      const [savedAt, notAfter] = [new Date(header.savedAt), new Date(header.notAfter)];
      if (Number.isNaN(savedAt.getTime()))
        throw new Error(`it was saved at ${header.savedAt}, which is no date`);
      // The comparison is false for a date that is none, too.
      if (!(notAfter.getTime() > host.clock.now().getTime()))
        throw new Error(`the certificate that it belongs to ended at ${header.notAfter}`);
      return { savedAt, notAfter, mode: header.mode, types };
    } catch (cause) {
      await host.files.writeAtomic(`${path}.refused`, bytes, { mode: 0o600 });
      await host.files.remove(path);
      throw new VmmeshError("STATE_UNREADABLE", `${path} is not served: ${messageOf(cause)}`, {
        cause,
        next: `Envoy waits for the control plane; the file is kept as ${path}.refused and may be deleted.`,
      });
    }
  }

  #mark(revision: number): string {
    return `${revision} ${this.#deps.notAfter()?.getTime() ?? 0}`;
  }
}

function encode(header: Header, types: ResourceSet): Buffer {
  const line = Buffer.from(`${JSON.stringify(header)}\n`);
  const body = [...types].flatMap(([typeUrl, resources]) => {
    const response: DeltaResponse = { systemVersion: "", typeUrl, resources, removed: [], nonce: "" };
    const bytes = writeDeltaResponse(response);
    const length = Buffer.alloc(4);
    length.writeUInt32BE(bytes.length);
    return [length, bytes];
  });
  return Buffer.concat([line, Buffer.from(`${hashOf([line, ...body])}\n`), ...body]);
}

/** @throws {Error} in words, for what is no such file or a damaged one */
function decode(bytes: Buffer): { header: Header; types: ResourceSet } {
  const first = bytes.indexOf(NEWLINE) + 1;
  const second = bytes.indexOf(NEWLINE, first) + 1;
  if (first === 0 || second === 0) throw new Error("it is cut off");
  const body = bytes.subarray(second);
  if (bytes.toString("latin1", first, second - 1) !== hashOf([bytes.subarray(0, first), body]))
    throw new Error("it is damaged: its content does not match its hash");
  const header = JSON.parse(bytes.toString("utf8", 0, first)) as Header;
  if (header.format !== FORMAT) throw new Error(`its format is ${header.format}, known is ${FORMAT}`);
  const types = new Map<string, readonly Resource[]>();
  for (let at = 0; at < body.length; ) {
    const length = body.readUInt32BE(at);
    const { typeUrl, resources } = readDeltaResponse(body.subarray(at + 4, at + 4 + length));
    types.set(typeUrl, resources);
    at += 4 + length;
  }
  return { header, types };
}

function hashOf(parts: readonly Uint8Array[]): string {
  const sum = createHash("sha256");
  for (const part of parts) sum.update(part);
  return sum.digest("hex");
}
