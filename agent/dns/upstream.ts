import type { Duplex } from "node:stream";
import { messageOf } from "../core/errors.ts";
import { RESOLVED_CONF } from "../core/paths.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host } from "../platform/host.ts";
import { TYPE } from "./answer.ts";
import { LOOP_SUFFIX, LoopWatch, ROUTE_SUFFIX } from "./loop.ts";
import { parseResolvConf, RESOLVED_STUB, type ResolvConf, readResolvConf } from "./resolvConf.ts";
import { Deframer, frame, idOf, isReplyTo, RCODE, rcodeOf, readQuery, withId, writeQuery } from "./wire.ts";

/** How long one server may take; the resolver library of the machine waits as long (resolv.conf(5), `timeout`). */
const ATTEMPT_MS = 5 * SECOND_MS;
/** A server that is silent for so long is not given up, but the next one is asked beside it. */
const HEDGE_MS = 1.5 * SECOND_MS;
/** A server that failed is asked last until it answers; so often a question goes to it, too, while another answers it. */
const PROBE_MS = 10 * SECOND_MS;
/** A loop can come with a changed configuration of the local resolver, of which nobody tells us. */
const LOOP_CHECK_MS = 60 * SECOND_MS;
/** Replies after which the resolver library asks the next server. */
const REFUSALS: readonly number[] = [RCODE.SERVFAIL, RCODE.NOTIMP, RCODE.REFUSED];
/** How old our reading of resolv.conf may be. A read costs about 0.1 ms; watching would miss a symlink's target. */
const REREAD_MS = SECOND_MS;

export interface UpstreamHealth {
  readonly address: string;
  readonly healthy: boolean;
  readonly lastError?: string;
}

export interface UpstreamDeps {
  readonly host: Pick<Host, "net" | "clock" | "files" | "random">;
  /** Usually `/etc/resolv.conf`; read again when it has changed. */
  readonly resolvConf: string;
  /** Port of the servers in resolv.conf, which cannot name one. Default 53. */
  readonly port?: number;
  /** Told of every query to a server, after it. */
  readonly onAttempt?: (attempt: {
    readonly server: string;
    readonly ok: boolean;
    readonly durationMs: number;
  }) => void;
  /** resolv.conf names this server no more. */
  readonly onGone?: (server: string) => void;
}

/**
 * The machine's own resolvers. Asked in the order of resolv.conf, those that failed last; a silent server is
 * hedged by the next after 1.5 s, so that its death costs one short wait and no lookup. Whether it answers again is
 * found out beside a question that another answers. A reply that refuses counts only if nobody has a better one. UDP stays UDP and TCP stays TCP;
 * replies are returned untouched but for the id. Where systemd-resolved is one of them, the servers behind it are asked for
 * names that it would ask us for, and for all when it does not run. Source port (the kernel's choice, one socket per query) and id are
 * fresh each time, and only a reply from the asked address and port with that id and question counts (RFC 5452).
 */
export class Upstreams {
  readonly #deps: UpstreamDeps;
  readonly #suspects = new Map<string, { atMs: number; error: string }>();
  #conf: ResolvConf = parseResolvConf("");
  #text: string | undefined;
  #readAtMs = Number.NEGATIVE_INFINITY;
  readonly #loops = new LoopWatch(LOOP_SUFFIX);
  readonly #routes = new LoopWatch(ROUTE_SUFFIX);
  /** Servers of systemd-resolved, where resolv.conf names it. */
  #behind: readonly string[] = [];
  #routed: ReadonlySet<string> = new Set();
  #loopsCheckedMs = Number.NEGATIVE_INFINITY;

  constructor(deps: UpstreamDeps) {
    this.#deps = deps;
  }

  /** Search domains as last read; `refresh` reads them. */
  get search(): readonly string[] {
    return this.#conf.search;
  }

