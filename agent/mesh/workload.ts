import { VmmeshError } from "../core/errors.ts";
import { ipFamily, isRoutable, parseHostPort, whyNotCidr } from "../core/net.ts";
import { PORTS } from "../core/paths.ts";
import { DAY_MS, MINUTE_MS, parseDuration } from "../core/time.ts";
import type { Net } from "../platform/host.ts";
import { parseProbe } from "./probe.ts";
import type { ProxyConfig, Workload, WorkloadPort } from "./types.ts";
import { type Fields, isFields, textMapOf, textOf } from "./yaml.ts";

/** What is known of the machine itself. */
export interface MachineNames {
  readonly hostname: string;
  /** As `Host.net.addresses()` gives them. */
  readonly addresses: ReturnType<Net["addresses"]>;
}

export interface WorkloadInput {
  /** From the mesh. */
  readonly clusterEnv: ReadonlyMap<string, string>;
  /** The machine's own wishes: they win. */
  readonly sidecarEnv: ReadonlyMap<string, string>;
  readonly proxyConfig: ProxyConfig;
  readonly machine: MachineNames;
}

/** SSH, and what scrapes and probes from outside must reach without mutual TLS (istioctl writes the same list since 1.13). */
const NEVER_CAPTURED_INBOUND = [22, PORTS.status, PORTS.readiness, PORTS.envoyPrometheus] as const;

const XDS_PORT = 15012;

/** Bridges and tunnels of container tools: their addresses are the machine's, but no peer reaches it by them. */
const CONTAINER_INTERFACE =
  /^(docker|br-|cni|cbr|virbr|lxc|lxdbr|podman|flannel|cali|cilium|weave|vxlan|tunl|veth)/;
/** kube-proxy in IPVS mode puts every service address of the cluster on this one: none of them is the machine's. */
const SERVICE_INTERFACE = "kube-ipvs0";

/**
 * Everything the agent knows of its workload, from cluster.env < sidecar.env and mesh.yaml. Where Istio's script lets the
 * mesh win, here the machine's own file does: it is the one an operator edits.
 *
 * @throws {VmmeshError} CONFIG_MALFORMED naming key and file, NO_ADDRESS
 * @see chapters 1.3, 2.3, 2.4, 3.2 to 3.4 and 3.9 of Istio's VM protocol
 */
