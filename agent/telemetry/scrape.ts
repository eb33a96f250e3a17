import { once } from "node:events";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { Duplex } from "node:stream";
import { VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host, Listener } from "../platform/host.ts";
import { Exposition } from "./exposition.ts";
import { fetchOver, reply, serveHttp } from "./http.ts";
import type { TlsDoor } from "./tls.ts";

/** More of one application body is cut off at the last whole line (Istio's limit). */
const MAX_APP_BYTES = 10 * 1024 * 1024;
const MAX_URL_CHARS = 2048;
const MAX_CONNECTIONS = 64;
/** Merges that run at once; Prometheus needs one. */
const MAX_SCRAPES = 4;
/** If the scraper does not say how long it waits: Prometheus' own default. */
const DEFAULT_TIMEOUT_MS = 10 * SECOND_MS;
const MAX_TIMEOUT_MS = 60 * SECOND_MS;
/** Parameters of Envoy's /stats/prometheus that a scraper may set. */
const ENVOY_PARAMETERS = ["usedonly", "filter", "text_readouts", "histogram_buckets"];
/** Ports of the mesh itself: scraping them would loop or lead past the limits of this server. */
const RESERVED_PORTS = [15000, 15001, 15004, 15006, 15008, 15020, 15021, 15053, 15090];

/** Where the application shows its metrics; always on this machine. */
export interface AppTarget {
  readonly port: number;
  readonly path: string;
}

/**
 * Reads ISTIO_PROMETHEUS_ANNOTATIONS: `{"scrape":"true","path":"/metrics","port":"9090","targets":[{"port":…,"path":…}]}`,
 * all values strings. `scrape` other than "false" is yes, port defaults to 80, path to /metrics (ch. 5.2).
 *
 * @returns no targets if there is no annotation
 * @throws {VmmeshError} CONFIG_MALFORMED naming the value
 */
export function parseAppTargets(json: string | undefined): AppTarget[] {
  if (json === undefined || json.trim() === "") return [];
  const malformed = (why: string, cause?: unknown): VmmeshError =>
    new VmmeshError("CONFIG_MALFORMED", `ISTIO_PROMETHEUS_ANNOTATIONS: ${why}`, {
      next: 'Write it as {"scrape":"true","port":"9090","path":"/metrics"}.',
      ...(cause === undefined ? {} : { cause }),
    });
  let parsed: unknown;
  try {
    parsed = JSON.parse(json);
  } catch (thrown) {
    throw malformed("is not JSON", thrown);
  }
  const fieldsOf = (value: unknown): Record<string, unknown> => {
    if (typeof value !== "object" || value === null || Array.isArray(value))
      throw malformed("is not an object");
    return value as Record<string, unknown>;
  };
  const top = fieldsOf(parsed);
  // JSON can bring an object whose toString is no function: String() would throw.
  const textOf = (key: string, value: unknown): string => {
    if (!["string", "number", "boolean"].includes(typeof value)) throw malformed(`\`${key}\` is not a text`);
    return String(value);
  };
  if (textOf("scrape", top["scrape"] ?? "true").toLowerCase() === "false") return [];
  const list = Array.isArray(top["targets"]) && top["targets"].length > 0 ? top["targets"] : [top];
  return list.map((entry) => {
    const fields = fieldsOf(entry);
    const text = (key: string, fallback: string): string => {
      const value = fields[key] ?? "";
      return value === "" ? fallback : textOf(key, value);
    };
    const portText = text("port", "80");
    const port = Number(portText);
    if (!/^\d{1,5}$/.test(portText) || port < 1 || port > 65535)
      throw malformed(`port \`${portText}\` is not a port`);
    if (RESERVED_PORTS.includes(port)) throw malformed(`port ${port} belongs to the mesh itself`);
    const path = text("path", "/metrics");
    if (!/^[\x21-\x7e]+$/.test(path)) throw malformed(`path \`${path}\` is not a path`);
    return { port, path: path.startsWith("/") ? path : `/${path}` };
  });
}

export type ScrapePart = "agent" | "envoy" | "application";

export interface ScrapeDeps {
  readonly host: Pick<Host, "net" | "clock">;
  /** 15020, on all addresses. */
  readonly port: number;
  readonly agentMetrics: () => Promise<string>;
  /** With it metrics are served by TLS only; readiness, which Envoy asks for in plain text, either way. */
  readonly tls?: TlsDoor | undefined;
  /** Unix socket of Envoy's admin interface; undefined leaves Envoy out. */
  readonly envoyAdminSocket: string | undefined;
  readonly app: readonly AppTarget[];
  /** What readiness still waits for; empty is ready. */
  readonly waitingFor: () => readonly string[];
  readonly onScrape?: () => void;
  readonly onFailure?: (part: ScrapePart, cause: unknown) => void;
  readonly onListening?: () => void;
}

