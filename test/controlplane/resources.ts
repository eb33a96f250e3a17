import { formatSpiffe } from "../../agent/core/spiffe.ts";
import { type Message, TYPE_PREFIX } from "./protos.ts";

export interface ServicePort {
  readonly name: string;
  readonly port: number;
  /** Default: the same. */
  readonly targetPort?: number;
  readonly protocol: "http" | "tcp";
}

export interface MeshService {
  readonly name: string;
  readonly namespace: string;
  /** Its ClusterIP. */
  readonly vip: string;
  readonly ports: readonly ServicePort[];
  /** Labels that a workload of the same namespace must have to be an endpoint. */
  readonly selector: Readonly<Record<string, string>>;
}

export interface Workload {
  /** `GROUP-ADDRESS[-NETWORK]`, as istiod names a WorkloadEntry. */
  readonly name: string;
  readonly namespace: string;
  readonly group: string;
  readonly address: string;
  readonly serviceAccount: string;
  readonly labels: Readonly<Record<string, string>>;
  /** undefined: it has a probe and no report has come yet, so it gets no traffic. */
  readonly health: { readonly healthy: boolean; readonly message: string } | undefined;
  /** A disconnected one stays, and gets traffic, for the grace period. */
  readonly connected: boolean;
}

export interface Mesh {
  readonly trustDomain: string;
  readonly services: readonly MeshService[];
  readonly workloads: readonly Workload[];
  /** `accessLogFile` of the mesh's config; empty: no access log. */
  readonly accessLogFile: string;
}

/** For whom resources are made. */
export interface Viewer {
  readonly namespace: string;
  readonly workload: Workload | undefined;
}

export const TYPES = {
  cluster: "envoy.config.cluster.v3.Cluster",
  endpoints: "envoy.config.endpoint.v3.ClusterLoadAssignment",
  listener: "envoy.config.listener.v3.Listener",
  routes: "envoy.config.route.v3.RouteConfiguration",
  names: "istio.networking.nds.v1.NameTable",
} as const;
export type ResourceType = (typeof TYPES)[keyof typeof TYPES];

const DOMAIN = "cluster.local";
const ISTIO_LOCALHOST = "127.0.0.6";
const ADS = { ads: {}, resource_api_version: "V3", initial_fetch_timeout: { seconds: 0 } };

const typed = (type: string, fields: Message = {}): Message => ({ "@type": TYPE_PREFIX + type, ...fields });
const hostOf = (service: MeshService): string => `${service.name}.${service.namespace}.svc.${DOMAIN}`;
const outbound = (service: MeshService, port: ServicePort): string =>
  `outbound|${port.port}||${hostOf(service)}`;
const inbound = (port: number): string => `inbound|${port}||`;
const routeName = (service: MeshService, port: ServicePort): string => `${hostOf(service)}:${port.port}`;
const targetOf = (port: ServicePort): number => port.targetPort ?? port.port;

/**
 * All resources of one type for one proxy, by name, in istiod's names and shapes (appendix D of the VM protocol) as far
 * as a stock Envoy carries them: no telemetry, no policies but STRICT mutual TLS.
 */
export function resourcesOf(type: ResourceType, mesh: Mesh, viewer: Viewer): Map<string, Message> {
  switch (type) {
    case TYPES.cluster:
      return named("name", clusters(mesh, viewer));
    case TYPES.endpoints:
      return named(
        "cluster_name",
        eachPort(mesh).map(([service, port]) => loadAssignment(mesh, service, port)),
      );
    case TYPES.listener:
      return named("name", listeners(mesh, viewer));
    case TYPES.routes:
      return named(
        "name",
        eachPort(mesh).flatMap(([service, port]) =>
          port.protocol === "http" ? [routes(service, port)] : [],
        ),
      );
    case TYPES.names:
      // istiod sends the one table as a resource without a name.
      return new Map([["", nameTable(mesh)]]);
  }
}

/** Workloads that get a service's traffic. */
export function endpointsOf(mesh: Mesh, service: MeshService): Workload[] {
  return mesh.workloads.filter((it) => it.health?.healthy === true && selects(service, it));
}

function selects(service: MeshService, workload: Workload): boolean {
  const wanted = Object.entries(service.selector);
  return (
    service.namespace === workload.namespace && wanted.every(([key, value]) => workload.labels[key] === value)
  );
}

function named(key: string, messages: readonly Message[]): Map<string, Message> {
  return new Map(messages.map((message) => [String(message[key]), message]));
}

function eachPort(mesh: Mesh): [MeshService, ServicePort][] {
  return mesh.services.flatMap((service) =>
    service.ports.map((port): [MeshService, ServicePort] => [service, port]),
  );
}

