import { type IncomingMessage, request } from "node:http";
import type { Readable } from "node:stream";
import { messageOf, VmmeshError } from "../core/errors.ts";
import { PORTS } from "../core/paths.ts";
import { textWithin } from "../core/textWithin.ts";
import type { Host } from "../platform/host.ts";
import { type EnvoyVersion, parseEnvoyVersion } from "./version.ts";

/** How long Envoy may take for an answer. Its admin runs on the main thread, which a large update can hold for seconds. */
const TIMEOUT_MS = 5_000;

/** Statistics that were asked for by name and one dump without its resources: what is more is not an answer to us. */
const MAX_TEXT_BYTES = 16 * 1024 * 1024;

export type EnvoyReadiness = { readonly ready: true } | { readonly ready: false; readonly reason: string };

/** A resource that Envoy refused; its older version, if there was one, stays in force. */
export interface Rejection {
  /** `0.0.0.0_80` */
  readonly name: string;
  /** Envoy's words. */
  readonly reason: string;
  /** Of the version that was refused; empty if the control plane gave none. */
  readonly version: string;
}

export interface EnvoyStatsQuery {
  /** Part after `?`, without it: `usedonly&filter=…`; handed on as it is. */
  readonly query?: string;
}

/** Envoy's administration interface on its unix socket. Each call makes a connection of its own. */
export class EnvoyAdmin {
  readonly #net: Pick<Host["net"], "connectUnix">;
  readonly #socket: string;
  readonly #timeoutMs: number;

  constructor(net: Pick<Host["net"], "connectUnix">, socket: string, timeoutMs: number = TIMEOUT_MS) {
    this.#net = net;
    this.#socket = socket;
    this.#timeoutMs = timeoutMs;
  }

  /**
   * Whether Envoy has its listeners and serves. Never rejects: an Envoy that does not answer is not ready.
   *
   * Ready is: clusters and listeners were each accepted once, the state is LIVE and the workers run. State is read from
   * `/ready`; the statistic `server.state` that Istio's agent reads is 0, which means LIVE, from the start until the
   * first flush (seen with 1.40).
   */
  async readiness(signal?: AbortSignal): Promise<EnvoyReadiness> {
    try {
      const stats = await this.#counters(
        String.raw`^(cluster_manager\.cds|listener_manager\.lds)\.(update_success|update_rejected)$|^listener_manager\.workers_started$`,
        signal,
      );
      const missing = await this.#missingConfig(stats, signal);
      if (missing !== undefined) return { ready: false, reason: missing };
      const state = (await this.#text("GET", "/ready", signal, [200, 503])).trim();
      if (state !== "LIVE")
        return { ready: false, reason: `Envoy is ${state.toLowerCase().replaceAll("_", "-")}` };
      if (stats.get("listener_manager.workers_started") !== 1) {
        return { ready: false, reason: "Envoy's workers have not started" };
      }
      return { ready: true };
    } catch (thrown) {
      return { ready: false, reason: `Envoy does not answer: ${messageOf(thrown)}` };
    }
  }

