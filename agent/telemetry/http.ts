import type { IncomingMessage, ServerResponse } from "node:http";
import type { Duplex } from "node:stream";
import { aborted } from "../core/signals.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host, Listener } from "../platform/host.ts";

// An `import` of node:http reads all its exports, WebSocket among them, and that loads a second HTTP client: 17 MB.
const { createServer, request } = process.getBuiltinModule("node:http");

/** How long a client may take to send its request head, and how long a connection may idle between requests. */
const HEAD_MS = 5 * SECOND_MS;
const MAX_HEADER_BYTES = 16 * 1024;

export interface HttpOptions {
  readonly clock: Pick<Host["clock"], "sleep">;
  /** Further connections are closed at once. */
  readonly maxConnections: number;
  /** From the whole head of a request to the end of its reply. */
  readonly requestMs: number;
  /** Opens the listener; may be called for several addresses. */
  readonly listen: (onConnection: (socket: Duplex) => void) => Promise<Listener>;
  /** Takes a layer off an accepted connection; if it cannot, that is closed. */
  readonly unwrap?: (socket: Duplex) => Promise<Duplex>;
  readonly onListening?: () => void;
}

/**
 * Serves HTTP/1.1 on sockets of the seam until `signal` aborts. A handler that throws costs its own request only.
 *
 * Node's own header and request timeouts are driven by its own listener, which is not used here, hence ours.
 */
export async function serveHttp(
  options: HttpOptions,
  handle: (request: IncomingMessage, response: ServerResponse) => Promise<void>,
  signal: AbortSignal,
): Promise<void> {
  const deadlines = new WeakMap<Duplex, (ms: number) => void>();
  const server = createServer({ maxHeaderSize: MAX_HEADER_BYTES, requireHostHeader: true });
  server.on("request", (incoming, response) => {
    deadlines.get(incoming.socket)?.(options.requestMs);
    response.on("close", () => deadlines.get(incoming.socket)?.(HEAD_MS));
    handle(incoming, response).catch(() => {
      if (response.headersSent) response.destroy();
      else response.writeHead(500).end();
    });
  });
  const sockets = new Set<Duplex>();
  await using _listener = await options.listen((socket) => {
    if (sockets.size >= options.maxConnections) {
      socket.on("error", () => undefined).destroy();
      return;
    }
    sockets.add(socket);
    let timer = new AbortController();
    const setDeadline = (ms: number): void => {
      timer.abort();
      timer = new AbortController();
      if (socket.destroyed) return;
      options.clock.sleep(ms, timer.signal).then(
        () => socket.destroy(),
        () => undefined,
      );
    };
    setDeadline(HEAD_MS);
    socket.on("error", () => socket.destroy());
    socket.on("close", () => {
      timer.abort();
      sockets.delete(socket);
    });
    const serve = (inner: Duplex): void => {
      deadlines.set(inner, setDeadline);
      server.emit("connection", inner);
    };
    if (options.unwrap === undefined) serve(socket);
    else options.unwrap(socket).then(serve, () => socket.destroy());
  });
  options.onListening?.();
  await aborted(signal);
  for (const socket of sockets) socket.destroy();
}

/** Ends a response with a short text, or nothing. */
export function reply(
  response: ServerResponse,
  status: number,
  text = "",
  headers: Readonly<Record<string, string>> = {},
): void {
  response.writeHead(status, { "content-type": "text/plain; charset=utf-8", ...headers }).end(text);
}

/** Sends one request over `socket`, which is then used up, and resolves with the head of the reply. The caller reads or destroys it. */
export function fetchOver(
  socket: Duplex,
  options: {
    readonly method: "GET" | "POST";
    readonly path: string;
    readonly headers: Readonly<Record<string, string>>;
    readonly body?: string;
  },
): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    const { method, path, headers } = options;
    const outgoing = request(
      { createConnection: () => socket, method, path, headers: { ...headers, connection: "close" } },
      resolve,
    );
    outgoing.on("error", reject);
    outgoing.end(options.body);
  });
}
