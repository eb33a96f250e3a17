import { VmmeshError } from "../core/errors.ts";
import { ipFamily, parseCidr } from "../core/net.ts";
import { PORTS } from "../core/paths.ts";
import { sieveMeshEnv } from "../mesh/env.ts";
import type { Bundle, ProxyConfig } from "../mesh/types.ts";
import { type Fields, fieldsOf, isFields, parseYamlFields, textMapOf, textOf } from "../mesh/yaml.ts";
import { type KubeClient, type KubeObject, refuseShortToken, type TokenWish } from "./client.ts";
import type { Choice } from "./meshObjects.ts";

export interface BundleRequest {
  readonly group: KubeObject;
  /** Labels of this machine, over those of the group. */
  readonly labels?: Readonly<Record<string, string>>;
  /** Network of this machine, over that of the group. */
  readonly network?: string;
  /** Revision of the control plane; undefined, "" and "default" are the one without a name. */
  readonly revision?: string;
  /** Default `istio-system`. */
  readonly istioNamespace?: string;
  readonly clusterId?: string;
  /** IP address or host name where istiod is reached: given, nothing is looked up. */
  readonly istiodAddress?: string;
  /** `NAME` or `NAME.NAMESPACE`; default `istio-eastwestgateway` in the Istio namespace. */
  readonly gateway?: string;
  readonly tokenSeconds: number;
  /** Name of a Secret to make in the group's namespace: the token dies with it. */
  readonly bindTokenTo?: string;
  /** Address of the machine on an interface of its own. */
  readonly internalIp?: string;
  /** Address that peers reach, which the machine itself does not have (NAT). */
  readonly externalIp?: string;
  /** Default true; istioctl's is false. */
  readonly autoRegister?: boolean;
  /** Default true, as istioctl's. */
  readonly captureDns?: boolean;
}

/** What a request says beside the token. */
export type ReadRequest = Omit<BundleRequest, "tokenSeconds" | "bindTokenTo">;

/** A bundle still without a token: all that can be had by reading. */
export interface ReadBundle extends Bundle {
  readonly choices: readonly Choice[];
}

export interface MadeBundle extends ReadBundle {
  readonly token: string;
  readonly tokenExpires: Date;
}

type Maker = Pick<KubeClient, "get" | "find" | "list" | "create" | "requestToken">;
type Reader = Pick<KubeClient, "get" | "find" | "list">;

const ISTIO_NAMESPACE = "istio-system";
const GATEWAY = "istio-eastwestgateway";
const AUDIENCE = "istio-ca";
const XDS_PORT = 15012;
const DEFAULT_CLUSTER_ID = "Kubernetes";

/**
 * The files that join one machine to `group`, equal to those of `istioctl x workload entry configure` for the same
 * group, read through the Kubernetes API alone.
 *
 * @throws {VmmeshError} KUBE_NOT_FOUND, KUBE_FORBIDDEN, KUBE_UNREACHABLE, KUBE_FAILED, USAGE, CONFIG_MALFORMED
 * @see chapter 1 of Istio's VM protocol
 */
export async function makeBundle(client: Maker, request: BundleRequest): Promise<MadeBundle> {
  refuseShortToken(request.tokenSeconds);
  const bundle = await readMesh(client, request);
  const { namespace = "" } = request.group.metadata;
  const { serviceAccount } = templateOf(request.group);
  const { token, expires } = await client.requestToken({
    namespace,
    serviceAccount,
    audience: AUDIENCE,
    seconds: request.tokenSeconds,
    ...(request.bindTokenTo === undefined
      ? {}
      : { boundTo: await makeSecret(client, request.bindTokenTo, request.group) }),
  });
  const choice: Choice = {
    name: "token",
    value: `for ${serviceAccount} in ${namespace}, audience ${AUDIENCE}`,
    why: `until ${expires.toISOString()}`,
  };
  return { ...bundle, token, tokenExpires: expires, choices: [...bundle.choices, choice] };
}

/**
 * An empty Secret that a token is bound to: when it is deleted, the API server no longer vouches for the token.
 * @throws {VmmeshError} KUBE_CONFLICT if there is one of this name, and as `KubeClient.create`
 */