/**
 * The one port toward the network, until `signal` aborts: `/stats/prometheus` and `/metrics` (agent, Envoy and
 * application in one), `/healthz/ready`. Everything else is 404; nothing here changes anything.
 *
 * The Host header is checked for its form only: what is served is meant for whoever may reach the port, and scrapers
 * come by addresses and names that this machine does not know.
 *
 * @throws the errno error of bind(2)
 */
export async function serveScrape(deps: ScrapeDeps, signal: AbortSignal): Promise<void> {
  const { tls } = deps;
  let running = 0;
  const handle = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const url = request.url ?? "";
    if (request.method !== "GET") return reply(response, 405, "", { allow: "GET", connection: "close" });
    if (url.length > MAX_URL_CHARS) return reply(response, 414);
    if (!/^[\w.-]{1,253}(:\d{1,5})?$|^\[[\da-fA-F:.]{2,45}\](:\d{1,5})?$/.test(request.headers.host ?? "")) {
      return reply(response, 400);
    }
    const [path, query = ""] = url.split("?", 2);
    if (path === "/healthz/ready") {
      const waiting = deps.waitingFor();
      return reply(
        response,
        waiting.length === 0 ? 200 : 503,
        waiting.map((name) => `waiting for ${name}\n`).join(""),
      );
    }
    if (path !== "/stats/prometheus" && path !== "/metrics") return reply(response, 404);
    if (tls !== undefined && !("encrypted" in request.socket))
      return reply(response, 403, "metrics are served by TLS here: scrape with `scheme: https`\n");
    if (running >= MAX_SCRAPES) return reply(response, 503, "too many scrapes at once\n");
    running += 1;
    try {
      await merge(deps, request, query, response);
    } finally {
      running -= 1;
    }
  };
  await serveHttp(
    {
      clock: deps.host.clock,
      maxConnections: MAX_CONNECTIONS,
      requestMs: MAX_TIMEOUT_MS + 5 * SECOND_MS,
      listen: (onConnection) => listenEverywhere(deps.host.net, deps.port, onConnection),
      ...(tls === undefined ? {} : { unwrap: (socket: Duplex) => tls.open(socket) }),
      ...(deps.onListening === undefined ? {} : { onListening: deps.onListening }),
    },
    handle,
    signal,
  );
}

/** `::` takes IPv4 too (bindv6only is off by default); without IPv6 there is 0.0.0.0. */
async function listenEverywhere(
  net: Host["net"],
  port: number,
  onConnection: (socket: Duplex) => void,
): Promise<Listener> {
  try {
    return await net.listenTcp("::", port, onConnection);
  } catch (thrown) {
    if (!["EAFNOSUPPORT", "EADDRNOTAVAIL"].includes((thrown as NodeJS.ErrnoException).code ?? ""))
      throw thrown;
    return net.listenTcp("0.0.0.0", port, onConnection);
  }
}

async function merge(
  deps: ScrapeDeps,
  request: IncomingMessage,
  query: string,
  response: ServerResponse,
): Promise<void> {
  deps.onScrape?.();
  const timeoutMs = timeoutOf(request);
  const scope = new AbortController();
  response.on("close", () => scope.abort());
  // Nobody waits for the clock itself: it ends what the sub-scrapes wait for.
  deps.host.clock.sleep(timeoutMs, scope.signal).then(
    () => scope.abort(new Error(`no complete answer within ${timeoutMs} ms`)),
    () => undefined,
  );
  const failed = (part: ScrapePart) => (cause: unknown) => deps.onFailure?.(part, cause);
  const body = new Body(response, new Exposition(), scope.signal);
  // All are asked at once; each is read when it is its turn, and until then its own socket holds it back.
  const envoy =
    deps.envoyAdminSocket === undefined ? undefined : askEnvoy(deps, query, timeoutMs, scope.signal);
  const apps = deps.app.map((target) => askApp(deps, target, request, timeoutMs, scope.signal));
  for (const asked of [envoy, ...apps]) asked?.catch(() => undefined);

  response.writeHead(200, { "content-type": "text/plain; version=0.0.4; charset=utf-8" });
  try {
    await deps
      .agentMetrics()
      .then((text) => body.text(text))
      .catch(failed("agent"));
    if (envoy !== undefined) await body.from(envoy, Number.POSITIVE_INFINITY).catch(failed("envoy"));
    for (const app of apps) await body.from(app, MAX_APP_BYTES).catch(failed("application"));
  } finally {
    response.end();
    scope.abort();
  }
}

