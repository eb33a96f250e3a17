import { parseSpiffe } from "../core/spiffe.ts";
import type { LoggedCommon, LoggedRequest } from "../proto/accessLog.ts";
import { isStruct, readStruct, type StructValue } from "../proto/struct.ts";

const UNKNOWN = "unknown";
/** What Istio takes a workload's revision for as long as nobody says another. */
const LATEST = "latest";
/** Kubernetes' own bound of a name; a peer chooses some of these texts. */
const MAX_VALUE_CHARS = 253;

/** One end of a request, in the words of Istio's labels. */
export interface IstioWorkload {
  readonly workload: string;
  readonly namespace: string;
  readonly app: string;
  readonly version: string;
  readonly canonicalService: string;
  readonly canonicalRevision: string;
  readonly cluster: string;
}

const NOBODY: IstioWorkload = {
  workload: UNKNOWN,
  namespace: UNKNOWN,
  app: UNKNOWN,
  version: UNKNOWN,
  canonicalService: UNKNOWN,
  canonicalRevision: LATEST,
  cluster: UNKNOWN,
};

export interface LabelFacts {
  readonly own: IstioWorkload;
  readonly ownPrincipal: string;
  /** `name;namespace;service;revision;cluster` of the endpoint at an address, as istiod writes it. */
  workloadAt(address: string): string | undefined;
}

/**
 * A workload by its labels.
 * @see https://istio.io/latest/docs/ops/best-practices/observability/ and the canonical service's rules of precedence
 */
export function istioWorkload(
  facts: { readonly workload: string; readonly namespace: string; readonly cluster: string },
  labels: Readonly<Record<string, StructValue | undefined>>,
): IstioWorkload {
  const label = (...names: readonly string[]): string | undefined => {
    for (const name of names) {
      const value = labels[name];
      if (typeof value === "string" && value !== "") return value;
    }
    return undefined;
  };
  return {
    ...facts,
    app: label("app") ?? UNKNOWN,
    version: label("version") ?? UNKNOWN,
    canonicalService:
      label("service.istio.io/canonical-name", "app.kubernetes.io/name", "app") ?? facts.workload,
    canonicalRevision:
      label("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version") ?? LATEST,
  };
}

/**
 * Istio's standard labels of one request or connection, but those that its kind adds.
 * @see https://istio.io/latest/docs/reference/config/metrics/
 *
 * Who the peer is has to be proved: without mutual TLS it is unknown, and what a header or an endpoint says of it counts
 * only within the namespace of its certificate.
 */
export function labelsOf(
  facts: LabelFacts,
  direction: "inbound" | "outbound",
  entry: LoggedCommon & Partial<Pick<LoggedRequest, "requestHeaders">>,
): Readonly<Record<string, string>> {
  const service = serviceOf(entry);
  const inbound = direction === "inbound";
  const peerPrincipal = inbound ? entry.peerPrincipal : (entry.tags.get("principal") ?? "");
  const ownPrincipal = inbound ? entry.localPrincipal : peerPrincipal === "" ? "" : facts.ownPrincipal;
  const peer = inbound
    ? callerOf(facts, entry)
    : (byEndpoint(entry.tags.get("workload")) ?? byPrincipal(peerPrincipal));
  const [source, destination] = inbound ? [peer, facts.own] : [facts.own, peer];
  const [sourcePrincipal, destinationPrincipal] = inbound
    ? [peerPrincipal, ownPrincipal]
    : [ownPrincipal, peerPrincipal];
  const labels = {
    reporter: inbound ? "destination" : "source",
    ...ofSide("source", source, sourcePrincipal),
    ...ofSide("destination", destination, destinationPrincipal),
    destination_service: service.host,
    destination_service_name: service.name,
    destination_service_namespace: service.namespace === "" ? destination.namespace : service.namespace,
    // Only the server's side knows it for sure: so Istio has it too.
    connection_security_policy: !inbound ? UNKNOWN : peerPrincipal === "" ? "none" : "mutual_tls",
    response_flags: entry.responseFlags,
  };
  return Object.fromEntries(
    Object.entries(labels).map(([name, value]) => [name, value.slice(0, MAX_VALUE_CHARS) || UNKNOWN]),
  );
}

