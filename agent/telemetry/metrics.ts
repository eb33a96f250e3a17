// The parts, not the package: its index loads a push gateway, cluster support and collectors, 9 MB that nothing here uses.
import Counter from "prom-client/lib/counter.js";
import Gauge from "prom-client/lib/gauge.js";
import Histogram from "prom-client/lib/histogram.js";
import Registry from "prom-client/lib/registry.js";
import type { Host } from "../platform/host.ts";

/** One metric as data. Names that Istio's agent has are Istio's, so that its dashboards and alerts work (ch. 3.11 of the VM protocol). */
interface MetricRow {
  readonly name: string;
  readonly type: "counter" | "gauge" | "histogram";
  readonly help: string;
  readonly labels?: readonly string[];
  readonly buckets?: readonly number[];
}

/** Every metric of the agent, once. */
export const METRICS = {
  // DNS
  dnsRequests: {
    name: "istio_agent_dns_requests_total",
    type: "counter",
    help: "DNS queries received.",
  },
  dnsUpstreamRequests: {
    name: "istio_agent_dns_upstream_requests_total",
    type: "counter",
    help: "DNS queries forwarded to the machine's own resolvers.",
  },
  dnsUpstreamFailures: {
    name: "istio_agent_dns_upstream_failures_total",
    type: "counter",
    help: "Forwarded DNS queries that no resolver answered.",
  },
  dnsUpstreamDuration: {
    name: "istio_agent_dns_upstream_request_duration_seconds",
    type: "histogram",
    help: "Time until a resolver answered a forwarded DNS query.",
    buckets: [0.001, 0.005, 0.01, 0.1, 1, 5],
  },
  dnsUpstreamHealthy: {
    name: "vmmesh_dns_upstream_healthy",
    type: "gauge",
    help: "1 if this resolver answered lately, 0 if it is asked last or, being a loop, not at all.",
    labels: ["server"],
  },
  dnsUpstreamAttempts: {
    name: "vmmesh_dns_upstream_attempts_total",
    type: "counter",
    help: "Questions to each resolver, by whether it answered.",
    labels: ["server", "result"],
  },
  dnsNames: { name: "vmmesh_dns_names", type: "gauge", help: "Names in the mesh's DNS table." },
  dnsLeaseMisses: {
    name: "vmmesh_dns_lease_misses_total",
    type: "counter",
    help: "Seconds in which our DNS server did not answer our own question.",
  },
  // xDS
  istiodConnectionFailures: {
    name: "istio_agent_istiod_connection_failures",
    type: "counter",
    help: "Failed connection attempts to istiod.",
  },
  istiodConnectionTerminations: {
    name: "istio_agent_istiod_connection_terminations",
    type: "counter",
    help: "Ended connections to istiod.",
    labels: ["type"],
  },
  envoyConnectionTerminations: {
    name: "istio_agent_envoy_connection_terminations",
    type: "counter",
    help: "Ended xDS connections of Envoy.",
    labels: ["type"],
  },
  xdsRequests: {
    name: "istio_agent_xds_proxy_requests",
    type: "counter",
    help: "xDS requests of Envoy.",
  },
  xdsResponses: {
    name: "istio_agent_xds_proxy_responses",
    type: "counter",
    help: "xDS responses of istiod.",
  },
  xdsConnected: {
    name: "vmmesh_xds_connected",
    type: "gauge",
    help: "1 while the control plane is connected.",
  },
  xdsStale: {
    name: "vmmesh_xds_stale",
    type: "gauge",
    help: "1 while Envoy is served the configuration that was saved before this start, because no control plane answers.",
  },
  xdsReconnects: {
    name: "vmmesh_xds_reconnects_total",
    type: "counter",
    help: "Connections to the control plane after the first.",
  },
  xdsResources: {
    name: "vmmesh_xds_resources",
    type: "gauge",
    help: "Resources held for Envoy.",
    labels: ["type"],
  },
  xdsRejections: {
    name: "vmmesh_xds_rejections_total",
    type: "counter",
    help: "Updates that Envoy refused.",
    labels: ["type"],
  },
  xdsStripped: {
    name: "vmmesh_xds_stripped_extensions",
    type: "gauge",
    help: "1 for each extension of Istio's own that is taken out because this Envoy lacks it.",
    labels: ["name"],
  },
  istioStatsDropped: {
    name: "vmmesh_istio_stats_dropped_total",
    type: "counter",
    help: "Requests and TCP connections that no istio_* metric counts, because there are too many label sets.",
  },
  // identity
  certExpirySeconds: {
    name: "istio_agent_cert_expiry_seconds",
    type: "gauge",
    help: "Seconds until the certificate ends; negative when it has.",
    labels: ["resource_name"],
  },
  certRenewals: {
    name: "vmmesh_cert_renewals_total",
    type: "counter",
    help: "Certificate renewals.",
    labels: ["result"],
  },
  // capture
  captureRepairs: {
    name: "vmmesh_capture_repairs_total",
    type: "counter",
    help: "Times that the redirect rules were put right after a program had moved them, by its name.",
    labels: ["by"],
  },
  captureInForce: {
    name: "vmmesh_capture_in_force",
    type: "gauge",
    help: "1 while the redirect rules are complete and in order.",
  },
  fenceConnections: {
    name: "vmmesh_fence_connections",
    type: "gauge",
    help: "First segments that the fence refused, or let past Envoy as the failure policy allows, since it was loaded; at most 30 s old.",
    labels: ["direction", "what"],
  },
  // health and tasks
  conditions: {
    name: "vmmesh_conditions",
    type: "gauge",
    help: "1 for each condition that is raised now.",
    labels: ["id", "severity"],
  },
  taskRestarts: {
    name: "vmmesh_task_restarts_total",
    type: "counter",
    help: "Tasks of the agent that failed and were started again.",
    labels: ["task"],
  },
  startupDuration: {
    name: "istio_agent_startup_duration_seconds",
    type: "gauge",
    help: "Seconds from the start of the agent until it was ready the first time.",
  },
  // scraping
  scrapes: { name: "istio_agent_scrapes_total", type: "counter", help: "Scrapes of the merged metrics." },
  scrapeFailures: {
    name: "istio_agent_scrape_failures_total",
    type: "counter",
    help: "Parts of the merged metrics that could not be had.",
    labels: ["type"],
  },
  // this process
  buildInfo: {
    name: "vmmesh_build_info",
    type: "gauge",
    help: "Always 1; the labels tell the version.",
    labels: ["version", "node"],
  },
  processMemory: {
    name: "istio_agent_process_resident_memory_bytes",
    type: "gauge",
    help: "Resident memory of the agent.",
  },
  processCpu: {
    name: "istio_agent_process_cpu_seconds_total",
    type: "counter",
    help: "Processor time of the agent, user and system.",
  },
  processFiles: {
    name: "istio_agent_process_open_fds",
    type: "gauge",
    help: "Open files and sockets of the agent.",
  },
  processStart: {
    name: "istio_agent_process_start_time_seconds",
    type: "gauge",
    help: "When the agent started, in seconds since 1970.",
  },
} as const satisfies Record<string, MetricRow>;

