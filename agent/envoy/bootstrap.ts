import { VmmeshError } from "../core/errors.ts";
import { AGENT_GRPC, PORTS, PROBE_ADDRESS, PROBE_ANSWER } from "../core/paths.ts";

/** A value that JSON can carry. */
export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

/** The node as istiod reads it (ch. 3.9 of Istio's VM protocol); made by the mesh room. */
export interface BootstrapNode {
  /** `sidecar~IP~NAME.NAMESPACE~NAMESPACE.svc.DOMAIN` */
  readonly id: string;
  /** `GROUP.NAMESPACE` */
  readonly cluster: string;
  readonly metadata: { readonly [key: string]: Json };
  readonly locality?: { readonly region: string; readonly zone?: string; readonly subZone?: string };
}

/** Statistics to keep beside those that vmmesh keeps: `proxyStatsMatcher` and `extraStatTags` of the ProxyConfig. */
export interface ExtraStats {
  readonly prefixes?: readonly string[];
  readonly suffixes?: readonly string[];
  /** RE2, matched against the whole name. */
  readonly regexps?: readonly string[];
  readonly tags?: readonly string[];
}

export interface BootstrapInput {
  readonly node: BootstrapNode;
  /** Absolute paths of unix sockets, at most 107 bytes each (unix(7): `sun_path`). */
  readonly adminSocket: string;
  readonly xdsSocket: string;
  readonly sdsSocket: string;
  /** Mode of the admin socket; 0600 leaves it to Envoy's user and root. */
  readonly adminSocketMode: number;
  /** The machine has IPv6: the two static listeners answer on `[::]` too. */
  readonly ipv6: boolean;
  /** Have the health check that keeps the lease of the redirect (DECISIONS.md: the lease belongs to Envoy). */
  readonly lease: boolean;
  /** Connections from applications and peers at one time, 1 to 2^31-1; the status and scrape ports are exempt. Default: the most. */
  readonly maxConnections?: number;
  /** `runtimeValues` of the ProxyConfig: an empty text removes a key. */
  readonly runtime?: Readonly<Record<string, string>>;
  readonly stats?: ExtraStats;
}

/** Where the lease's health checks knock: addresses of lo that nobody else uses, at the port that only Envoy binds. */
export const LEASE = {
  cluster: "vmmesh-lease",
  address: "127.77.0.1",
  /** Answered where istiod gives Envoy [::] listeners (dual stack); elsewhere IPv6 has no lease. */
  address6: "::6",
  port: PORTS.outbound,
  everyMs: 500,
} as const;

/** The agent is at a socket of this machine: Envoy's own waits, 0.5 to 30 s, would outlast an agent's restart. */
const REDIAL = { retry_back_off: { base_interval: "0.2s", max_interval: "2s" } };
const MAX_SOCKET_PATH_BYTES = 107;
const NO_LIMIT = 2 ** 31 - 1;
const EXTENSIONS = "type.googleapis.com/envoy.extensions";

/**
 * Envoy's bootstrap, close to the one that Istio's agent writes (ch. 4 of the VM protocol). Other than there:
 * - admin is a unix socket, and `/stats/prometheus` on 15090 lets through GET of exactly that path;
 * - more statistics stay (see `CLUSTER_STATS`), because there is no `istio_requests_total` in a stock Envoy;
 * - no extension that a stock Envoy 1.36 lacks.
 *
 * @throws {VmmeshError} CONFIG_MALFORMED if a socket's path is relative or too long for the kernel
 */