/** Nine tenths of what the scraper says it waits: a part that hangs must not cost it the others. */
function timeoutOf(request: IncomingMessage): number {
  const seconds = Number(request.headers["x-prometheus-scrape-timeout-seconds"]);
  if (!(seconds > 0)) return DEFAULT_TIMEOUT_MS * 0.9;
  return Math.min(seconds * SECOND_MS, MAX_TIMEOUT_MS) * 0.9;
}

/** The response as it grows. */
class Body {
  readonly #response: ServerResponse;
  readonly #exposition: Exposition;
  readonly #signal: AbortSignal;

  constructor(response: ServerResponse, exposition: Exposition, signal: AbortSignal) {
    this.#response = response;
    this.#exposition = exposition;
    this.#signal = signal;
  }

  async text(text: string): Promise<void> {
    const part = this.#exposition.part(false);
    await this.#write(part.push(Buffer.from(text)));
    await this.#write(part.end());
  }

  /**
   * Copies a body as it comes, no faster than the scraper reads.
   * @throws whatever ended it early, or an Error if it was cut off at `maxBytes`; its whole lines are written by then
   */
  async from(asked: Promise<IncomingMessage>, maxBytes: number): Promise<void> {
    const source = await asked;
    const openMetrics = source.headers["content-type"]?.startsWith("application/openmetrics-text") ?? false;
    const part = this.#exposition.part(openMetrics);
    let room = maxBytes;
    for await (const chunk of source as AsyncIterable<Buffer>) {
      await this.#write(part.push(chunk.length > room ? chunk.subarray(0, room) : chunk));
      room -= chunk.length;
      if (room < 0) throw new Error(`more than ${maxBytes} bytes: cut off`);
    }
    await this.#write(part.end());
  }

  async #write(pieces: readonly Buffer[]): Promise<void> {
    this.#signal.throwIfAborted();
    for (const bytes of pieces) {
      if (bytes.length === 0 || this.#response.write(bytes)) continue;
      await once(this.#response, "drain", { signal: this.#signal });
    }
  }
}

async function askEnvoy(
  deps: ScrapeDeps,
  query: string,
  timeoutMs: number,
  signal: AbortSignal,
): Promise<IncomingMessage> {
  const socket = await deps.host.net.connectUnix(deps.envoyAdminSocket ?? "", { timeoutMs });
  const passed = new URLSearchParams(
    [...new URLSearchParams(query)].filter(([name]) => ENVOY_PARAMETERS.includes(name)),
  ).toString();
  const path = `/stats/prometheus${passed === "" ? "" : `?${passed}`}`;
  return checked(socket, path, { host: "localhost" }, signal);
}

async function askApp(
  deps: ScrapeDeps,
  target: AppTarget,
  request: IncomingMessage,
  timeoutMs: number,
  signal: AbortSignal,
): Promise<IncomingMessage> {
  const { net } = deps.host;
  const socket = await net.connectTcp("127.0.0.1", target.port, { timeoutMs }).catch((thrown: unknown) => {
    if ((thrown as NodeJS.ErrnoException).code !== "ECONNREFUSED") throw thrown;
    return net.connectTcp("::1", target.port, { timeoutMs });
  });
  const headers: Record<string, string> = {
    host: `localhost:${target.port}`,
    accept: "text/plain;version=0.0.4;q=1,*/*;q=0.1",
  };
  for (const name of ["user-agent", "x-prometheus-scrape-timeout-seconds"]) {
    const value = request.headers[name];
    if (typeof value === "string") headers[name] = value;
  }
  return checked(socket, target.path, headers, signal);
}

/** A reply with status 200 whose socket ends with `signal`. */
async function checked(
  socket: Duplex,
  path: string,
  headers: Readonly<Record<string, string>>,
  signal: AbortSignal,
): Promise<IncomingMessage> {
  const destroy = (): void => {
    socket.destroy(signal.reason instanceof Error ? signal.reason : undefined);
  };
  socket.on("error", () => undefined);
  if (signal.aborted) destroy();
  signal.addEventListener("abort", destroy, { once: true });
  const source = await fetchOver(socket, { method: "GET", path, headers });
  if (source.statusCode !== 200) {
    socket.destroy();
    throw new Error(`${path} answered with status ${source.statusCode}`);
  }
  return source;
}