export function workloadOf(input: WorkloadInput): Workload {
  const { clusterEnv, sidecarEnv, proxyConfig, machine } = input;
  const env = new Env(clusterEnv, sidecarEnv);
  const proxyMetadata = textMapOf(proxyConfig["proxyMetadata"]);
  const meta = prefixed("ISTIO_META_", proxyMetadata, env);
  const { LABELS: labels = {}, ...metaJson } = metaJsonOf(proxyMetadata, env);

  const namespace = env.get("ISTIO_NAMESPACE") || env.get("POD_NAMESPACE");
  if (namespace === undefined || namespace === "") {
    throw malformed(
      "ISTIO_NAMESPACE",
      "cluster.env",
      "is missing: nobody knows which namespace the machine belongs to",
    );
  }
  const workloadGroup = meta["AUTO_REGISTER_GROUP"] || undefined;
  const workloadName = meta["WORKLOAD_NAME"] || workloadGroup || shortName(machine.hostname);
  const addresses = addressesOf(env, machine);
  const interception = interceptionOf(env, meta);
  const inbound = env.get("ISTIO_INBOUND_PORTS") ?? "";
  return {
    namespace,
    serviceAccount: env.get("SERVICE_ACCOUNT") || "default",
    trustDomain: env.get("TRUST_DOMAIN") || "cluster.local",
    workloadGroup,
    workloadName,
    serviceCluster: serviceClusterOf(env, proxyConfig, textMapOf(labels), workloadName, namespace),
    clusterId: meta["CLUSTER_ID"] ?? "",
    meshId: meta["MESH_ID"] ?? "",
    network: meta["NETWORK"] ?? "",
    labels: textMapOf(labels),
    ports: podPorts(meta["POD_PORTS"]),
    discoveryAddress: discoveryAddressOf(env, proxyConfig),
    istiodAddresses: env.local("VMMESH_ISTIOD_ADDRESSES"),
    instanceName:
      sidecarEnv.get("VMMESH_INSTANCE_NAME") || env.get("POD_NAME") || shortName(machine.hostname),
    addresses,
    inbound:
      inbound.trim() === "*" ? { kind: "all" } : { kind: "ports", ports: env.ports("ISTIO_INBOUND_PORTS") },
    interception,
    backend: backendOf(sidecarEnv),
    excludeInterfaces: items(env.get("ISTIO_EXCLUDE_INTERFACES")),
    virtualInterfaces: items(env.get("KUBE_VIRT_INTERFACES")),
    ruleComments: (env.get("VMMESH_RULE_COMMENTS") ?? "").trim().toLowerCase() !== "false",
    dropInvalid: isTrue(env.get("INVALID_DROP") || env.get("DROP_INVALID")),
    inboundExcludePorts: ascending([
      ...NEVER_CAPTURED_INBOUND,
      ...portList(clusterEnv.get("ISTIO_LOCAL_EXCLUDE_PORTS"), "ISTIO_LOCAL_EXCLUDE_PORTS", "cluster.env"),
      ...portList(sidecarEnv.get("ISTIO_LOCAL_EXCLUDE_PORTS"), "ISTIO_LOCAL_EXCLUDE_PORTS", "sidecar.env"),
    ]),
    outboundCidrs:
      (env.get("ISTIO_SERVICE_CIDR") ?? "").trim() === "*" ? ["*"] : env.cidrs("ISTIO_SERVICE_CIDR"),
    outboundExcludeCidrs: unique([
      ...env.cidrs("ISTIO_SERVICE_EXCLUDE_CIDR"),
      ...env.cidrs("VMMESH_OUTBOUND_EXCLUDE_CIDRS"),
    ]),
    outboundExcludePorts: ascending([
      ...env.ports("ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE"),
      ...env.ports("VMMESH_OUTBOUND_EXCLUDE_PORTS"),
    ]),
    outboundPorts: ascending(env.ports("ISTIO_OUTBOUND_PORTS")),
    outboundOwners: {
      only: {
        users: env.local("VMMESH_OUTBOUND_OWNER_USERS"),
        groups: everybody(env.list("ISTIO_OUTBOUND_OWNER_GROUPS")),
        units: env.local("VMMESH_OUTBOUND_UNITS"),
      },
      never: {
        users: env.local("VMMESH_OUTBOUND_OWNER_USERS_EXCLUDE"),
        groups: env.list("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"),
        units: env.local("VMMESH_OUTBOUND_UNITS_EXCLUDE"),
      },
    },
    meshCidrs: env.cidrs("VMMESH_MESH_CIDRS"),
    failurePolicy: env.local("VMMESH_FAILURE_POLICY"),
    dnsCapture: isTrue(meta["DNS_CAPTURE"]),
    probe: parseProbe(proxyConfig["readinessProbe"]),
    probeHost: isTrue(env.get("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION"))
      ? "localhost"
      : (addresses[0] ?? "localhost"),
    proxyConfig,
    // Never `binaryPath` of the ProxyConfig: the mesh does not say what a machine runs.
    envoyPath: sidecarEnv.get("VMMESH_ENVOY") || "envoy",
    appMetrics: env.get("ISTIO_PROMETHEUS_ANNOTATIONS") || undefined,
    metricsTls: metricsTlsOf(sidecarEnv.get("VMMESH_METRICS_TLS")),
    certificateTtlMs: certificateTtlOf(env),
    keyKind: keyKindOf(sidecarEnv.get("VMMESH_KEY_KIND")),
    credentialExec: credentialExecOf(sidecarEnv.get("VMMESH_CREDENTIAL_EXEC")),
    // istiod makes the inbound listener by this word; without it it is not transparent.
    meta:
      interception.mode === "TPROXY" || "INTERCEPTION_MODE" in meta
        ? { ...meta, INTERCEPTION_MODE: interception.mode }
        : meta,
    metaJson,
  };
}