export function renderBootstrap(input: BootstrapInput): { readonly [key: string]: Json } {
  for (const path of [input.adminSocket, input.xdsSocket, input.sdsSocket]) checkSocketPath(path);
  return {
    node: renderNode(input.node),
    layered_runtime: {
      layers: [
        { name: "global config", static_layer: renderRuntime(input.runtime ?? {}) },
        { name: "admin", admin_layer: {} },
      ],
    },
    bootstrap_extensions: [
      {
        name: "envoy.bootstrap.internal_listener",
        typed_config: typed(`${EXTENSIONS}.bootstrap.internal_listener.v3.InternalListener`, {
          buffer_size_kb: 64,
        }),
      },
    ],
    stats_config: renderStats(input.stats ?? {}),
    // Statistics of a cluster are made when it first carries traffic: a machine talks to few of a mesh's services.
    deferred_stat_options: { enable_deferred_creation_stats: true },
    admin: {
      profile_path: "/dev/null",
      address: { pipe: { path: input.adminSocket, mode: input.adminSocketMode } },
    },
    dynamic_resources: {
      lds_config: { ads: {}, initial_fetch_timeout: "0s", resource_api_version: "V3" },
      cds_config: { ads: {}, initial_fetch_timeout: "0s", resource_api_version: "V3" },
      ads_config: {
        api_type: "DELTA_GRPC",
        transport_api_version: "V3",
        set_node_on_first_message_only: true,
        grpc_services: [
          {
            envoy_grpc: {
              cluster_name: AGENT_GRPC.cluster,
              authority: AGENT_GRPC.authority,
              retry_policy: REDIAL,
            },
          },
        ],
      },
    },
    static_resources: {
      clusters: [
        cluster("prometheus_stats", { pipe: { path: input.adminSocket } }),
        cluster("agent", { socket_address: { address: "127.0.0.1", port_value: PORTS.status } }),
        { ...cluster("sds-grpc", { pipe: { path: input.sdsSocket } }), ...HTTP2 },
        { ...cluster(AGENT_GRPC.cluster, { pipe: { path: input.xdsSocket } }), ...HTTP2, ...NO_BREAKER },
        ...(input.lease ? [leaseCluster(input.ipv6)] : []),
      ],
      listeners: [
        httpListener("stats", PORTS.envoyPrometheus, input.ipv6, "/stats/prometheus", "prometheus_stats"),
        httpListener("agent", PORTS.readiness, input.ipv6, "/healthz/ready", "agent"),
        probeListener(4),
        ...(input.ipv6 ? [probeListener(6)] : []),
      ],
    },
    overload_manager: {
      resource_monitors: [
        {
          name: "envoy.resource_monitors.global_downstream_max_connections",
          typed_config: typed(
            `${EXTENSIONS}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig`,
            { max_active_downstream_connections: input.maxConnections ?? NO_LIMIT },
          ),
        },
      ],
    },
  };
}

/** How Envoy is started. */
export interface EnvoyOptions {
  readonly binary: string;
  readonly bootstrap: string;
  /** Worker threads, 1 or more; undefined: one for each processor. */
  readonly concurrency?: number;
  /** Default `warning`, as Istio's. */
  readonly logLevel?: "trace" | "debug" | "info" | "warning" | "error" | "critical" | "off";
  /** `rbac:debug,config:trace` */
  readonly componentLogLevel?: string;
  /** How long a removed listener still serves its connections, whole seconds. Default 45, as Istio's. */
  readonly drainSeconds?: number;
  /** Addresses of its own that Envoy tells upstreams; v6 only where the machine has no IPv4. */
  readonly addressFamily?: 4 | 6;
}

/**
 * The command line of Envoy's unit. Hot restart is off: an upgrade runs two plain Envoys side by side on SO_REUSEPORT,
 * and two machines in one test need no base ids. Lines on stderr carry no time: journald has it.
 */
export function envoyArgv(options: EnvoyOptions): [string, ...string[]] {
  return [
    options.binary,
    ...["--config-path", options.bootstrap],
    "--disable-hot-restart",
    ...["--drain-time-s", String(options.drainSeconds ?? 45)],
    ...["--drain-strategy", "immediate"],
    ...["--local-address-ip-version", `v${options.addressFamily ?? 4}`],
    ...["--file-flush-interval-msec", "1000"],
    ...["--log-level", options.logLevel ?? "warning"],
    ...["--log-format", "%l envoy %n: %v (%g:%#, thread %t)"],
    // One message, one line: a message with line breaks would come out of the journal as unrelated records.
    "--log-format-escaped",
    // istiod sends fields that newer Envoys call deprecated; the operator of the machine cannot change that.
    "--skip-deprecated-logs",
    ...(options.componentLogLevel === undefined ? [] : ["--component-log-level", options.componentLogLevel]),
    ...(options.concurrency === undefined ? [] : ["--concurrency", String(options.concurrency)]),
  ];
}