/** Ports that services declare for this workload, each once. */
function inboundPorts(mesh: Mesh, viewer: Viewer): { port: number; protocol: ServicePort["protocol"] }[] {
  const { workload } = viewer;
  if (workload === undefined) return [];
  const ports = new Map<number, ServicePort["protocol"]>();
  for (const [service, port] of eachPort(mesh)) {
    if (selects(service, workload)) ports.set(targetOf(port), port.protocol);
  }
  return [...ports].map(([port, protocol]) => ({ port, protocol }));
}

function clusters(mesh: Mesh, viewer: Viewer): Message[] {
  const own = { source_address: { address: ISTIO_LOCALHOST, port_value: 0 } };
  return [
    ...eachPort(mesh).map(([service, port]) => outboundCluster(mesh, service, port)),
    ...inboundPorts(mesh, viewer).map(({ port }) =>
      originalDst(inbound(port), { upstream_bind_config: own }),
    ),
    originalDst("PassthroughCluster"),
    originalDst("InboundPassthroughCluster", { upstream_bind_config: own }),
    {
      name: "BlackHoleCluster",
      type: "STATIC",
      connect_timeout: { seconds: 10 },
      alt_stat_name: "BlackHoleCluster;",
    },
  ];
}

function originalDst(name: string, more: Message = {}): Message {
  return {
    name,
    alt_stat_name: `${name};`,
    type: "ORIGINAL_DST",
    lb_policy: "CLUSTER_PROVIDED",
    connect_timeout: { seconds: 10 },
    ...more,
  };
}

function outboundCluster(mesh: Mesh, service: MeshService, port: ServicePort): Message {
  const name = outbound(service, port);
  const accounts = new Set(
    mesh.workloads.filter((it) => selects(service, it)).map((it) => it.serviceAccount),
  );
  const names = [...accounts].sort().map((serviceAccount) => ({
    san_type: "URI",
    matcher: {
      exact: formatSpiffe({ trustDomain: mesh.trustDomain, namespace: service.namespace, serviceAccount }),
    },
  }));
  return {
    name,
    alt_stat_name: `${name};`,
    type: "EDS",
    eds_cluster_config: { eds_config: ADS, service_name: name },
    lb_policy: "LEAST_REQUEST",
    connect_timeout: { seconds: 10 },
    transport_socket: {
      name: "envoy.transport_sockets.tls",
      typed_config: typed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", {
        sni: `outbound_.${port.port}_._.${hostOf(service)}`,
        common_tls_context: {
          ...tlsContext({ match_typed_subject_alt_names: names }),
          alpn_protocols: ["istio"],
        },
      }),
    },
  };
}

/** Certificate and roots by SDS from the agent, as istiod names them. */
function tlsContext(defaultValidation: Message): Message {
  const secret = (name: string): Message => ({
    name,
    sds_config: {
      resource_api_version: "V3",
      initial_fetch_timeout: { seconds: 0 },
      api_config_source: {
        api_type: "GRPC",
        transport_api_version: "V3",
        set_node_on_first_message_only: true,
        grpc_services: [{ envoy_grpc: { cluster_name: "sds-grpc" } }],
      },
    },
  });
  return {
    tls_params: { tls_minimum_protocol_version: "TLSv1_2", tls_maximum_protocol_version: "TLSv1_3" },
    tls_certificate_sds_secret_configs: [secret("default")],
    combined_validation_context: {
      default_validation_context: defaultValidation,
      validation_context_sds_secret_config: secret("ROOTCA"),
    },
  };
}

function loadAssignment(mesh: Mesh, service: MeshService, port: ServicePort): Message {
  const endpoints = endpointsOf(mesh, service).map(({ address }) => ({
    endpoint: { address: socketAddress(address, targetOf(port)) },
    health_status: "HEALTHY",
    load_balancing_weight: { value: 1 },
  }));
  return {
    cluster_name: outbound(service, port),
    endpoints:
      endpoints.length === 0
        ? []
        : [{ locality: {}, lb_endpoints: endpoints, load_balancing_weight: { value: 1 } }],
  };
}

function routes(service: MeshService, port: ServicePort): Message {
  return {
    name: routeName(service, port),
    virtual_hosts: [virtualHost(routeName(service, port), outbound(service, port))],
    validate_clusters: { value: false },
  };
}

function virtualHost(name: string, cluster: string): Message {
  return {
    name,
    domains: ["*"],
    include_request_attempt_count: true,
    routes: [{ name: "default", match: { prefix: "/" }, route: { cluster, timeout: { seconds: 0 } } }],
  };
}