function ofSide(
  side: "source" | "destination",
  of: IstioWorkload,
  principal: string,
): Record<string, string> {
  return {
    [`${side}_workload`]: of.workload,
    [`${side}_workload_namespace`]: of.namespace,
    [`${side}_principal`]: principal,
    [`${side}_app`]: of.app,
    [`${side}_version`]: of.version,
    [`${side}_canonical_service`]: of.canonicalService,
    [`${side}_canonical_revision`]: of.canonicalRevision,
    [`${side}_cluster`]: of.cluster,
  };
}

/** By what the peer's Envoy says of it (Istio's do), else by its address, else by its certificate. */
function callerOf(
  facts: LabelFacts,
  {
    peerPrincipal,
    peerAddress,
    requestHeaders,
  }: LoggedCommon & Partial<Pick<LoggedRequest, "requestHeaders">>,
): IstioWorkload {
  const proved = byPrincipal(peerPrincipal);
  if (proved === NOBODY) return NOBODY;
  return (
    [
      () => byHeader(requestHeaders?.get("x-envoy-peer-metadata")),
      () => byEndpoint(facts.workloadAt(peerAddress)),
    ]
      .map((find) => find())
      .find((found) => found?.namespace === proved.namespace) ?? proved
  );
}

function byPrincipal(principal: string): IstioWorkload {
  const spiffe = parseSpiffe(principal);
  return spiffe === undefined ? NOBODY : { ...NOBODY, namespace: spiffe.namespace };
}

/** istiod does not say app and version there, and Istio's Envoy has them as unknown then. */
function byEndpoint(text: string | undefined): IstioWorkload | undefined {
  const parts = text?.split(";") ?? [];
  if (parts.length < 5) return undefined;
  const [workload = "", namespace = "", canonicalService = "", revision = "", cluster = ""] = parts;
  return { ...NOBODY, workload, namespace, canonicalService, canonicalRevision: revision || LATEST, cluster };
}

/** The node metadata of a peer: google.protobuf.Struct in base64. */
function byHeader(text: string | undefined): IstioWorkload | undefined {
  if (text === undefined) return undefined;
  try {
    const node = readStruct(Buffer.from(text, "base64"));
    const member = (name: string): string => {
      const value = node[name];
      return typeof value === "string" ? value : "";
    };
    const { LABELS: labels } = node;
    return istioWorkload(
      { workload: member("WORKLOAD_NAME"), namespace: member("NAMESPACE"), cluster: member("CLUSTER_ID") },
      isStruct(labels) ? labels : {},
    );
  } catch {
    return undefined;
  }
}

/** Clusters that stand for no service; Istio has their names as the service's. */
const NO_SERVICE = ["PassthroughCluster", "BlackHoleCluster", "InboundPassthroughCluster"];

/**
 * istiod names a cluster's services in its metadata. Where no endpoint was chosen Envoy has no metadata, and the host
 * name comes from the cluster's own name: `outbound|PORT|SUBSET|HOST`.
 */
function serviceOf({ tags, upstreamCluster }: LoggedCommon): {
  host: string;
  name: string;
  namespace: string;
} {
  if (NO_SERVICE.includes(upstreamCluster)) return { host: UNKNOWN, name: upstreamCluster, namespace: "" };
  const named = firstService(tags.get("services") ?? "");
  if (named !== undefined) return named;
  const [, , , host = ""] = upstreamCluster.split("|");
  const [, name = host, namespace = ""] = /^([^.]+)\.([^.]+)\.svc\./.exec(host) ?? [];
  return { host, name, namespace };
}

function firstService(json: string): { host: string; name: string; namespace: string } | undefined {
  if (json === "") return undefined;
  try {
    const [first] = JSON.parse(json) as { host?: unknown; name?: unknown; namespace?: unknown }[];
    if (first === undefined) return undefined;
    const { host, name, namespace } = first;
    return { host: String(host ?? ""), name: String(name ?? ""), namespace: String(namespace ?? "") };
  } catch {
    return undefined;
  }
}