function checkSocketPath(path: string): void {
  if (path.startsWith("/") && Buffer.byteLength(path) <= MAX_SOCKET_PATH_BYTES) return;
  throw new VmmeshError(
    "CONFIG_MALFORMED",
    `\`${path}\` cannot be a unix socket: its path must be absolute and of at most ${MAX_SOCKET_PATH_BYTES} bytes`,
    { next: "Give --root a shorter absolute path." },
  );
}

function renderNode({ id, cluster: name, metadata, locality }: BootstrapNode): Json {
  return {
    id,
    cluster: name,
    metadata,
    ...(locality === undefined
      ? {}
      : {
          locality: {
            region: locality.region,
            ...(locality.zone === undefined ? {} : { zone: locality.zone }),
            ...(locality.subZone === undefined ? {} : { sub_zone: locality.subZone }),
          },
        }),
  };
}

const RUNTIME: Readonly<Record<string, string | boolean>> = {
  // Istio's routes and RBAC rules hold regular expressions that go past Envoy's small default (100).
  "re2.max_program_size.error_level": "32768",
  "envoy.reloadable_features.http_reject_path_with_fragment": false,
};

/** Istio's reading of `runtimeValues`: an empty text removes a key, true and false become booleans. */
function renderRuntime(overlay: Readonly<Record<string, string>>): Json {
  const layer = new Map<string, string | boolean>(Object.entries(RUNTIME));
  for (const [key, value] of Object.entries(overlay)) {
    if (value === "") layer.delete(key);
    else layer.set(key, value === "true" ? true : value === "false" ? false : value);
  }
  return Object.fromEntries(layer);
}

/**
 * What stays of a cluster's statistics, as ends of names. Istio's own Envoy drops them all, because its `istio_*` metrics
 * tell the same; a stock Envoy has none of those, so these are how an operator sees requests, latency, failures,
 * endpoints and TLS per service.
 */
const CLUSTER_STATS = [
  String.raw`upstream_rq_(?:total|active|pending_active|pending_overflow|timeout|per_try_timeout|retry|retry_success|rx_reset|tx_reset|completed|time|\d\d\d|\dxx)`,
  "upstream_cx_(?:total|active|connect_fail|connect_timeout|overflow|rx_bytes_total|tx_bytes_total|destroy_with_active_rq)",
  "membership_(?:healthy|total)",
  "lb_healthy_panic",
  "bind_errors",
  "health_check.(?:attempt|success|failure)",
  "outlier_detection.ejections_(?:active|total)",
  "circuit_breakers.default.(?:cx|cx_pool|rq|rq_pending|rq_retry)_open",
  "update_(?:success|failure|rejected|no_rebuild)",
  "ssl.(?:handshake|connection_error|fail_verify_no_cert|fail_verify_error|fail_verify_san|fail_verify_cert_hash)",
] as const;

/** What stays of a listener's; the HTTP ones of a listener (`listener.A.http.B…`) repeat those below `http.`. */
const LISTENER_STATS = [
  "downstream_cx_(?:total|active|overflow|overload_reject|transport_socket_connect_timeout)",
  "downstream_(?:global_cx_overflow|pre_cx_timeout|listener_filter_error)",
  "no_filter_chain_match",
  "ssl.(?:handshake|connection_error|no_certificate|fail_verify_no_cert|fail_verify_error|fail_verify_san|fail_verify_cert_hash)",
] as const;

/** What stays of an HTTP connection manager's: of what came in, and of what went out by service address. */
const HTTP_STATS = [
  String.raw`downstream_rq_(?:total|active|completed|time|timeout|idle_timeout|rx_reset|tx_reset|too_large|overload_close|\dxx)`,
  "downstream_cx_(?:total|active|ssl_active|rx_bytes_total|tx_bytes_total|protocol_error|overload_disable_keepalive)",
  "no_route",
  "no_cluster",
  "rq_total",
  "rs_too_large",
] as const;