function listeners(mesh: Mesh, viewer: Viewer): Message[] {
  return [
    {
      name: "virtualOutbound",
      address: socketAddress("0.0.0.0", 15001),
      traffic_direction: "OUTBOUND",
      use_original_dst: { value: true },
      filter_chains: [
        blackHole("virtualOutbound-blackhole", 15001),
        { name: "virtualOutbound-catchall-tcp", filters: [tcpProxy("PassthroughCluster", mesh)] },
      ],
    },
    ...eachPort(mesh).map(([service, port]) => ({
      name: `${service.vip}_${port.port}`,
      address: socketAddress(service.vip, port.port),
      bind_to_port: { value: false },
      traffic_direction: "OUTBOUND",
      filter_chains: [
        {
          filters: [
            port.protocol === "tcp"
              ? tcpProxy(outbound(service, port), mesh)
              : httpManager(mesh, `outbound_${service.vip}_${port.port};`, {
                  rds: { config_source: ADS, route_config_name: routeName(service, port) },
                }),
          ],
        },
      ],
    })),
    virtualInbound(mesh, viewer),
  ];
}

function virtualInbound(mesh: Mesh, viewer: Viewer): Message {
  const tls = {
    name: "envoy.transport_sockets.tls",
    typed_config: typed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", {
      require_client_certificate: { value: true },
      common_tls_context: {
        ...tlsContext({
          match_typed_subject_alt_names: [
            { san_type: "URI", matcher: { prefix: `spiffe://${mesh.trustDomain}/` } },
          ],
        }),
        alpn_protocols: ["h2", "http/1.1"],
      },
    }),
  };
  return {
    name: "virtualInbound",
    address: socketAddress("0.0.0.0", 15006),
    traffic_direction: "INBOUND",
    listener_filters: [
      {
        name: "envoy.filters.listener.original_dst",
        typed_config: typed("envoy.extensions.filters.listener.original_dst.v3.OriginalDst"),
      },
      {
        name: "envoy.filters.listener.tls_inspector",
        typed_config: typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"),
      },
    ],
    filter_chains: [
      blackHole("virtualInbound-blackhole", 15006),
      ...inboundPorts(mesh, viewer).map(({ port, protocol }) => ({
        name: `0.0.0.0_${port}`,
        filter_chain_match: { destination_port: { value: port }, transport_protocol: "tls" },
        transport_socket: tls,
        filters: [
          protocol === "tcp"
            ? tcpProxy(inbound(port), mesh)
            : httpManager(mesh, `inbound_0.0.0.0_${port};`, {
                forward_client_cert_details: "APPEND_FORWARD",
                set_current_client_cert_details: { subject: { value: true }, dns: true, uri: true },
                route_config: {
                  name: inbound(port),
                  virtual_hosts: [virtualHost(`inbound|http|${port}`, inbound(port))],
                  validate_clusters: { value: false },
                },
              }),
        ],
      })),
      // STRICT: what no service declares needs a certificate too, and nothing comes in without one.
      {
        name: "virtualInbound-catchall-tls",
        filter_chain_match: { transport_protocol: "tls" },
        transport_socket: tls,
        filters: [tcpProxy("InboundPassthroughCluster", mesh)],
      },
    ],
  };
}

/**
 * Whoever dials Envoy's own port would otherwise be sent to itself, for ever. Nothing is logged, as at istiod: the health
 * check of the lease comes this way twice a second.
 */
function blackHole(name: string, port: number): Message {
  const type = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
  const cluster = "BlackHoleCluster";
  return {
    name,
    filter_chain_match: { destination_port: { value: port } },
    filters: [
      {
        name: "envoy.filters.network.tcp_proxy",
        typed_config: typed(type, { stat_prefix: cluster, cluster }),
      },
    ],
  };
}

function accessLog({ accessLogFile }: Mesh): Message[] {
  if (accessLogFile === "") return [];
  return [
    {
      name: "envoy.access_loggers.file",
      typed_config: typed("envoy.extensions.access_loggers.file.v3.FileAccessLog", { path: accessLogFile }),
    },
  ];
}

function tcpProxy(cluster: string, mesh: Mesh): Message {
  return {
    name: "envoy.filters.network.tcp_proxy",
    typed_config: typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", {
      stat_prefix: cluster,
      cluster,
      access_log: accessLog(mesh),
    }),
  };
}

function httpManager(mesh: Mesh, statPrefix: string, more: Message): Message {
  return {
    name: "envoy.filters.network.http_connection_manager",
    typed_config: typed("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", {
      stat_prefix: statPrefix,
      codec_type: "AUTO",
      use_remote_address: { value: false },
      normalize_path: { value: true },
      access_log: accessLog(mesh),
      http_filters: [
        {
          name: "envoy.filters.http.router",
          typed_config: typed("envoy.extensions.filters.http.router.v3.Router"),
        },
      ],
      ...more,
    }),
  };
}

function socketAddress(address: string, port: number): Message {
  return { socket_address: { address, port_value: port } };
}

function nameTable(mesh: Mesh): Message {
  return {
    table: Object.fromEntries(
      mesh.services.map((service) => [
        hostOf(service),
        { ips: [service.vip], registry: "Kubernetes", shortname: service.name, namespace: service.namespace },
      ]),
    ),
  };
}
