import {
  LOG_TYPE,
  type LoggedCommon,
  type LoggedConnection,
  type LoggedRequest,
} from "../proto/accessLog.ts";
import { type LabelFacts, labelsOf } from "./istioLabels.ts";

/** Envoy's own buckets, which Istio's Envoy has for these metrics. */
const BUCKETS = [
  ...[0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 600_000],
  ...[1_800_000, 3_600_000],
];
/** Label sets of requests, and of connections. A machine talks to few services; a set of requests takes 60 kB of a scrape. */
const MAX_SERIES = 500;
/** Ways to the label sets that are remembered: one for each peer address. */
const MAX_KEYS = 4000;
/** A longer way is found anew each time: a peer may say of itself as much as Envoy takes of headers (60 KiB). */
const MAX_KEY_CHARS = 4096;
/** The codes of gRPC are 0 to 16; what else a peer says is none. */
const GRPC_STATUS = /^\d{1,2}$/;
/** Open TCP connections whose bytes are told while they last; those of others come when they end. */
const MAX_OPEN = 65_536;
const CONNECTION_LOGS: readonly number[] = [LOG_TYPE.periodic, LOG_TYPE.connectionEnd, LOG_TYPE.none];
/** Between fields of a key; in none of them. */
const SEPARATOR = "\n";

class Histogram {
  readonly #counts = new Float64Array(BUCKETS.length + 1);
  #sum = 0;

  observe(value: number): void {
    const at = BUCKETS.findIndex((bound) => value <= bound);
    const index = at < 0 ? BUCKETS.length : at;
    this.#counts[index] = (this.#counts[index] ?? 0) + 1;
    this.#sum += value;
  }

  render(name: string, labels: string): string {
    let total = 0;
    const lines = [...BUCKETS, "+Inf"].map((bound, index) => {
      total += this.#counts[index] ?? 0;
      return `${name}_bucket{${labels},le="${bound}"} ${total}\n`;
    });
    return `${lines.join("")}${name}_sum{${labels}} ${this.#sum}\n${name}_count{${labels}} ${total}\n`;
  }
}

interface RequestSeries {
  readonly labels: string;
  count: number;
  readonly duration: Histogram;
  readonly requestBytes: Histogram;
  readonly responseBytes: Histogram;
}

interface ConnectionSeries {
  readonly labels: string;
  opened: number;
  closed: number;
  received: number;
  sent: number;
}

export interface IstioStatsDeps extends LabelFacts {
  /** When the count begins. */
  readonly since: Date;
  /** Connections to these addresses are vmmesh's own; they count for nothing. */
  readonly ownProbes: readonly string[];
  /** Not counted, because there are too many label sets already. */
  onDropped(): void;
}

type Direction = "inbound" | "outbound";

/**
 * Istio's standard metrics, counted from Envoy's access log.
 * @see https://istio.io/latest/docs/reference/config/metrics/
 *
 * The labels of an entry are worked out once for each way that it can look, not for each entry. Everything is bounded:
 * what is beyond is dropped, and that is counted.
 */
export class IstioStats {
  readonly #deps: IstioStatsDeps;
  readonly #requests = new Table(newRequestSeries);
  readonly #connections = new Table(newConnectionSeries);
  /** Stream → bytes that have been counted of a connection that is open. */
  readonly #open = new Map<string, { received: number; sent: number }>();

  constructor(deps: IstioStatsDeps) {
    this.#deps = deps;
  }