/** Whole families that are small: few names however large the mesh is. */
const KEPT_PREFIXES = [
  "access_logs.",
  "cluster_manager",
  "listener_manager",
  "server",
  "control_plane",
  "overload",
  "tcp.",
  "reporter=",
  "wasm",
  "component",
  "istio",
] as const;

const KEPT_SUFFIXES = ["rbac.allowed", "rbac.denied", "shadow_allowed", "shadow_denied"] as const;

const dots = (parts: readonly string[]): string => parts.join("|").replaceAll(".", String.raw`\.`);

/** The regular expressions take a name of Istio's with or without the `;` that newer releases end it with. */
const STAT_TAGS: readonly { readonly tag_name: string; readonly regex: string }[] = [
  { tag_name: "cluster_name", regex: String.raw`^cluster\.((.+?);?\.)(?:${dots(CLUSTER_STATS)})$` },
  { tag_name: "tcp_prefix", regex: String.raw`^tcp\.((.+?);?\.)\w+$` },
  { tag_name: "response_code", regex: String.raw`_rq(_(\d{3}))$` },
  { tag_name: "response_code_class", regex: String.raw`_rq(_(\dxx))$` },
  {
    tag_name: "http_conn_manager_prefix",
    regex: String.raw`^http\.((.+?);?\.)(?:${dots(HTTP_STATS)}|rbac\..+)$`,
  },
  { tag_name: "listener_address", regex: String.raw`^listener\.((.+?);?\.)(?:${dots(LISTENER_STATS)})$` },
  { tag_name: "cache", regex: String.raw`(cache\.(.+?)\.)` },
  { tag_name: "component", regex: String.raw`(component\.(.+?)\.)` },
  { tag_name: "tag", regex: String.raw`(tag\.(.+?);\.)` },
  { tag_name: "wasm_filter", regex: String.raw`(wasm_filter\.(.+?)\.)` },
  { tag_name: "authz_enforce_result", regex: String.raw`rbac(\.(allowed|denied))` },
  { tag_name: "authz_dry_run_action", regex: String.raw`(\.istio_dry_run_(allow|deny)_)` },
  { tag_name: "authz_dry_run_result", regex: String.raw`(\.shadow_(allowed|denied))` },
];

function renderStats(extra: ExtraStats): Json {
  const patterns: Json[] = [
    ...[...KEPT_PREFIXES, ...(extra.prefixes ?? [])].map((prefix) => ({ prefix })),
    ...[...KEPT_SUFFIXES, ...(extra.suffixes ?? [])].map((suffix) => ({ suffix })),
    ...[
      String.raw`vhost\..*\.route\..*`,
      // Not `cluster.X;.external.…`, `.internal.…` and `.zone.…`: they count the same requests a second time.
      String.raw`cluster\.(?:.+;|[^;]+)\.(?:${dots(CLUSTER_STATS)})`,
      String.raw`http\..+\.(?:${dots(HTTP_STATS)})`,
      // Addresses and single words, not `….worker_0` or `admin.main_thread`: a worker's counts repeat the listener's.
      // RE2 has no lookahead, hence: no `r` before `_0`.
      String.raw`listener\.(?:.*[^r]_\d+|[^.]*[^.\d])\.(?:${dots(LISTENER_STATS)})`,
      ...(extra.regexps ?? []),
    ].map((regex) => ({ safe_regex: { regex } })),
  ];
  return {
    use_all_default_tags: false,
    stats_tags: [
      ...STAT_TAGS.map((tag) => ({ ...tag })),
      ...(extra.tags ?? []).map((tag) => ({ tag_name: tag, regex: String.raw`(${tag}=\.=(.*?);\.;)` })),
    ],
    stats_matcher: { inclusion_list: { patterns } },
  };
}

function typed(type: string, fields: { readonly [key: string]: Json }): Json {
  return { "@type": type, ...fields };
}