async function makeSecret(
  client: Pick<KubeClient, "create">,
  name: string,
  { metadata: { name: group, namespace = "" } }: KubeObject,
): Promise<NonNullable<TokenWish["boundTo"]>> {
  const made = await client.create({
    apiVersion: "v1",
    kind: "Secret",
    metadata: {
      name,
      namespace,
      annotations: { "vmmesh.io/purpose": `a token for WorkloadGroup ${group} dies with this Secret` },
    },
  });
  if (made === undefined) {
    throw new VmmeshError("KUBE_CONFLICT", `there is a Secret ${namespace}/${name} already`, {
      next: "Run the same command again: it takes another name.",
    });
  }
  const { uid } = made.metadata;
  return { kind: "Secret", name, ...(uid === undefined ? {} : { uid }) };
}

/**
 * Everything of a bundle but its token. It writes nothing in the cluster, so a rehearsal, or a join before it makes its
 * objects, learns by it whether all that is needed is there and may be read.
 *
 * @throws as `makeBundle`
 */
export async function readMesh(client: Reader, request: ReadRequest): Promise<ReadBundle> {
  const istioNamespace = request.istioNamespace ?? ISTIO_NAMESPACE;
  const revision = request.revision === "default" ? "" : (request.revision ?? "");
  const suffix = revision === "" ? "" : `-${revision}`;
  const istiodHost = `istiod${suffix}.${istioNamespace}.svc`;

  const mesh = await readMeshConfig(client, `istio${suffix}`, istioNamespace);
  const clusterId = await clusterIdOf(client, request, `istio-sidecar-injector${suffix}`, istioNamespace);
  const addresses = await istiodAddressesOf(client, request, istioNamespace);
  const cidrs = await meshCidrsOf(client);
  const rootCert = await readRootCert(client, request.group.metadata.namespace ?? "");
  const facts: GroupFacts = {
    request,
    clusterId: clusterId.value,
    mesh,
    ...(revision === "" ? {} : { revisionedAddress: `${istiodHost}:${XDS_PORT}` }),
  };
  const proxyConfig = proxyConfigOf(facts);
  const { kept, refused } = sieveMeshEnv(clusterEnvOf(facts, proxyConfig));
  return {
    clusterEnv: kept,
    proxyConfig,
    rootCert,
    hosts: new Map([[istiodHost, addresses.list]]),
    meshCidrs: cidrs.list,
    refusedKeys: refused,
    choices: [
      {
        name: "control plane",
        value: `${istiodHost}:${XDS_PORT}`,
        why: revision === "" ? "no --revision was given" : `revision ${revision}`,
      },
      addresses.choice,
      clusterId,
      cidrs.choice,
    ],
  };
}

interface Template {
  readonly serviceAccount: string;
  readonly network: string;
  readonly ports: readonly (readonly [string, number])[];
  readonly labels: Readonly<Record<string, string>>;
}

/** A group from the API may lack what one from a file is given: `spec.metadata`, `spec.template`, a service account. */
function templateOf(group: KubeObject): Template {
  const template = fieldsOf(group.spec?.["template"]);
  return {
    serviceAccount: textOf(template["serviceAccount"]) || "default",
    network: textOf(template["network"]) ?? "",
    ports: Object.entries(fieldsOf(template["ports"]))
      .filter((entry): entry is [string, number] => typeof entry[1] === "number")
      .sort(([a], [b]) => (a < b ? -1 : 1)),
    labels: textMapOf(template["labels"]),
  };
}

interface MeshConfig {
  readonly defaultConfig: Fields;
  readonly trustDomain: string;
}

async function readMeshConfig(client: Reader, name: string, namespace: string): Promise<MeshConfig> {
  const map = await client.get({ kind: "ConfigMap", name, namespace });
  const where = `ConfigMap ${namespace}/${name}, key mesh`;
  const next = "Correct the mesh config of the control plane (`istioctl analyze` checks it).";
  const text = map.data?.["mesh"] ?? "";
  const mesh = text.trim() === "" ? {} : parseYamlFields(text, where, "CONFIG_MALFORMED", next);
  return { defaultConfig: fieldsOf(mesh["defaultConfig"]), trustDomain: textOf(mesh["trustDomain"]) ?? "" };
}

