import type { Duplex } from "node:stream";
import { aborted, type Latest } from "../core/signals.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host } from "../platform/host.ts";
import { answer, isOurs, LEASE_NAME, shuffled, TYPE } from "./answer.ts";
import type { DnsTable } from "./table.ts";
import type { Upstreams } from "./upstream.ts";
import {
  Deframer,
  fitted,
  frame,
  idOf,
  RCODE,
  rcodeOf,
  readQuery,
  replyLimit,
  writeAnswer,
  writeBadVersion,
  writeError,
  writeQuery,
} from "./wire.ts";

/** Connections per address: each holds at most one unfinished message of 64 KiB. */
const MAX_CONNECTIONS = 128;
/** Forwarded queries at once, each a socket for up to some seconds: below the usual limit of 1024 files. */
const MAX_FORWARDED = 512;
/** Queries of one connection that wait for their answers; more are not read until some are answered. */
const MAX_PIPELINED = 32;
/** A connection that sends no query for so long is closed (RFC 7766, 6.2.3 speaks of seconds). */
const IDLE_MS = 10 * SECOND_MS;
const BEAT_MS = SECOND_MS;

type Protocol = "udp" | "tcp";

/** One answered query. `refused`: too many are in flight; `failed`: no server of the machine answered. */
export interface QueryEvent {
  readonly protocol: Protocol;
  readonly outcome: "local" | "forwarded" | "failed" | "refused" | "malformed";
  readonly durationMs: number;
}

export interface DnsDeps {
  readonly host: Pick<Host, "net" | "clock" | "random">;
  /** 15053; on 127.0.0.1 and, where the machine has it, ::1. */
  readonly port: number;
  /** Until the first table comes everything is forwarded. */
  readonly table: Latest<DnsTable>;
  readonly upstreams: Upstreams;
  /** The sockets serve. */
  readonly onListening?: () => void;
  readonly onQuery?: (event: QueryEvent) => void;
}

/**
 * Serves DNS until `signal` aborts: the mesh's names from the table, everything else from the machine's resolvers.
 * @throws the errno error of bind(2) if 127.0.0.1 cannot be bound; a machine without ::1 is fine
 */
export async function serveDns(deps: DnsDeps, signal: AbortSignal): Promise<void> {
  const scope = new AbortController();
  const stop = (): void => scope.abort(signal.reason);
  signal.addEventListener("abort", stop, { once: true });
  const desk = new Desk(deps, scope.signal);
  await using closing = new AsyncDisposableStack();
  closing.defer(() => {
    signal.removeEventListener("abort", stop);
    scope.abort();
  });
  await deps.upstreams.refresh();
  for (const address of ["127.0.0.1", "::1"]) {
    try {
      const datagrams = await deps.host.net.bindUdp(address, deps.port);
      closing.defer(() => datagrams.close());
      datagrams.onMessage((data, from) => {
        const reply = (message: Uint8Array): void => {
          if (!scope.signal.aborted) datagrams.send(message, from.port, from.address);
        };
        void desk.take(data, "udp", reply);
      });
      const connections = new Set<Duplex>();
      closing.use(
        await deps.host.net.listenTcp(address, deps.port, (socket) => {
          if (connections.size >= MAX_CONNECTIONS) {
            socket.on("error", () => undefined).destroy();
            return;
          }
          connections.add(socket);
          socket.on("close", () => connections.delete(socket));
          serveConnection(socket, desk, deps.host.clock, scope.signal);
        }),
      );
    } catch (thrown) {
      if (address === "127.0.0.1" || !hasNoSuchAddress(thrown)) throw thrown;
    }
  }
  deps.onListening?.();
  await aborted(scope.signal);
}

/** bind(2) on a machine whose IPv6 is switched off. */
function hasNoSuchAddress(thrown: unknown): boolean {
  return ["EADDRNOTAVAIL", "EAFNOSUPPORT"].includes((thrown as NodeJS.ErrnoException).code ?? "");
}

/** Where a query becomes its answer, whatever it came by. */
class Desk {
  readonly #deps: DnsDeps;
  readonly #signal: AbortSignal;
  #forwarded = 0;

  constructor(deps: DnsDeps, signal: AbortSignal) {
    this.#deps = deps;
    this.#signal = signal;
  }

  /** Calls `reply` at most once. Never rejects: one bad packet must harm nobody else. */
  async take(bytes: Uint8Array, protocol: Protocol, reply: (message: Uint8Array) => void): Promise<void> {
    try {
      await this.#serve(bytes, protocol, reply);
    } catch {
      // A fault of ours on this one query; readQuery has ignored what is too short for an error reply.
      this.#deps.onQuery?.({ protocol, outcome: "failed", durationMs: 0 });
      reply(writeError(bytes, RCODE.SERVFAIL));
    }
  }