  /** Listeners whose last update Envoy refused, with its words. */
  async rejectedListeners(signal?: AbortSignal): Promise<Rejection[]> {
    const text = await this.#text(
      "GET",
      "/config_dump?resource=dynamic_listeners&mask=name,error_state",
      signal,
    );
    const dump = JSON.parse(text) as {
      configs?: { name?: string; error_state?: { details?: string; version_info?: string } }[];
    };
    return (dump.configs ?? []).flatMap(({ name = "", error_state: error }) =>
      error?.details === undefined
        ? []
        : [{ name, reason: error.details, version: error.version_info ?? "" }],
    );
  }

  /** `/stats/prometheus` as it comes; the caller reads it to its end or destroys it. */
  async prometheus({ query }: EnvoyStatsQuery = {}, signal?: AbortSignal): Promise<Readable> {
    return this.#open("GET", `/stats/prometheus${query === undefined ? "" : `?${query}`}`, signal);
  }

  async version(signal?: AbortSignal): Promise<EnvoyVersion> {
    const info = JSON.parse(await this.#text("GET", "/server_info", signal)) as { version?: string };
    const version = parseEnvoyVersion(`version: ${info.version ?? ""}`);
    if (version === undefined) throw refusal("/server_info", `it calls its version \`${info.version}\``);
    return version;
  }

  /** Closes the inbound listeners and asks their clients to leave; what goes out stays as it is. Cannot be undone. */
  async drainInbound(signal?: AbortSignal): Promise<void> {
    await this.#text("POST", "/drain_listeners?inboundonly&graceful", signal);
  }

  /** Connections that applications and peers hold through Envoy now; the admin, status and scrape ports are left out. */
  async activeConnections(signal?: AbortSignal): Promise<number> {
    const own = new RegExp(
      String.raw`^listener\.(admin|.+_(${PORTS.readiness}|${PORTS.envoyPrometheus}))\.|\.(worker_\d+|main_thread)\.`,
    );
    let sum = 0;
    for (const [name, value] of await this.#counters(
      String.raw`^listener\..*downstream_cx_active$`,
      signal,
    )) {
      if (!own.test(name)) sum += value;
    }
    return sum;
  }

  async #missingConfig(
    stats: ReadonlyMap<string, number>,
    signal?: AbortSignal,
  ): Promise<string | undefined> {
    const [clusters = 0, noClusters = 0] = ["success", "rejected"].map((it) =>
      stats.get(`cluster_manager.cds.update_${it}`),
    );
    const [listeners = 0, noListeners = 0] = ["success", "rejected"].map((it) =>
      stats.get(`listener_manager.lds.update_${it}`),
    );
    if (clusters > 0 && listeners > 0) return undefined;
    if (clusters === 0 && noClusters > 0) return "clusters rejected: see Envoy's log for the reason";
    if (listeners === 0 && noListeners > 0) {
      const [first, ...others] = await this.rejectedListeners(signal);
      if (first === undefined) return "listeners rejected: see Envoy's log for the reason";
      return `rejected: listener ${first.name}: ${first.reason}${others.length > 0 ? ` (and ${others.length} more)` : ""}`;
    }
    if (clusters > 0) return "clusters received from the control plane, listeners not yet";
    return "config not received from the control plane";
  }

  /** Counters and gauges whose names match; histograms are passed over. */
  async #counters(filter: string, signal?: AbortSignal): Promise<Map<string, number>> {
    const text = await this.#text("GET", `/stats?filter=${encodeURIComponent(filter)}`, signal);
    const found = new Map<string, number>();
    for (const line of text.split("\n")) {
      const at = line.lastIndexOf(": ");
      const value = Number(line.slice(at + 2));
      if (at > 0 && Number.isFinite(value)) found.set(line.slice(0, at), value);
    }
    return found;
  }

  async #text(
    method: "GET" | "POST",
    path: string,
    signal?: AbortSignal,
    accepted?: readonly number[],
  ): Promise<string> {
    const message = await this.#open(method, path, signal, accepted);
    return textWithin(message, MAX_TEXT_BYTES, () => refusal(path, `more than ${MAX_TEXT_BYTES} bytes`));
  }

  async #open(
    method: "GET" | "POST",
    path: string,
    signal?: AbortSignal,
    accepted: readonly number[] = [200],
  ): Promise<IncomingMessage> {
    const timeout = AbortSignal.timeout(this.#timeoutMs);
    const socket = await this.#net.connectUnix(this.#socket, { timeoutMs: this.#timeoutMs });
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      const sent = request({
        method,
        path,
        host: "envoy",
        // With it and without an agent nothing is pooled: a dead Envoy's socket is never met again.
        createConnection: () => socket,
        signal: signal === undefined ? timeout : AbortSignal.any([signal, timeout]),
      });
      sent.once("response", resolve).once("error", reject).end();
    });
    if (accepted.includes(response.statusCode ?? 0)) return response;
    response.destroy();
    throw refusal(path, `status ${response.statusCode}`);
  }
}

function refusal(path: string, how: string): VmmeshError {
  return new VmmeshError(
    "NOT_READY",
    `Envoy's admin answered ${path} with something else than expected: ${how}`,
    {
      next: "Look at Envoy's log: journalctl -u vmmesh-envoy.",
    },
  );
}