const DEFAULT_ROUTE_TABLE = 133;

/**
 * What the script of Istio's package reads, and where that is silent the word that is meant for istiod.
 *
 * @throws {VmmeshError} CONFIG_MALFORMED for a mode, mark or table that cannot be
 */
function interceptionOf(env: Env, meta: Readonly<Record<string, string>>): Workload["interception"] {
  const named = env.get("ISTIO_INBOUND_INTERCEPTION_MODE");
  const key = named ? "ISTIO_INBOUND_INTERCEPTION_MODE" : "ISTIO_META_INTERCEPTION_MODE";
  const mode = named || meta["INTERCEPTION_MODE"] || "REDIRECT";
  if (mode !== "REDIRECT" && mode !== "TPROXY")
    throw malformed(key, env.file(key), `is \`${mode}\`, which is neither REDIRECT nor TPROXY`);
  const mark = env.get("ISTIO_INBOUND_TPROXY_MARK") || "1337";
  if (mode === "TPROXY" && Number(mark) !== 1337) {
    const marks = "ISTIO_INBOUND_TPROXY_MARK";
    throw malformed(
      marks,
      env.file(marks),
      `is \`${mark}\`, but istiod has Envoy use 1337 whatever is set here`,
    );
  }
  const tables = "ISTIO_INBOUND_TPROXY_ROUTE_TABLE";
  const routeTable = Number(env.get(tables) || DEFAULT_ROUTE_TABLE);
  if (!Number.isInteger(routeTable) || routeTable < 1 || routeTable > 252)
    throw malformed(tables, env.file(tables), `is \`${env.get(tables)}\`, not a table between 1 and 252`);
  return { mode, routeTable };
}

const BACKENDS: readonly Workload["backend"][] = ["auto", "nft", "legacy", "nftables"];

/** The machine's alone. @throws {VmmeshError} CONFIG_MALFORMED for a word that is none */
function backendOf(sidecarEnv: ReadonlyMap<string, string>): Workload["backend"] {
  const named = sidecarEnv.get("VMMESH_BACKEND") || "auto";
  const backend = BACKENDS.find((it) => it === named);
  if (backend === undefined)
    throw malformed("VMMESH_BACKEND", "sidecar.env", `is \`${named}\`, not one of ${BACKENDS.join(", ")}`);
  return backend;
}

/** SECRET_TTL, as Istio's agent reads it. @throws {VmmeshError} CONFIG_MALFORMED if it is no duration of a minute or more */
function certificateTtlOf(env: Env): number {
  const text = env.get("SECRET_TTL") ?? "";
  if (text === "") return DAY_MS;
  const ms = parseDuration(text);
  if (ms === undefined || ms < MINUTE_MS) {
    throw malformed(
      "SECRET_TTL",
      env.file("SECRET_TTL"),
      `is \`${text}\`, not a duration of a minute or more such as 24h`,
    );
  }
  return ms;
}

/** @throws {VmmeshError} CONFIG_MALFORMED for another word */
function keyKindOf(text: string | undefined): Workload["keyKind"] {
  const kind = text || "ecdsa-p256";
  if (kind === "ecdsa-p256" || kind === "rsa-2048") return kind;
  throw malformed("VMMESH_KEY_KIND", "sidecar.env", `is \`${kind}\`, neither ecdsa-p256 nor rsa-2048`);
}