/** `alt_stat_name` ends in `;` as istiod's names do: a name with dots can then be told from the statistic. */
function cluster(name: string, ...addresses: Json[]): { readonly [key: string]: Json } {
  return {
    name,
    alt_stat_name: `${name};`,
    type: "STATIC",
    connect_timeout: "1s",
    load_assignment: {
      cluster_name: name,
      endpoints: [{ lb_endpoints: addresses.map((address) => ({ endpoint: { address } })) }],
    },
  };
}

const HTTP2 = {
  typed_extension_protocol_options: {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(
      `${EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions`,
      { explicit_http_config: { http2_protocol_options: {} } },
    ),
  },
};

const BREAKER_LIMITS = { max_connections: 100_000, max_pending_requests: 100_000, max_requests: 100_000 };
const NO_BREAKER = {
  circuit_breakers: {
    thresholds: [
      { priority: "DEFAULT", ...BREAKER_LIMITS },
      { priority: "HIGH", ...BREAKER_LIMITS },
    ],
  },
};

/**
 * Carries no traffic. Its TCP health check makes Envoy's main thread send a SYN to its own outbound listener twice a
 * second; the firewall renews the lease when it sees the answer. So a frozen Envoy, a dead one and one without the
 * listener all let the lease lapse within its three seconds.
 */
function leaseCluster(ipv6: boolean): Json {
  const every = `${LEASE.everyMs / 1000}s`;
  const addresses = ipv6 ? [LEASE.address, LEASE.address6] : [LEASE.address];
  return {
    ...cluster(
      LEASE.cluster,
      ...addresses.map((address): Json => ({ socket_address: { address, port_value: LEASE.port } })),
    ),
    health_checks: [
      {
        timeout: "0.4s",
        interval: every,
        // A cluster without traffic is otherwise asked once a minute.
        no_traffic_interval: every,
        unhealthy_threshold: 1,
        healthy_threshold: 1,
        tcp_health_check: {},
      },
    ],
  };
}

/**
 * Binds nothing. The outbound listener hands it a connection that was redirected and had this destination, as it does for
 * the listeners of services; so an answer proves the whole way from a process through the firewall to Envoy.
 */
function probeListener(family: 4 | 6): Json {
  return {
    name: `vmmesh-probe-${family}`,
    address: { socket_address: { address: PROBE_ADDRESS[family], port_value: PORTS.probe } },
    bind_to_port: false,
    filter_chains: [
      {
        filters: [
          {
            name: "envoy.filters.network.direct_response",
            typed_config: typed(`${EXTENSIONS}.filters.network.direct_response.v3.Config`, {
              response: { inline_string: `${PROBE_ANSWER}\n` },
            }),
          },
        ],
      },
    ],
  };
}

/** Serves GET of one path from one cluster; everything else is 404. */
function httpListener(statPrefix: string, port: number, ipv6: boolean, path: string, target: string): Json {
  const at = (address: string): Json => ({ socket_address: { address, port_value: port } });
  const manager = typed(`${EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager`, {
    stat_prefix: statPrefix,
    codec_type: "AUTO",
    route_config: {
      virtual_hosts: [
        {
          name: "backend",
          domains: ["*"],
          routes: [
            {
              match: { path, headers: [{ name: ":method", string_match: { exact: "GET" } }] },
              route: { cluster: target },
            },
          ],
        },
      ],
    },
    http_filters: [
      {
        name: "envoy.filters.http.router",
        typed_config: typed(`${EXTENSIONS}.filters.http.router.v3.Router`, {}),
      },
    ],
  });
  return {
    name: `0.0.0.0_${port}`,
    address: at("0.0.0.0"),
    ...(ipv6 ? { additional_addresses: [{ address: at("::") }] } : {}),
    // Whoever asks how the machine is must get an answer on a machine with too many connections above all.
    ignore_global_conn_limit: true,
    bypass_overload_manager: true,
    filter_chains: [
      { filters: [{ name: "envoy.filters.network.http_connection_manager", typed_config: manager }] },
    ],
  };
}