async function readRootCert(client: Reader, namespace: string): Promise<string> {
  const ref = { kind: "ConfigMap", name: "istio-ca-root-cert", namespace } as const;
  const rootCert = (await client.get(ref)).data?.["root-cert.pem"] ?? "";
  if (rootCert !== "") return rootCert;
  throw new VmmeshError("KUBE_NOT_FOUND", `ConfigMap ${namespace}/${ref.name} has no key root-cert.pem`, {
    next: "istiod fills it within seconds of its start: look whether istiod runs.",
  });
}

async function clusterIdOf(
  client: Reader,
  request: ReadRequest,
  name: string,
  namespace: string,
): Promise<Choice> {
  if (request.clusterId !== undefined)
    return { name: "cluster id", value: request.clusterId, why: "as given" };
  const fallBack = (why: string): Choice => ({ name: "cluster id", value: DEFAULT_CLUSTER_ID, why });
  const map = await unlessForbidden(client.find({ kind: "ConfigMap", name, namespace }));
  if (map === "forbidden")
    return fallBack(
      `ConfigMap ${namespace}/${name} may not be read, so the default (--cluster-id says another)`,
    );
  if (map === undefined)
    return fallBack(`there is no ConfigMap ${namespace}/${name}, so the default (--cluster-id says another)`);
  const values = parseYamlFields(
    map.data?.["values"] || "{}",
    `ConfigMap ${namespace}/${name}, key values`,
    "CONFIG_MALFORMED",
    "Say the cluster's id with --cluster-id.",
  );
  const found = textOf(fieldsOf(fieldsOf(values["global"])["multiCluster"])["clusterName"]) ?? "";
  return found === ""
    ? fallBack(`ConfigMap ${namespace}/${name} names no cluster, so the default`)
    : { name: "cluster id", value: found, why: `ConfigMap ${namespace}/${name}` };
}

interface Listed {
  readonly list: readonly string[];
  readonly choice: Choice;
}

async function istiodAddressesOf(
  client: Reader,
  request: ReadRequest,
  istioNamespace: string,
): Promise<Listed> {
  const name = "istiod address";
  const given = request.istiodAddress;
  if (given !== undefined) {
    if (ipFamily(given) === undefined && !isHostName(given)) {
      throw new VmmeshError("USAGE", `--istiod-address ${given} is neither an IP address nor a host name`, {
        next: "Give the address alone, without a port: the port is that of the control plane.",
      });
    }
    return { list: [given], choice: { name, value: given, why: "as given" } };
  }
  const [gateway = "", gatewayNamespace = istioNamespace] = (request.gateway ?? GATEWAY).split(".");
  const service = await client.find({ kind: "Service", name: gateway, namespace: gatewayNamespace });
  const where = `Service ${gatewayNamespace}/${gateway}`;
  if (service === undefined) throw noAddress(`there is no ${where}`);
  const list = gatewayAddresses(service);
  if (list.length === 0) throw noAddress(`${where} has no address yet`);
  return { list, choice: { name, value: list.join(", "), why: where } };
}

function noAddress(what: string): VmmeshError {
  return new VmmeshError("KUBE_NOT_FOUND", `nobody says where istiod is reached: ${what}`, {
    next: "Say it with `--istiod-address IP`, or install an east-west gateway that exposes istiod (samples/multicluster/gen-eastwest-gateway.sh of Istio).",
  });
}

/** Addresses of the load balancer; else its host names; else the external IPs of the Service. */
function gatewayAddresses(service: KubeObject): string[] {
  const ingress: unknown = fieldsOf(service.status?.["loadBalancer"])["ingress"];
  const points = Array.isArray(ingress) ? ingress.map(fieldsOf) : [];
  const texts = (values: readonly unknown[]): string[] =>
    values.filter((value): value is string => typeof value === "string" && value !== "");
  const external: unknown = service.spec?.["externalIPs"];
  const choices = [
    texts(points.map((point) => point["ip"])),
    texts(Array.isArray(external) ? external : []),
    texts(points.map((point) => point["hostname"])),
  ];
  return choices.find((list) => list.length > 0) ?? [];
}

