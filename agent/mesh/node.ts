import { parseHostPort } from "../core/net.ts";
import { PORTS } from "../core/paths.ts";
import type { Workload } from "./types.ts";

/** A value that JSON can carry. */
export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

/** Envoy's `node`, as istiod reads it. */
export interface MeshNode {
  readonly id: string;
  readonly cluster: string;
  readonly locality?: { readonly region: string; readonly zone?: string; readonly subZone?: string };
  readonly metadata: { readonly [key: string]: Json };
}

export interface NodeOptions {
  /**
   * The Istio release whose agent we match: istiod gates what it sends by it and takes one it cannot parse for the
   * newest, so it is always three numbers.
   */
  readonly istioVersion?: string;
}

/** The release that the facts were gathered from. */
export const MATCHED_ISTIO_VERSION = "1.31.0";

/** What Istio's agent fills in before it sends its ProxyConfig; what the mesh says stands over it. */
const PROXY_CONFIG_DEFAULTS = {
  drainDuration: "45s",
  terminationDrainDuration: "5s",
  controlPlaneAuthPolicy: "MUTUAL_TLS",
  statNameLength: 189,
  statusPort: PORTS.status,
} as const;

/** `node` of the bootstrap: id, cluster, locality and metadata. @see chapter 3.9 of Istio's VM protocol */
export function nodeOf(workload: Workload, options: NodeOptions = {}): MeshNode {
  const { namespace } = workload;
  const locality = localityOf(workload.labels);
  return {
    id: `sidecar~${workload.addresses[0] ?? ""}~${workload.instanceName}.${namespace}~${namespace}.svc.cluster.local`,
    cluster: workload.serviceCluster,
    ...(locality === undefined ? {} : { locality }),
    metadata: nodeMetadata(workload, options),
  };
}

/**
 * `node.metadata`. Booleans and lists of `ISTIO_META_*` go as the texts they are: istiod decodes texts there, and
 * POD_PORTS is a JSON list inside a text.
 */
export function nodeMetadata(
  workload: Workload,
  options: NodeOptions = {},
): { readonly [key: string]: Json } {
  const labels = { ...workload.labels };
  return {
    // Istio puts the members of every ISTIO_METAJSON_ value at the top level too; a label never hides a key of ours.
    ...labels,
    ...Object.fromEntries(
      Object.values(workload.metaJson).flatMap((members) => Object.entries(members as Json & object)),
    ),
    ...withoutEmpty({ ISTIO_VERSION: options.istioVersion ?? MATCHED_ISTIO_VERSION, ...workload.meta }),
    INSTANCE_IPS: workload.addresses.join(","),
    NAME: workload.instanceName,
    NAMESPACE: workload.namespace,
    SERVICE_ACCOUNT: workload.serviceAccount,
    WORKLOAD_NAME: workload.workloadName,
    LABELS: labels,
    STATIC_LABELS: labels,
    PILOT_SAN: [parseHostPort(workload.discoveryAddress)?.host ?? workload.discoveryAddress],
    PROXY_CONFIG: {
      ...PROXY_CONFIG_DEFAULTS,
      ...(workload.proxyConfig as { readonly [key: string]: Json }),
      discoveryAddress: workload.discoveryAddress,
      serviceCluster: workload.serviceCluster,
    },
    ENVOY_STATUS_PORT: PORTS.readiness,
    ENVOY_PROMETHEUS_PORT: PORTS.envoyPrometheus,
    METADATA_DISCOVERY: "false",
    ENVOY_SKIP_DEPRECATED_LOGS: "true",
    WORKLOAD_IDENTITY_SOCKET_FILE: "socket",
  };
}

/** istiod treats absent and empty alike. */
function withoutEmpty(texts: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(Object.entries(texts).filter(([, text]) => text !== ""));
}

/** A label of Kubernetes cannot hold `/`, so there a dot parts region, zone and sub-zone. */
function localityOf(labels: Readonly<Record<string, string>>): MeshNode["locality"] {
  const text = labels["topology.istio.io/locality"] || labels["istio-locality"] || "";
  const [region = "", zone, subZone] = text.split(text.includes("/") ? "/" : ".");
  if (region === "") return undefined;
  return { region, ...(zone === undefined ? {} : { zone }), ...(subZone === undefined ? {} : { subZone }) };
}