  async #serve(bytes: Uint8Array, protocol: Protocol, reply: (message: Uint8Array) => void): Promise<void> {
    const { clock } = this.#deps.host;
    const startedMs = clock.monotonicMs();
    const done = (outcome: QueryEvent["outcome"], message: Uint8Array): void => {
      reply(message);
      this.#deps.onQuery?.({ protocol, outcome, durationMs: clock.monotonicMs() - startedMs });
    };
    const query = readQuery(bytes);
    if (query === "ignore") return;
    if (query === "malformed") return done("malformed", writeError(bytes, RCODE.FORMERR));
    if (query === "no-question") return done("malformed", writeError(bytes, RCODE.SERVFAIL));
    if (query !== "foreign") {
      if (this.#deps.upstreams.isLoopCheck(query.question.name))
        return done("refused", writeError(bytes, RCODE.REFUSED));
      const known = answer(this.#deps.table.value, query.question, this.#deps.upstreams.search);
      if (known !== "forward") {
        if (query.edns !== undefined && query.edns.version > 0) return done("local", writeBadVersion(query));
        const addresses = shuffled(known.addresses, Math.random);
        done("local", writeAnswer(query, { ...known, addresses }, replyLimit(query, protocol)));
        // After the reply, so that a change of the search list costs no local answer a file read.
        return this.#deps.upstreams.refresh();
      }
    }
    if (this.#forwarded >= MAX_FORWARDED) return done("refused", writeError(bytes, RCODE.SERVFAIL));
    this.#forwarded += 1;
    const forwarded = await this.#deps.upstreams
      .forward(bytes, protocol, this.#signal)
      .catch(() => undefined);
    this.#forwarded -= 1;
    if (forwarded === undefined) return done("failed", writeError(bytes, RCODE.SERVFAIL));
    if (query === "foreign") return done("forwarded", forwarded);
    const limit = replyLimit(query, protocol);
    const denied =
      rcodeOf(forwarded) === RCODE.NXDOMAIN &&
      isOurs(this.#deps.table.value, query.question, this.#deps.upstreams.search);
    done(
      "forwarded",
      denied ? writeAnswer(query, { addresses: [] }, limit) : fitted(forwarded, query, limit),
    );
  }
}

function serveConnection(
  socket: Duplex,
  desk: Desk,
  clock: Pick<Host["clock"], "sleep">,
  signal: AbortSignal,
): void {
  const deframer = new Deframer();
  let waiting = 0;
  let idle = new AbortController();
  const destroy = (): void => {
    socket.destroy();
  };
  const watchIdle = (): void => {
    idle.abort();
    idle = new AbortController();
    clock.sleep(IDLE_MS, idle.signal).then(destroy, () => undefined);
  };
  signal.addEventListener("abort", destroy, { once: true });
  socket.on("error", destroy);
  socket.on("close", () => {
    idle.abort();
    signal.removeEventListener("abort", destroy);
  });
  // Who asks and does not read is not read either: his answers would pile up here.
  const pace = (): void => {
    if (waiting >= MAX_PIPELINED || socket.writableNeedDrain) socket.pause();
    else socket.resume();
  };
  socket.on("drain", pace);
  socket.on("data", (chunk: Buffer) => {
    for (const message of deframer.push(chunk)) {
      watchIdle();
      waiting += 1;
      const answered = desk.take(message, "tcp", (reply) => {
        if (!socket.destroyed) socket.write(frame(reply));
      });
      void answered.finally(() => {
        waiting -= 1;
        pace();
      });
    }
    pace();
  });
  watchIdle();
}

export interface BeatDeps {
  readonly host: Pick<Host, "net" | "clock">;
  /** The port that is served. */
  readonly port: number;
  /** 127.0.0.1 or ::1: each family has a lease of its own. */
  readonly address: string;
  /** Told once a second whether the last question was answered. */
  readonly onBeat?: (answered: boolean) => void;
}

/**
 * Asks our own DNS server for a reserved name once a second until `signal` aborts. The kernel sees the reply pass and
 * keeps DNS capture alive for some more seconds; a dead or stuck agent gives the machine its own DNS back.
 */
export async function leaseBeat(deps: BeatDeps, signal: AbortSignal): Promise<void> {
  const socket = await deps.host.net.bindUdp(deps.address, 0);
  try {
    let id = 0;
    let answeredId = 0;
    socket.onMessage((data, from) => {
      if (from.port === deps.port && data.length >= 2) answeredId = idOf(data);
    });
    while (!signal.aborted) {
      id = (id % 0xffff) + 1;
      socket.send(writeQuery(id, LEASE_NAME, TYPE.A), deps.port, deps.address);
      await deps.host.clock.sleep(BEAT_MS, signal).catch(() => undefined);
      if (!signal.aborted) deps.onBeat?.(answeredId === id);
    }
  } finally {
    socket.close();
  }
}
