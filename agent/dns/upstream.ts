import type { Duplex } from "node:stream";
import { messageOf } from "../core/errors.ts";
import { ipFamily, ipv4Bytes, ipv6Bytes } from "../core/net.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host } from "../platform/host.ts";
import { Deframer, frame, idOf, isReplyTo, withId } from "./wire.ts";

/** How long one server may take; the resolver library of the machine waits as long (resolv.conf(5), `timeout`). */
const ATTEMPT_MS = 5 * SECOND_MS;
/** A server that is silent for so long is not given up, but the next one is asked beside it. */
const HEDGE_MS = 1.5 * SECOND_MS;
/** A server that failed is asked last for so long. */
const SUSPECT_MS = 30 * SECOND_MS;
/** How old our reading of resolv.conf may be. A read costs about 0.1 ms; watching would miss a symlink's target. */
const REREAD_MS = SECOND_MS;

export interface ResolvConf {
  readonly servers: readonly string[];
  readonly search: readonly string[];
}

/**
 * The parts of resolv.conf(5) that matter here. The last `search` or `domain` line wins; without a nameserver the
 * resolver library asks the local one, and so do we.
 */
export function parseResolvConf(text: string): ResolvConf {
  const servers: string[] = [];
  let search: string[] = [];
  for (const line of text.split("\n")) {
    const [keyword, ...values] = line
      .replace(/[#;].*$/, "")
      .trim()
      .split(/\s+/);
    if (keyword === "nameserver") {
      const address = values[0] ?? "";
      if (ipFamily(withoutZone(address)) !== undefined && !servers.includes(address)) servers.push(address);
    } else if (keyword === "search" || keyword === "domain") {
      search = values.map((domain) => domain.replace(/\.$/, "")).filter((domain) => domain !== "");
    }
  }
  return { servers: servers.length === 0 ? ["127.0.0.1"] : servers, search };
}

function withoutZone(address: string): string {
  return address.split("%")[0] ?? "";
}

/** The same address in whatever spelling; a zone does not count. */
function sameAddress(a: string, b: string): boolean {
  const bytes = (text: string): string =>
    (ipv4Bytes(text) ?? ipv6Bytes(text))?.join(".") ?? `unreadable ${text}`;
  return bytes(withoutZone(a)) === bytes(withoutZone(b));
}

export interface UpstreamHealth {
  readonly address: string;
  readonly healthy: boolean;
  readonly lastError?: string;
}

export interface UpstreamDeps {
  readonly host: Pick<Host, "net" | "clock" | "files" | "random">;
  /** Usually `/etc/resolv.conf`; read again when it has changed. */
  readonly resolvConf: string;
  /** Where we serve ourselves: never forwarded to. */
  readonly own: readonly { readonly address: string; readonly port: number }[];
  /** Port of the servers in resolv.conf, which cannot name one. Default 53. */
  readonly port?: number;
  /** Told of every query to a server, after it. */
  readonly onAttempt?: (attempt: {
    readonly server: string;
    readonly ok: boolean;
    readonly durationMs: number;
  }) => void;
}

/**
 * The machine's own resolvers. Asked in the order of resolv.conf, those that failed lately last; a silent server is
 * hedged by the next after 1.5 s, so that its death costs one short wait and no lookup. UDP stays UDP and TCP stays TCP;
 * replies are returned untouched but for the id. Source port (the kernel's choice, one socket per query) and id are
 * fresh each time, and only a reply from the asked address and port with that id and question counts (RFC 5452).
 */
export class Upstreams {
  readonly #deps: UpstreamDeps;
  readonly #suspects = new Map<string, { atMs: number; error: string }>();
  #conf: ResolvConf = parseResolvConf("");
  #text: string | undefined;
  #readAtMs = Number.NEGATIVE_INFINITY;

  constructor(deps: UpstreamDeps) {
    this.#deps = deps;
  }

  /** Search domains as last read; `refresh` reads them. */
  get search(): readonly string[] {
    return this.#conf.search;
  }

  health(): UpstreamHealth[] {
    return this.#conf.servers.map((address) => {
      const suspect = this.#suspects.get(address);
      return suspect === undefined
        ? { address, healthy: true }
        : { address, healthy: false, lastError: suspect.error };
    });
  }

  /** Reads resolv.conf if our reading is older than a second; an unreadable or empty one changes nothing. */
  async refresh(): Promise<void> {
    const now = this.#deps.host.clock.monotonicMs();
    if (now - this.#readAtMs < REREAD_MS) return;
    this.#readAtMs = now;
    const text = await this.#deps.host.files.readText(this.#deps.resolvConf).catch(() => undefined);
    if (text === undefined || text === this.#text || text.trim() === "") return;
    this.#text = text;
    this.#conf = parseResolvConf(text);
    for (const server of this.#suspects.keys()) {
      if (!this.#conf.servers.includes(server)) this.#suspects.delete(server);
    }
  }

  /**
   * The reply to `query` under the query's own id.
   * @throws {AggregateError} if no server answered
   */
  async forward(query: Uint8Array, protocol: "udp" | "tcp", signal: AbortSignal): Promise<Uint8Array> {
    await this.refresh();
    const scope = new AbortController();
    const stop = (): void => scope.abort(signal.reason);
    signal.addEventListener("abort", stop, { once: true });
    try {
      const attempts: Promise<Uint8Array>[] = [];
      for (const server of this.#inOrder()) {
        attempts.push(this.#attempt(server, query, protocol, scope.signal));
        const reply = await Promise.race([
          Promise.any(attempts).catch(() => undefined),
          this.#deps.host.clock.sleep(HEDGE_MS, scope.signal).catch(() => undefined),
        ]);
        if (reply !== undefined) return reply;
        signal.throwIfAborted();
      }
      return await Promise.any(attempts);
    } finally {
      signal.removeEventListener("abort", stop);
      scope.abort();
    }
  }

  #inOrder(): string[] {
    const now = this.#deps.host.clock.monotonicMs();
    const suspect = (server: string): boolean => {
      const at = this.#suspects.get(server)?.atMs;
      return at !== undefined && now - at < SUSPECT_MS;
    };
    const port = this.#deps.port ?? 53;
    const servers = this.#conf.servers.filter(
      (server) => !this.#deps.own.some((own) => own.port === port && sameAddress(own.address, server)),
    );
    return [...servers.filter((server) => !suspect(server)), ...servers.filter((server) => suspect(server))];
  }

  async #attempt(
    server: string,
    query: Uint8Array,
    protocol: "udp" | "tcp",
    signal: AbortSignal,
  ): Promise<Uint8Array> {
    const { clock, random } = this.#deps.host;
    const startedMs = clock.monotonicMs();
    const sent = withId(query, idOf(random(2)));
    try {
      const ask = protocol === "udp" ? this.#askUdp : this.#askTcp;
      const reply = await ask.call(this, server, sent, signal);
      this.#suspects.delete(server);
      this.#deps.onAttempt?.({ server, ok: true, durationMs: clock.monotonicMs() - startedMs });
      return withId(reply, idOf(query));
    } catch (thrown) {
      const durationMs = clock.monotonicMs() - startedMs;
      // Overtaken at once by another server is no fault; silence until the hedge is one.
      if (!signal.aborted || durationMs >= HEDGE_MS) {
        const error = signal.aborted ? `silent for ${Math.round(durationMs)} ms` : messageOf(thrown);
        this.#suspects.set(server, { atMs: clock.monotonicMs(), error });
        this.#deps.onAttempt?.({ server, ok: false, durationMs });
      }
      throw new Error(`${server}: ${messageOf(thrown)}`, { cause: thrown });
    }
  }

  async #askUdp(server: string, sent: Uint8Array, signal: AbortSignal): Promise<Uint8Array> {
    const port = this.#deps.port ?? 53;
    const socket = await this.#deps.host.net.bindUdp(server.includes(":") ? "::" : "0.0.0.0", 0);
    try {
      return await new Promise((resolve, reject) => {
        socket.onMessage((data, from) => {
          if (from.port === port && sameAddress(from.address, server) && isReplyTo(data, sent)) resolve(data);
        });
        this.#timeout(signal).catch(reject);
        socket.send(sent, port, server);
      });
    } finally {
      socket.close();
    }
  }

  async #askTcp(server: string, sent: Uint8Array, signal: AbortSignal): Promise<Uint8Array> {
    const port = this.#deps.port ?? 53;
    const socket = await this.#deps.host.net.connectTcp(server, port, { timeoutMs: ATTEMPT_MS });
    try {
      return await Promise.race([firstMessage(socket, sent), this.#timeout(signal)]);
    } finally {
      socket.destroy();
    }
  }

  async #timeout(signal: AbortSignal): Promise<never> {
    await this.#deps.host.clock.sleep(ATTEMPT_MS, signal);
    throw new Error(`no answer within ${ATTEMPT_MS / SECOND_MS} s`);
  }
}

function firstMessage(socket: Duplex, sent: Uint8Array): Promise<Uint8Array> {
  return new Promise((resolve, reject) => {
    const deframer = new Deframer();
    socket.on("data", (chunk: Buffer) => {
      const reply = deframer.push(chunk).find((message) => isReplyTo(message, sent));
      if (reply !== undefined) resolve(reply);
    });
    socket.on("error", reject);
    socket.on("close", () => reject(new Error("closed the connection without an answer")));
    socket.write(frame(sent));
  });
}