function isHostName(text: string): boolean {
  return (
    text.length <= 253 &&
    /^([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?\.?$/.test(text)
  );
}

/** ServiceCIDR objects tell the ranges since Kubernetes 1.33; an older cluster, or a narrow user, does not. */
async function meshCidrsOf(client: Reader): Promise<Listed> {
  const name = "service ranges";
  const unknown = (why: string): Listed => ({
    list: [],
    choice: { name, value: "unknown", why: `${why} (--mesh-cidr says them)` },
  });
  let objects: KubeObject[] | "forbidden";
  try {
    objects = (await unlessForbidden(client.list("ServiceCIDR"))) ?? [];
  } catch (thrown) {
    if (!(thrown instanceof VmmeshError) || thrown.code !== "KUBE_NOT_FOUND") throw thrown;
    return unknown("this cluster has no ServiceCIDR objects");
  }
  if (objects === "forbidden") return unknown("ServiceCIDR objects may not be read");
  const list = objects
    .flatMap((object) => (Array.isArray(object.spec?.["cidrs"]) ? object.spec["cidrs"] : []))
    .filter((cidr): cidr is string => typeof cidr === "string" && parseCidr(cidr) !== undefined);
  return list.length === 0
    ? unknown("no ServiceCIDR object names one")
    : { list, choice: { name, value: list.join(", "), why: "ServiceCIDR objects" } };
}

/** For what is good to know but not needed: a narrow user goes on without. */
async function unlessForbidden<T>(work: Promise<T>): Promise<T | "forbidden"> {
  try {
    return await work;
  } catch (thrown) {
    if (thrown instanceof VmmeshError && thrown.code === "KUBE_FORBIDDEN") return "forbidden";
    throw thrown;
  }
}

interface GroupFacts {
  readonly request: ReadRequest;
  readonly clusterId: string;
  readonly mesh: MeshConfig;
  /** `istiod-REV.NS.svc:15012`, only of a named revision: the other one is the agent's default. */
  readonly revisionedAddress?: string;
}

const CANONICAL_NAME = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"] as const;
const CANONICAL_REVISION = [
  "service.istio.io/canonical-revision",
  "app.kubernetes.io/version",
  "version",
] as const;

/** Chapter 1.2: mesh config < annotations of the group < what is made from the group. */
function proxyConfigOf(facts: GroupFacts): ProxyConfig {
  const { request, mesh } = facts;
  const { group } = request;
  const metadata = fieldsOf(group.spec?.["metadata"]);
  let config: Fields = mesh.defaultConfig;
  if (facts.revisionedAddress !== undefined && config["discoveryAddress"] === undefined) {
    config = { ...config, discoveryAddress: facts.revisionedAddress };
  }
  for (const annotations of [group.metadata.annotations, textMapOf(metadata["annotations"])]) {
    config = withAnnotation(config, annotations?.["proxy.istio.io/config"], group);
  }
  const { readinessProbe: _, ...rest } = config;
  const probe = group.spec?.["probe"];
  return {
    ...rest,
    ...(isFields(probe) ? { readinessProbe: probe } : {}),
    proxyMetadata: { ...textMapOf(config["proxyMetadata"]), ...groupMetadata(facts) },
  };
}

function withAnnotation(config: Fields, text: string | undefined, group: KubeObject): Fields {
  if (text === undefined || text.trim() === "") return config;
  const where = `WorkloadGroup ${group.metadata.name}, annotation proxy.istio.io/config`;
  const over = parseYamlFields(
    text,
    where,
    "CONFIG_MALFORMED",
    "Correct the annotation, then run the same command again.",
  );
  return {
    ...config,
    ...over,
    proxyMetadata: { ...textMapOf(config["proxyMetadata"]), ...textMapOf(over["proxyMetadata"]) },
  };
}

function groupMetadata({ request, clusterId, mesh }: GroupFacts): Record<string, string> {
  const { group } = request;
  const { name, namespace = "" } = group.metadata;
  const template = templateOf(group);
  const own = {
    ...textMapOf(fieldsOf(group.spec?.["metadata"])["labels"]),
    ...template.labels,
    ...request.labels,
  };
  const first = (keys: readonly string[], otherwise: string): string =>
    keys.map((key) => own[key]).find((value) => value !== undefined && value !== "") ?? otherwise;
  const canonicalName = first(CANONICAL_NAME, name);
  const canonicalRevision = first(CANONICAL_REVISION, "latest");
  const labels: Record<string, string> = {
    ...own,
    [CANONICAL_NAME[0]]: canonicalName,
    [CANONICAL_REVISION[0]]: canonicalRevision,
  };
  const podPorts = template.ports.map(([portName, containerPort]) => ({
    name: portName,
    containerPort,
    protocol: "",
  }));
  return {
    CANONICAL_SERVICE: canonicalName,
    CANONICAL_REVISION: canonicalRevision,
    POD_NAMESPACE: namespace,
    SERVICE_ACCOUNT: template.serviceAccount,
    TRUST_DOMAIN: mesh.trustDomain,
    ISTIO_META_CLUSTER_ID: clusterId,
    ISTIO_META_MESH_ID: textOf(mesh.defaultConfig["meshId"]) ?? "",
    ISTIO_META_NETWORK: request.network ?? template.network,
    ISTIO_META_WORKLOAD_NAME: name,
    ISTIO_METAJSON_LABELS: JSON.stringify(sorted(labels)),
    ...(podPorts.length === 0 ? {} : { ISTIO_META_POD_PORTS: JSON.stringify(podPorts) }),
    ...(request.captureDns === false ? {} : { ISTIO_META_DNS_CAPTURE: "true" }),
    ...(request.autoRegister === false ? {} : { ISTIO_META_AUTO_REGISTER_GROUP: name }),
  };
}

function sorted(map: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(Object.entries(map).sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** Chapter 1.3: the proxy's metadata, and what the capture of traffic needs. */
function clusterEnvOf(facts: GroupFacts, proxyConfig: ProxyConfig): Map<string, string> {
  const { request } = facts;
  const { name, namespace = "" } = request.group.metadata;
  const { ports, serviceAccount } = templateOf(request.group);
  const ip = request.internalIp ?? request.externalIp;
  return new Map(
    Object.entries({
      ...textMapOf(proxyConfig["proxyMetadata"]),
      ISTIO_INBOUND_PORTS: ports.length === 0 ? "*" : ports.map(([, port]) => port).join(","),
      ISTIO_NAMESPACE: namespace,
      ISTIO_SERVICE: `${name}.${namespace}`,
      ISTIO_SERVICE_CIDR: "*",
      ISTIO_LOCAL_EXCLUDE_PORTS: excludedPorts(proxyConfig["statusPort"]).join(","),
      SERVICE_ACCOUNT: serviceAccount,
      ...(facts.revisionedAddress === undefined ? {} : { CA_ADDR: facts.revisionedAddress }),
      ...(ip === undefined ? {} : { ISTIO_SVC_IP: ip }),
      ...(request.externalIp === undefined ? {} : { REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION: "true" }),
      ...scrapeOf(request.group),
    }),
  );
}

/**
 * The group's prometheus.io annotations as Istio's agent reads them. istioctl leaves them out and its machines' own metrics
 * are not scraped; without the annotations our bundle stays equal to istioctl's.
 */
function scrapeOf(group: KubeObject): Record<string, string> {
  const annotations = textMapOf(fieldsOf(fieldsOf(group.spec)["metadata"])["annotations"]);
  if (annotations["prometheus.io/scrape"] !== "true") return {};
  const { "prometheus.io/port": port, "prometheus.io/path": path } = annotations;
  return {
    ISTIO_PROMETHEUS_ANNOTATIONS: JSON.stringify({
      scrape: "true",
      ...(port === undefined ? {} : { port }),
      ...(path === undefined ? {} : { path }),
    }),
  };
}

function excludedPorts(statusPort: unknown): number[] {
  const always = [22, PORTS.envoyPrometheus, PORTS.readiness];
  const status = typeof statusPort === "number" && statusPort !== 0 ? statusPort : PORTS.status;
  return always.includes(status) ? always : [...always, status];
}