  request(direction: Direction, entry: LoggedRequest): void {
    if (entry.type !== LOG_TYPE.requestEnd && entry.type !== LOG_TYPE.none) return;
    const contentType = entry.requestHeaders.get("content-type") ?? "";
    const grpc = contentType.startsWith("application/grpc");
    const peerSays = entry.requestHeaders.get("x-envoy-peer-metadata") ?? "";
    const grpcStatus = GRPC_STATUS.test(entry.grpcStatus) ? entry.grpcStatus : "";
    const key = [keyOf(direction, entry), entry.responseCode, grpc, grpcStatus, peerSays].join(SEPARATOR);
    const series = this.#requests.find(key, () => ({
      ...labelsOf(this.#deps, direction, entry),
      request_protocol: grpc ? "grpc" : "http",
      response_code: String(entry.responseCode),
      ...(grpc ? { grpc_response_status: grpcStatus } : {}),
    }));
    if (series === undefined) {
      this.#deps.onDropped();
      return;
    }
    series.count += 1;
    series.duration.observe(entry.durationMs);
    series.requestBytes.observe(entry.requestBytes);
    series.responseBytes.observe(entry.responseBytes);
  }

  connection(direction: Direction, entry: LoggedConnection): void {
    if (!CONNECTION_LOGS.includes(entry.type) || this.#deps.ownProbes.includes(entry.localAddress)) return;
    const series = this.#connections.find(keyOf(direction, entry), () => ({
      ...labelsOf(this.#deps, direction, entry),
      request_protocol: "tcp",
    }));
    if (series === undefined) {
      this.#deps.onDropped();
      return;
    }
    const { streamId, type, receivedBytes: received, sentBytes: sent } = entry;
    const known = this.#open.get(streamId);
    // Of one that is older than this count it is not known what the agent before has counted.
    const before = known ?? (entry.startedMs < this.#deps.since.getTime() ? { received, sent } : undefined);
    if (type === LOG_TYPE.periodic) {
      // Without room, or a name for it, everything is counted at its end.
      if (known === undefined && (streamId === "" || this.#open.size >= MAX_OPEN)) return;
      this.#open.set(streamId, { received, sent });
    } else {
      this.#open.delete(streamId);
      series.closed += 1;
    }
    if (before === undefined) series.opened += 1;
    series.received += Math.max(0, received - (before?.received ?? 0));
    series.sent += Math.max(0, sent - (before?.sent ?? 0));
  }

  /** Prometheus' text format 0.0.4; a family that has no series is left out. */
  render(): string {
    const requests = this.#requests.all();
    const connections = this.#connections.all();
    return [
      counters("istio_requests_total", "Requests.", requests, ({ count }) => count),
      ...(
        [
          ["istio_request_duration_milliseconds", "Duration of requests.", "duration"],
          ["istio_request_bytes", "Sizes of request bodies.", "requestBytes"],
          ["istio_response_bytes", "Sizes of response bodies.", "responseBytes"],
        ] as const
      ).map(([name, help, of]) =>
        family(name, "histogram", help, requests, (series) => series[of].render(name, series.labels)),
      ),
      ...(
        [
          ["istio_tcp_connections_opened_total", "Opened TCP connections.", "opened"],
          ["istio_tcp_connections_closed_total", "Closed TCP connections.", "closed"],
          ["istio_tcp_received_bytes_total", "Bytes of requests of TCP connections.", "received"],
          ["istio_tcp_sent_bytes_total", "Bytes of responses of TCP connections.", "sent"],
        ] as const
      ).map(([name, help, of]) => counters(name, help, connections, (series) => series[of])),
    ].join("");
  }
}

/** Series by their labels, found by a key that is cheaper to make than the labels are. */
class Table<S> {
  readonly #byKey = new Map<string, S>();
  readonly #byLabels = new Map<string, S>();
  readonly #make: (labels: string) => S;

  constructor(make: (labels: string) => S) {
    this.#make = make;
  }

  /** undefined: there are too many. */
  find(key: string, labelsOfIt: () => Readonly<Record<string, string>>): S | undefined {
    const known = this.#byKey.get(key);
    if (known !== undefined) return known;
    const labels = Object.entries(labelsOfIt())
      .map(([name, value]) => `${name}="${escaped(value)}"`)
      .join(",");
    let series = this.#byLabels.get(labels);
    if (series === undefined) {
      if (this.#byLabels.size >= MAX_SERIES) return undefined;
      series = this.#make(labels);
      this.#byLabels.set(labels, series);
    }
    if (key.length > MAX_KEY_CHARS) return series;
    if (this.#byKey.size >= MAX_KEYS) this.#byKey.clear();
    this.#byKey.set(key, series);
    return series;
  }

  all(): readonly S[] {
    return [...this.#byLabels.values()];
  }
}

/** All that the labels of any entry come from. */
function keyOf(direction: Direction, entry: LoggedCommon): string {
  const { tags, localPrincipal, peerPrincipal, peerAddress, upstreamCluster, responseFlags } = entry;
  return [
    ...[direction, localPrincipal, peerPrincipal, direction === "inbound" ? peerAddress : ""],
    ...[upstreamCluster, responseFlags, tags.get("services"), tags.get("workload"), tags.get("principal")],
  ].join(SEPARATOR);
}

function newRequestSeries(labels: string): RequestSeries {
  return {
    labels,
    count: 0,
    duration: new Histogram(),
    requestBytes: new Histogram(),
    responseBytes: new Histogram(),
  };
}

function newConnectionSeries(labels: string): ConnectionSeries {
  return { labels, opened: 0, closed: 0, received: 0, sent: 0 };
}

function counters<S extends { readonly labels: string }>(
  name: string,
  help: string,
  all: readonly S[],
  read: (series: S) => number,
): string {
  return family(name, "counter", help, all, (series) => `${name}{${series.labels}} ${read(series)}\n`);
}

function family<S>(
  name: string,
  type: "counter" | "histogram",
  help: string,
  all: readonly S[],
  render: (series: S) => string,
): string {
  if (all.length === 0) return "";
  return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${all.map(render).join("")}`;
}

/** Label values of the text format: backslash, quote and line break are escaped. */
function escaped(value: string): string {
  return value.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}
