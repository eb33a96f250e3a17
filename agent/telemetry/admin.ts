import type { IncomingMessage } from "node:http";
import type { Duplex } from "node:stream";
import { messageOf, VmmeshError } from "../core/errors.ts";
import { textWithin } from "../core/textWithin.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host, Listener } from "../platform/host.ts";
import { fetchOver, reply, serveHttp } from "./http.ts";
import { printable } from "./printable.ts";
import type { StatusSnapshot } from "./status.ts";

/** A question is a line, an order is a sentence. */
const MAX_BODY_BYTES = 4096;
/** Longest that `drain` may take on the server's side. */
const REQUEST_MS = 120 * SECOND_MS;
const CONNECT_MS = 2 * SECOND_MS;

/**
 * The names that a request may ask for. The socket is a file, but who forwards it to a port (`ssh -L`, socat) has opened it
 * to every page of a browser there that has its own name resolve to 127.0.0.1.
 */
const OWN_HOST = /^(?:vmmesh|localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?$/i;

/** What the agent does when asked over its admin socket. */
export interface AdminHandlers {
  status(): Promise<StatusSnapshot>;
  /** Tells the mesh that this workload is unhealthy, because of `reason`; `leave` begins with it. */
  unhealthy(reason: string): Promise<void>;
  /** Lets Envoy finish what it has; resolves when it has. */
  drain(): Promise<void>;
}

export interface AdminDeps {
  readonly clock: Pick<Host["clock"], "sleep">;
  /** The socket's mode decides who may ask: everybody who can open it may do everything here. */
  readonly listen: (onConnection: (socket: Duplex) => void) => Promise<Listener>;
  readonly handlers: AdminHandlers;
  readonly onListening?: () => void;
}

/** Serves `GET /status`, `POST /health/unhealthy` (body: `{"reason": …}`) and `POST /drain` until `signal` aborts. */
export async function serveAdmin(deps: AdminDeps, signal: AbortSignal): Promise<void> {
  const routes: Record<string, (request: IncomingMessage) => Promise<unknown>> = {
    "GET /status": () => deps.handlers.status(),
    "POST /health/unhealthy": async (request) => deps.handlers.unhealthy(await readReason(request)),
    "POST /drain": () => deps.handlers.drain(),
  };
  await serveHttp(
    {
      clock: deps.clock,
      maxConnections: 16,
      requestMs: REQUEST_MS,
      listen: deps.listen,
      ...(deps.onListening === undefined ? {} : { onListening: deps.onListening }),
    },
    async (request, response) => {
      const headers = { "content-type": "application/json" };
      const { host = "" } = request.headers;
      if (!OWN_HOST.test(host)) {
        const error = `this is not the server of ${JSON.stringify(printable(host))}: ask for localhost`;
        return reply(response, 421, JSON.stringify({ error }), { ...headers, connection: "close" });
      }
      const route = routes[`${request.method} ${request.url}`];
      if (route === undefined)
        return reply(response, 404, JSON.stringify({ error: "no such question" }), headers);
      try {
        reply(response, 200, JSON.stringify((await route(request)) ?? {}), headers);
      } catch (thrown) {
        const { code, message, next } = VmmeshError.from(thrown);
        reply(
          response,
          code === "USAGE" ? 400 : 500,
          JSON.stringify({ error: message, code, next }),
          headers,
        );
      }
    },
    signal,
  );
}

async function readReason(request: IncomingMessage): Promise<string> {
  const reason = fieldOf(await readBody(request, MAX_BODY_BYTES), "reason");
  if (reason === undefined) throw new VmmeshError("USAGE", "no reason was given");
  return reason;
}

function readBody(message: IncomingMessage, maxBytes: number): Promise<string> {
  return textWithin(
    message,
    maxBytes,
    () => new VmmeshError("USAGE", `more than ${maxBytes} bytes were sent`),
  );
}

/** Parses JSON; the other side's texts end on root's terminal, where an escape sequence of a broken agent would be obeyed. */
function withoutControls(json: string): unknown {
  return JSON.parse(json, (_, value: unknown) => (typeof value === "string" ? printable(value) : value));
}

/** A field of a JSON object if it is a text. */
function fieldOf(json: string, name: string): string | undefined {
  try {
    const value = (withoutControls(json) as Record<string, unknown> | null)?.[name];
    return typeof value === "string" ? value : undefined;
  } catch {
    return undefined;
  }
}

/** The agent's own words are short; a status with 1,000 conditions still fits. */
const MAX_REPLY_BYTES = 1024 * 1024;

/**
 * The same three, asked from another process. Every method
 * @throws {VmmeshError} UNIT_FAILED if the agent does not run or does not answer, NOT_ROOT if this user may not ask it
 */
export function adminClient(
  net: Pick<Host["net"], "connectUnix">,
  socketPath: string,
  clock: Pick<Host["clock"], "sleep">,
): AdminHandlers {
  const ask = async (
    method: "GET" | "POST",
    path: string,
    timeoutMs: number,
    body?: object,
  ): Promise<string> => {
    let socket: Duplex;
    try {
      socket = await net.connectUnix(socketPath, { timeoutMs: CONNECT_MS });
    } catch (thrown) {
      throw unreachable(thrown, socketPath);
    }
    const scope = new AbortController();
    let late = false;
    clock.sleep(timeoutMs, scope.signal).then(
      () => {
        late = true;
        socket.destroy();
      },
      () => undefined,
    );
    try {
      const headers = { host: "vmmesh", "content-type": "application/json" };
      const text = body === undefined ? {} : { body: JSON.stringify(body) };
      const response = await fetchOver(socket, { method, path, headers, ...text });
      const answer = await readBody(response, MAX_REPLY_BYTES);
      if (response.statusCode === 200) return answer;
      throw new VmmeshError(
        "UNIT_FAILED",
        fieldOf(answer, "error") ?? `the agent answered with status ${response.statusCode}`,
        {
          next: fieldOf(answer, "next") ?? SEE_JOURNAL,
        },
      );
    } catch (thrown) {
      if (thrown instanceof VmmeshError) throw thrown;
      const why = late
        ? `did not answer within ${timeoutMs / SECOND_MS} s`
        : `broke off: ${messageOf(thrown)}`;
      throw new VmmeshError("UNIT_FAILED", `the agent ${why}`, { next: SEE_JOURNAL, cause: thrown });
    } finally {
      scope.abort();
      socket.destroy();
    }
  };
  return {
    status: async () => withoutControls(await ask("GET", "/status", 5 * SECOND_MS)) as StatusSnapshot,
    unhealthy: async (reason) => void (await ask("POST", "/health/unhealthy", 10 * SECOND_MS, { reason })),
    drain: async () => void (await ask("POST", "/drain", REQUEST_MS)),
  };
}

const SEE_JOURNAL = "Run `journalctl -u vmmesh-agent -n 50` to see why.";

function unreachable(thrown: unknown, socketPath: string): VmmeshError {
  const code = (thrown as NodeJS.ErrnoException).code;
  if (code === "EACCES" || code === "EPERM") {
    return new VmmeshError("NOT_ROOT", `this user may not open ${socketPath}`, {
      next: "Run the same command with sudo.",
      cause: thrown,
    });
  }
  return new VmmeshError("UNIT_FAILED", "the agent does not run", {
    next: "Run `systemctl status vmmesh-agent`; if this machine has not joined a mesh yet, run `vmmesh join`.",
    cause: thrown,
  });
}