  health(): UpstreamHealth[] {
    return this.#conf.servers.map((address) => {
      if (this.#loops.loops(address))
        return { address, healthy: false, lastError: "a loop: what it is asked comes back to vmmesh" };
      const suspect = this.#suspects.get(address);
      return suspect === undefined
        ? { address, healthy: true }
        : { address, healthy: false, lastError: suspect.error };
    });
  }

  /** Whether a question that arrived here is one by which loops are found. */
  isLoopCheck(name: string): boolean {
    return this.#loops.arrived(name) || this.#routes.arrived(name);
  }

  /**
   * Reads resolv.conf if our reading is older than a second. An unreadable or empty one changes nothing, one without a
   * server (a DHCP client writes it so when the lease has ended) only the search domains.
   */
  async refresh(): Promise<void> {
    const now = this.#deps.host.clock.monotonicMs();
    if (now - this.#readAtMs < REREAD_MS) return;
    this.#readAtMs = now;
    const text = await this.#read(this.#deps.resolvConf);
    const known = [...this.#conf.servers, ...this.#behind];
    if (text !== undefined && text !== this.#text && text.trim() !== "") {
      this.#text = text;
      const { servers, search } = readResolvConf(text);
      this.#conf = { servers: servers.length === 0 ? this.#conf.servers : servers, search };
      this.#loopsCheckedMs = Number.NEGATIVE_INFINITY;
    }
    const resolved = this.#conf.servers.includes(RESOLVED_STUB);
    this.#behind = resolved ? readResolvConf((await this.#read(RESOLVED_CONF)) ?? "").servers : [];
    for (const server of known) {
      if (this.#conf.servers.includes(server) || this.#behind.includes(server)) continue;
      this.#suspects.delete(server);
      this.#deps.onGone?.(server);
    }
  }

  #read(path: string): Promise<string | undefined> {
    return this.#deps.host.files.readText(path).catch(() => undefined);
  }

  /** systemd-resolved sends us, or may send us, what is below these domains (resolved.conf(5)): it is not asked for that. */
  routesAre(domains: readonly string[]): void {
    this.#routed = new Set(domains.map((domain) => `${domain.replace(/^~/, "")}.`));
  }

  /** Whether systemd-resolved sends us a question that is ours: it is asked one, and the question arrives here. */
  async isRouted(signal: AbortSignal): Promise<boolean> {
    await this.#checkLoop(RESOLVED_STUB, signal, this.#routes);
    return this.#routes.loops(RESOLVED_STUB);
  }

  /**
   * The reply to `query` under the query's own id.
   * @throws {AggregateError} if no server answered
   */
  async forward(query: Uint8Array, protocol: "udp" | "tcp", signal: AbortSignal): Promise<Uint8Array> {
    await this.refresh();
    const behind = this.#behind.filter((server) => !this.#conf.servers.includes(server));
    const servers = [...this.#inOrder(query), ...behind];
    this.#lookBeside(servers, query, protocol, signal);
    const scope = new AbortController();
    const stop = (): void => scope.abort(signal.reason);
    signal.addEventListener("abort", stop, { once: true });
    try {
      const attempts: Promise<Uint8Array>[] = [];
      let refusal: Uint8Array | undefined;
      const ask = async (server: string): Promise<Uint8Array> => {
        const reply = await this.#attempt(server, query, protocol, scope.signal);
        if (!REFUSALS.includes(rcodeOf(reply))) return reply;
        refusal ??= reply;
        throw new Error(`${server}: refused`);
      };
      for (const server of servers) {
        // A refusal is an answer: nobody waits for the dead to say better.
        if (refusal !== undefined && this.#suspects.has(server)) break;
        // What systemd-resolved refuses (DNSSEC) or is slow about is not asked of others behind its back.
        if (behind.includes(server) && servers.includes(RESOLVED_STUB) && !this.#suspects.has(RESOLVED_STUB))
          break;
        attempts.push(ask(server));
        const reply = await Promise.race([
          Promise.any(attempts).catch(() => undefined),
          this.#deps.host.clock.sleep(HEDGE_MS, scope.signal).catch(() => undefined),
        ]);
        if (reply !== undefined) return reply;
        signal.throwIfAborted();
      }
      return refusal ?? (await Promise.any(attempts));
    } finally {
      signal.removeEventListener("abort", stop);
      scope.abort();
    }
  }

  #inOrder(query: Uint8Array): string[] {
    const suspect = (server: string): boolean => this.#suspects.has(server);
    const named = this.#conf.servers.filter(
      (server) => !this.#loops.loops(server) && !(server === RESOLVED_STUB && this.#isRouted(query)),
    );
    return [...named.filter((server) => !suspect(server)), ...named.filter(suspect)];
  }

  #isRouted(query: Uint8Array): boolean {
    const read = readQuery(query);
    if (typeof read === "string") return false;
    const labels = read.question.name.toLowerCase().split(".");
    return labels.some((_, index) => this.#routed.has(labels.slice(index).join(".")));
  }

  /** What is found out by the way: whether the silent speak again, and whether anybody is a loop. */
  #lookBeside(
    servers: readonly string[],
    query: Uint8Array,
    protocol: "udp" | "tcp",
    signal: AbortSignal,
  ): void {
    const now = this.#deps.host.clock.monotonicMs();
    // Where all are silent they are asked in turn anyway.
    const others = servers.some((server) => !this.#suspects.has(server));
    for (const [server, suspect] of others ? this.#suspects : []) {
      if (now - suspect.atMs < PROBE_MS) continue;
      suspect.atMs = now;
      void this.#attempt(server, query, protocol, signal).catch(() => undefined);
    }
    if (now - this.#loopsCheckedMs < LOOP_CHECK_MS) return;
    this.#loopsCheckedMs = now;
    for (const server of this.#conf.servers) void this.#checkLoop(server, signal);
  }

  async #checkLoop(server: string, signal: AbortSignal, watch = this.#loops): Promise<void> {
    const { random } = this.#deps.host;
    const name = watch.nameFor(server, Buffer.from(random(8)).toString("hex"));
    const question = writeQuery(idOf(random(2)), name, TYPE.A, "recursion");
    await this.#askUdp(server, question, signal).catch(() => undefined);
    watch.settle(name);
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
      // Overtaken soon by another server is no fault; silence until the hedge is one, and timers may fire a little early.
      if (!signal.aborted || durationMs >= HEDGE_MS / 2) {
        const error = signal.aborted ? `silent for ${Math.round(durationMs)} ms` : messageOf(thrown);
        this.#suspects.set(server, { atMs: clock.monotonicMs(), error });
        this.#deps.onAttempt?.({ server, ok: false, durationMs });
      }
      throw new Error(`${server}: ${messageOf(thrown)}`, { cause: thrown });
    }
  }

  async #askUdp(server: string, sent: Uint8Array, signal: AbortSignal): Promise<Uint8Array> {
    const port = this.#deps.port ?? 53;
    const socket = await this.#deps.host.net.connectUdp(server, port);
    try {
      return await new Promise((resolve, reject) => {
        socket.onMessage((data) => {
          if (isReplyTo(data, sent)) resolve(data);
        });
        socket.onError(reject);
        this.#timeout(signal).catch(reject);
        socket.send(sent);
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