/** @throws {VmmeshError} CONFIG_MALFORMED if it is neither `workload` nor an absolute path */
function metricsTlsOf(text: string | undefined): string | undefined {
  if (text === undefined || text === "") return undefined;
  if (text === "workload" || text.startsWith("/")) return text;
  throw malformed(
    "VMMESH_METRICS_TLS",
    "sidecar.env",
    `is \`${text}\`, neither \`workload\` nor the absolute path of a folder`,
  );
}

/** The machine's own file alone says it: the mesh does not say what a machine runs. */
function credentialExecOf(path: string | undefined): string | undefined {
  if (path === undefined || path === "") return undefined;
  if (!path.startsWith("/")) {
    throw malformed("VMMESH_CREDENTIAL_EXEC", "sidecar.env", `is \`${path}\`, which is not an absolute path`);
  }
  return path;
}

/** Both files as one: what the machine says wins; keys of vmmesh itself are the machine's alone. */
class Env {
  readonly #mesh: ReadonlyMap<string, string>;
  readonly #machine: ReadonlyMap<string, string>;

  constructor(mesh: ReadonlyMap<string, string>, machine: ReadonlyMap<string, string>) {
    this.#mesh = mesh;
    this.#machine = machine;
  }

  get(key: string): string | undefined {
    const own = this.#machine.get(key);
    return own === undefined && !key.startsWith("VMMESH_") ? this.#mesh.get(key) : own;
  }