type Name = keyof typeof METRICS;
type LabelsOf<R> = R extends { labels: readonly (infer L extends string)[] } ? L : never;
type HandleOf<R> = R extends { type: "counter" }
  ? Counter<LabelsOf<R>>
  : R extends { type: "gauge" }
    ? Gauge<LabelsOf<R>>
    : Histogram<LabelsOf<R>>;

export type Metrics = { readonly [K in Name]: HandleOf<(typeof METRICS)[K]> } & {
  /** The registry in Prometheus' text format 0.0.4. Reads memory, processor time and open files at this moment: no timer runs between scrapes. */
  render(): Promise<string>;
};

/** A registry of its own with every metric of the table. Counters without labels begin at 0. */
export function createMetrics(
  host: { readonly files: Pick<Host["files"], "list"> },
  build: { readonly version: string },
): Metrics {
  const registry = new Registry();
  const make = (row: MetricRow): Counter | Gauge | Histogram => {
    const options = {
      name: row.name,
      help: row.help,
      labelNames: [...(row.labels ?? [])],
      registers: [registry],
    };
    if (row.type === "counter") return new Counter(options);
    if (row.type === "gauge") return new Gauge(options);
    return new Histogram({ ...options, buckets: [...(row.buckets ?? [])] });
  };
  // The one place where the compiler cannot follow: each handle has the type of its row by HandleOf.
  const handles = Object.fromEntries(
    Object.entries(METRICS).map(([key, row]) => [key, make(row)]),
  ) as unknown as Omit<Metrics, "render">;
  handles.buildInfo.set({ version: build.version, node: process.versions.node }, 1);
  handles.processStart.set(performance.timeOrigin / 1000);
  let reportedCpu = 0;
  return {
    ...handles,
    async render() {
      const { user, system } = process.cpuUsage();
      const cpu = (user + system) / 1e6;
      handles.processCpu.inc(cpu - reportedCpu);
      reportedCpu = cpu;
      handles.processMemory.set(process.memoryUsage.rss());
      handles.processFiles.set((await host.files.list("/proc/self/fd"))?.length ?? 0);
      return registry.metrics();
    },
  };
}