  *keys(): Generator<string> {
    yield* new Set([...this.#mesh.keys(), ...this.#machine.keys()]);
  }

  list(key: string): string[] {
    return items(this.get(key));
  }

  local(key: string): string[] {
    return items(this.#machine.get(key));
  }

  file(key: string): string {
    return this.#machine.has(key) ? "sidecar.env" : "cluster.env";
  }

  ports(key: string): number[] {
    return portList(this.get(key), key, this.file(key));
  }

  cidrs(key: string): string[] {
    const list = items(this.get(key));
    for (const item of list) {
      const why = whyNotCidr(item);
      if (why !== undefined) throw malformed(key, this.file(key), `names \`${item}\`, which ${why}`);
    }
    return list;
  }
}

const items = (text: string | undefined): string[] =>
  (text ?? "")
    .split(",")
    .map((item) => item.trim())
    .filter((item) => item !== "");

/** `*`, Istio's default, names nobody in particular. */
const everybody = (groups: readonly string[]): readonly string[] => (groups.includes("*") ? [] : groups);
const unique = <T>(list: readonly T[]): T[] => [...new Set(list)];
const ascending = (list: readonly number[]): number[] => unique(list).sort((a, b) => a - b);
const shortName = (hostname: string): string => hostname.split(".", 1)[0] || "localhost";

/** As Go's strconv.ParseBool and istiod's StringBool read it. */
function isTrue(text: string | undefined): boolean {
  return ["1", "t", "T", "true", "TRUE", "True"].includes(text ?? "");
}

function portList(text: string | undefined, key: string, file: string): number[] {
  return items(text).map((item) => {
    const port = /^\d{1,5}$/.test(item) ? Number(item) : 0;
    if (port < 1 || port > 65_535) throw malformed(key, file, `names \`${item}\`, which is not a port`);
    return port;
  });
}

/** `ISTIO_META_X` and its kin, without the prefix: from the ProxyConfig first, from the environment over it. */
function prefixed(
  prefix: string,
  proxyMetadata: Readonly<Record<string, string>>,
  env: Env,
): Record<string, string> {
  const found: Record<string, string> = {};
  for (const [key, value] of Object.entries(proxyMetadata)) {
    if (key.startsWith(prefix)) found[key.slice(prefix.length)] = value;
  }
  for (const key of env.keys()) {
    if (key.startsWith(prefix)) found[key.slice(prefix.length)] = env.get(key) ?? "";
  }
  return found;
}

function metaJsonOf(proxyMetadata: Readonly<Record<string, string>>, env: Env): Record<string, Fields> {
  return Object.fromEntries(
    Object.entries(prefixed("ISTIO_METAJSON_", proxyMetadata, env)).map(([name, text]) => {
      const value = text === "" ? {} : parseJson(text);
      if (!isFields(value)) throw malformed(`ISTIO_METAJSON_${name}`, "cluster.env", "is not a JSON object");
      return [name, value];
    }),
  );
}

/** undefined if the text is not JSON. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** `[{"name":"http","containerPort":8080,"protocol":""}]` */
function podPorts(text: string | undefined): WorkloadPort[] {
  if (text === undefined || text === "") return [];
  const list = parseJson(text);
  const wrong = (): VmmeshError =>
    malformed("ISTIO_META_POD_PORTS", "cluster.env", "is not a JSON list of names and container ports");
  if (!Array.isArray(list)) throw wrong();
  return list.map((item: unknown) => {
    const name = isFields(item) ? textOf(item["name"]) : undefined;
    const port = isFields(item) ? item["containerPort"] : undefined;
    if (typeof port !== "number" || !Number.isInteger(port) || port < 1 || port > 65_535) throw wrong();
    return { name: name ?? "", port };
  });
}

function discoveryAddressOf(env: Env, proxyConfig: ProxyConfig): string {
  const configured =
    textOf(proxyConfig["discoveryAddress"]) ||
    `istiod.${env.get("ISTIO_SYSTEM_NAMESPACE") || "istio-system"}.svc:${XDS_PORT}`;
  const port = env.get("ISTIO_PILOT_PORT") ?? "";
  const address =
    env.get("PILOT_ADDRESS") ||
    (port === "" ? configured : `${configured.slice(0, configured.lastIndexOf(":"))}:${port}`);
  if (parseHostPort(address) === undefined) {
    throw malformed("discoveryAddress", "mesh.yaml", `is \`${address}\`, which is not HOST:PORT`);
  }
  return address;
}

function serviceClusterOf(
  env: Env,
  proxyConfig: ProxyConfig,
  labels: Readonly<Record<string, string>>,
  workloadName: string,
  namespace: string,
): string {
  const named = [env.get("ISTIO_SERVICE"), textOf(proxyConfig["serviceCluster"])];
  const explicit = named.find((name) => name !== undefined && name !== "" && name !== "istio-proxy");
  return explicit ?? `${labels["app"] || workloadName}.${namespace}`;
}

/**
 * The address to register first, then the others. It decides the name of the WorkloadEntry, so the order is fixed by
 * rules, not by chance: what the operator said, then the machine's own interfaces as the kernel lists them, bridges of
 * container tools last.
 */
function addressesOf(env: Env, machine: MachineNames): string[] {
  const wished = env.get("ISTIO_SVC_IP") ?? "";
  if (wished !== "" && ipFamily(wished) === undefined) {
    throw malformed("ISTIO_SVC_IP", env.file("ISTIO_SVC_IP"), `is \`${wished}\`, which is not an IP address`);
  }
  const own = machine.addresses.filter(
    (entry) => isRoutable(entry.address) && entry.interface !== SERVICE_INTERFACE,
  );
  const addresses = unique([
    ...(wished === "" ? [] : [wished]),
    ...own.filter((entry) => !CONTAINER_INTERFACE.test(entry.interface)).map(({ address }) => address),
    ...own.filter((entry) => CONTAINER_INTERFACE.test(entry.interface)).map(({ address }) => address),
  ]);
  if (addresses.length === 0) {
    throw new VmmeshError(
      "NO_ADDRESS",
      "this machine has no address that a peer could reach: only loopback and link-local ones",
      {
        next: "Bring its network up, or say the address with `--ip A` (kept as ISTIO_SVC_IP in sidecar.env).",
      },
    );
  }
  return addresses;
}

function malformed(key: string, file: string, what: string): VmmeshError {
  return new VmmeshError("CONFIG_MALFORMED", `${key} in ${file} ${what}`, {
    next: `Correct ${key} in ${file}, or join again with a new bundle.`,
  });
}
