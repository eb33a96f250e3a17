import { createHash } from "node:crypto";
import { createServer, type TLSSocket, type Server as TlsServer } from "node:tls";
import {
  Server,
  ServerCredentials,
  type ServerDuplexStream,
  type ServerUnaryCall,
  type StatusObject,
  type sendUnaryData,
  status,
} from "@grpc/grpc-js";
import { messageOf } from "../../agent/core/errors.ts";
import { formatSpiffe, parseSpiffe, type SpiffeId } from "../../agent/core/spiffe.ts";
import { Authority } from "./authority.ts";
import { decode, encode, type Message, structValue, TYPE_PREFIX } from "./protos.ts";
import { type MeshService, type ResourceType, resourcesOf, TYPES, type Workload } from "./resources.ts";
import { Tokens, type TokenWish } from "./tokens.ts";

/** What istiod reads of a WorkloadGroup. */
export interface WorkloadGroup {
  readonly name: string;
  readonly namespace: string;
  /** Empty: whoever has the namespace may register. */
  readonly serviceAccount: string;
  readonly labels: Readonly<Record<string, string>>;
}

export interface ControlPlaneOptions {
  readonly address: string;
  /** 0 takes a free one. */
  readonly port: number;
  readonly services: readonly MeshService[];
  readonly groups: readonly WorkloadGroup[];
  /** Default `cluster.local`. */
  readonly trustDomain?: string;
  /** Default: no access log. */
  readonly accessLogFile?: string;
  /** How long a machine that went away keeps its entry. Default 10 s, as istiod's. */
  readonly graceMs?: number;
  /** A CA that takes tokens alone, as one behind istiod may. */
  readonly onlyTokens?: true;
}

export interface ControlPlane {
  readonly port: number;
  /** Name in the server's certificate. */
  readonly serverName: string;
  /** PEM; after a rotation the newer root and the older one. */
  readonly rootCert: string;
  mintToken(wish: TokenWish): string;
  workloads(): readonly Workload[];
  /** What proxies refused, in order: type and their words. */
  refusals(): readonly { readonly type: string; readonly message: string }[];
  setServices(services: readonly MeshService[]): void;
  /** A new root signs from now on; certificates of the older one stay good. */
  rotateRoot(): Promise<void>;
  /** Ends every connection; who wants may come back. */
  dropConnections(): void;
  stop(): Promise<void>;
}

const SERVER_NAME = "istiod.istio-system.svc";
const HEALTH_TYPE = "istio.v1.HealthInformation";
/** Clusters before the endpoints they name, listeners before their routes. */
const PUSH_ORDER: readonly ResourceType[] = [
  TYPES.cluster,
  TYPES.endpoints,
  TYPES.listener,
  TYPES.routes,
  TYPES.names,
];

type Ads = ServerDuplexStream<Message, Message>;

/** One proxy's stream. */
interface Proxy {
  readonly namespace: string;
  readonly entry: string | undefined;
  readonly watches: Map<ResourceType, Watch>;
  send(response: Message): void;
}

interface Watch {
  wildcard: boolean;
  readonly names: Set<string>;
  /** Name → version of what the proxy has. */
  readonly sent: Map<string, string>;
}

class Refused extends Error {
  readonly code: status;
  constructor(code: status, message: string) {
    super(message);
    this.code = code;
  }
}

/**
 * A small, honest stand-in for istiod, for the demo and fast tests: CA, delta ADS, name table, auto-registration, health,
 * on one TLS port. What it answers is checked by `contract.ts`, which runs against the real one too.
 */
export async function startControlPlane(options: ControlPlaneOptions): Promise<ControlPlane> {
  const trustDomain = options.trustDomain ?? "cluster.local";
  let authority = await Authority.create(trustDomain);
  let rootCert = authority.rootPem;
  const tokens = new Tokens();
  const registry = new Registry(options.groups, options.graceMs ?? 10_000, pushAll);
  const proxies = new Set<Proxy>();
  const refusals: { type: string; message: string }[] = [];
  let services = options.services;
  let nonce = 0;

  function pushAll(): void {
    for (const proxy of proxies) for (const type of PUSH_ORDER) push(proxy, type);
  }

  /** Sends what changed; `asked` are names that get an answer in any case, `again` those that are sent even unchanged. */
  function push(
    proxy: Proxy,
    type: ResourceType,
    asked?: readonly string[],
    again: readonly string[] = [],
  ): void {
    const watch = proxy.watches.get(type);
    if (watch === undefined) return;
    const mesh = {
      trustDomain,
      services,
      workloads: registry.list(),
      accessLogFile: options.accessLogFile ?? "",
    };
    const workload = proxy.entry === undefined ? undefined : registry.find(proxy.entry);
    const all = resourcesOf(type, mesh, { namespace: proxy.namespace, workload });
    const resources: Message[] = [];
    for (const [name, message] of all) {
      if (!watch.wildcard && !watch.names.has(name)) continue;
      const value = encode(type, message);
      const version = createHash("sha256").update(value).digest("hex").slice(0, 16);
      if (watch.sent.get(name) === version && !again.includes(name)) continue;
      watch.sent.set(name, version);
      resources.push({ name, version, resource: { type_url: TYPE_PREFIX + type, value } });
    }
    const removed = [...watch.sent.keys()].filter((name) => !all.has(name));
    for (const name of removed) watch.sent.delete(name);
    const unknown = (asked ?? []).filter((name) => name !== "*" && !all.has(name));
    const gone = [...new Set([...removed, ...unknown])];
    if (asked === undefined && resources.length + gone.length === 0) return;
    nonce += 1;
    proxy.send({
      type_url: TYPE_PREFIX + type,
      nonce: String(nonce),
      resources,
      removed_resources: gone,
      system_version_info: String(nonce),
    });
  }

  function onRequest(proxy: Proxy, request: Message): void {
    const type = String(request["type_url"]).slice(TYPE_PREFIX.length);
    const error = request["error_detail"] as { message: string } | null;
    if (type === HEALTH_TYPE) {
      if (proxy.entry !== undefined) registry.setHealth(proxy.entry, error?.message);
      return;
    }
    const known = PUSH_ORDER.find((it) => it === type);
    // istiod too leaves a type unanswered that it has no generator for.
    if (known === undefined) return;
    if (error !== null) refusals.push({ type, message: error.message });
    const subscribe = request["resource_names_subscribe"] as string[];
    const unsubscribe = request["resource_names_unsubscribe"] as string[];
    const before = proxy.watches.get(known);
    const watch = before ?? {
      wildcard: subscribe.length === 0,
      names: new Set<string>(),
      sent: new Map(Object.entries(request["initial_resource_versions"] as Record<string, string>)),
    };
    proxy.watches.set(known, watch);
    if (subscribe.includes("*")) watch.wildcard = true;
    for (const name of subscribe) watch.names.add(name);
    for (const name of unsubscribe) {
      watch.names.delete(name);
      watch.sent.delete(name);
    }
    // The first request may tell what the proxy has already; a later one asks because it does not have it.
    if (before === undefined) push(proxy, known, subscribe);
    else if (subscribe.length > 0) push(proxy, known, subscribe, subscribe);
  }

  /** @throws {Refused} as istiod refuses: without an identity, or one that is not the node's */
  function admit(call: Ads, request: Message): Proxy {
    const node = request["node"] as { id: string; metadata: unknown } | null;
    if (node === null || node.id === "")
      throw new Refused(status.INVALID_ARGUMENT, "missing node information");
    if (node.id.split("~").length !== 4)
      throw new Refused(status.INVALID_ARGUMENT, `invalid node id ${node.id}`);
    const metadata = structValue(node.metadata);
    const text = (key: string): string => String(metadata[key] ?? "");
    const identity = identify(call);
    const namespace = text("NAMESPACE");
    const account = text("SERVICE_ACCOUNT");
    if (identity.namespace !== namespace || (account !== "" && identity.serviceAccount !== account)) {
      const message = `authorization failed: no identities ([${formatSpiffe(identity)}]) matched ${namespace}/${account}`;
      throw new Refused(status.PERMISSION_DENIED, message);
    }
    const entry =
      text("AUTO_REGISTER_GROUP") === "" ? undefined : registry.connect(metadata, identity, node.id);
    return { namespace, entry, watches: new Map(), send: (response) => call.write(response) };
  }

  /** By certificate first, by token second. */
  function identify(call: Ads | ServerUnaryCall<Message, Message>): SpiffeId {
    const names = call.getAuthContext().sslPeerCertificate?.subjectaltname ?? "";
    const byCertificate = parseSpiffe(/URI:([^,]+)/.exec(names)?.[1] ?? "");
    return byCertificate ?? byToken(call);
  }

  function byToken(call: Ads | ServerUnaryCall<Message, Message>): SpiffeId {
    const [header] = call.metadata.get("authorization");
    const subject = tokens.check(String(header ?? "").replace(/^Bearer /, ""));
    if (subject === undefined) throw new Refused(status.UNAUTHENTICATED, "request authenticate failure");
    return { trustDomain, ...subject };
  }

  function deltaStream(call: Ads): void {
    let proxy: Proxy | undefined;
    let over = false;
    const leave = (): void => {
      over = true;
      if (proxy === undefined) return;
      proxies.delete(proxy);
      if (proxy.entry !== undefined) registry.disconnect(proxy.entry);
      proxy = undefined;
    };
    call.on("data", (request: Message) => {
      if (over) return;
      try {
        if (proxy === undefined) {
          proxy = admit(call, request);
          proxies.add(proxy);
        }
        onRequest(proxy, request);
      } catch (thrown) {
        leave();
        call.emit("error", statusOf(thrown));
      }
    });
    call.on("end", () => {
      leave();
      call.end();
    });
    call.on("cancelled", leave).on("error", leave).on("close", leave);
  }

  function createCertificate(
    call: ServerUnaryCall<Message, Message>,
    callback: sendUnaryData<Message>,
  ): void {
    const sign = async (): Promise<Message> => {
      const spiffe = formatSpiffe(options.onlyTokens === true ? byToken(call) : identify(call));
      const ttlMs = Number(call.request["validity_duration"]) * 1000;
      try {
        return {
          cert_chain: [await authority.signRequest(String(call.request["csr"]), spiffe, ttlMs), rootCert],
        };
      } catch (thrown) {
        throw new Refused(status.INVALID_ARGUMENT, `CSR signing error (${messageOf(thrown)})`);
      }
    };
    sign().then(
      (response) => callback(null, response),
      (thrown: unknown) => callback(statusOf(thrown)),
    );
  }

  const server = new Server({ "grpc.max_receive_message_length": -1 });
  server.addService(
    {
      CreateCertificate: method(
        "istio.v1.auth.IstioCertificateService/CreateCertificate",
        "istio.v1.auth.IstioCertificate",
        false,
      ),
    },
    { CreateCertificate: createCertificate },
  );
  const discovery = "envoy.service.discovery.v3";
  server.addService(
    {
      Delta: method(
        `${discovery}.AggregatedDiscoveryService/DeltaAggregatedResources`,
        `${discovery}.DeltaDiscovery`,
        true,
      ),
    },
    { Delta: deltaStream },
  );

  const sockets = new Set<TLSSocket>();
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure());
  const own = await authority.server(
    [SERVER_NAME, "istiod-remote.istio-system.svc", "istio-pilot.istio-system.svc"],
    [options.address],
  );
  const front = createServer(
    {
      key: own.key,
      cert: own.cert,
      ca: rootCert,
      requestCert: true,
      rejectUnauthorized: false,
      ALPNProtocols: ["h2"],
      minVersion: "TLSv1.2",
    },
    (socket) => {
      // As istiod does: none is fine, a wrong one ends the handshake, whatever token would have followed.
      if (socket.getPeerCertificate().raw !== undefined && !socket.authorized) {
        socket.destroy();
        return;
      }
      sockets.add(socket);
      socket.once("close", () => sockets.delete(socket)).on("error", () => undefined);
      injector.injectConnection(socket);
    },
  );
  front.on("tlsClientError", () => undefined);
  const port = await listenOn(front, options.address, options.port);

  const dropConnections = (): void => {
    for (const socket of sockets) socket.destroy();
  };
  return {
    port,
    serverName: SERVER_NAME,
    get rootCert() {
      return rootCert;
    },
    mintToken: (wish) => tokens.mint(wish),
    workloads: () => registry.list(),
    refusals: () => refusals,
    setServices(next) {
      services = next;
      pushAll();
    },
    async rotateRoot() {
      authority = await Authority.create(trustDomain);
      rootCert = authority.rootPem + rootCert;
      front.setSecureContext({ key: own.key, cert: own.cert, ca: rootCert, minVersion: "TLSv1.2" });
    },
    dropConnections,
    async stop() {
      const closed = new Promise((resolve) => front.close(resolve));
      dropConnections();
      server.forceShutdown();
      await closed;
      registry.stop();
    },
  };
}

function listenOn(front: TlsServer, address: string, port: number): Promise<number> {
  return new Promise((resolve, reject) => {
    front.once("error", reject).listen(port, address, () => {
      front.off("error", reject);
      const bound = front.address();
      resolve(typeof bound === "object" && bound !== null ? bound.port : port);
    });
  });
}

function method(path: string, messages: string, streams: boolean) {
  const [request, response] = [`${messages}Request`, `${messages}Response`];
  return {
    path: `/${path}`,
    requestStream: streams,
    responseStream: streams,
    requestSerialize: (message: Message) => encode(request, message),
    requestDeserialize: (bytes: Buffer) => decode(request, bytes),
    responseSerialize: (message: Message) => encode(response, message),
    responseDeserialize: (bytes: Buffer) => decode(response, bytes),
  };
}

function statusOf(thrown: unknown): Partial<StatusObject> & Error {
  const code = thrown instanceof Refused ? thrown.code : status.INTERNAL;
  return Object.assign(new Error(messageOf(thrown)), { code, details: messageOf(thrown) });
}

/** Workload entries, made and taken away as istiod does (ch. 8.3 and 8.4 of the VM protocol). */
class Registry {
  readonly #entries = new Map<
    string,
    { workload: Workload; connections: number; removal?: NodeJS.Timeout }
  >();
  readonly #groups: readonly WorkloadGroup[];
  readonly #graceMs: number;
  readonly #onChange: () => void;

  constructor(groups: readonly WorkloadGroup[], graceMs: number, onChange: () => void) {
    this.#groups = groups;
    this.#graceMs = graceMs;
    this.#onChange = onChange;
  }

  list(): Workload[] {
    return [...this.#entries.values()].map((entry) => entry.workload);
  }

  find(key: string): Workload | undefined {
    return this.#entries.get(key)?.workload;
  }

  /** @returns the entry's key */
  connect(metadata: Record<string, unknown>, identity: SpiffeId, node: string): string {
    const namespace = String(metadata["NAMESPACE"]);
    const name = String(metadata["AUTO_REGISTER_GROUP"]);
    const failed = (why: string): Refused =>
      new Refused(status.FAILED_PRECONDITION, `auto-registration WorkloadEntry of ${node} failed: ${why}`);
    const group = this.#groups.find((it) => it.name === name && it.namespace === namespace);
    if (group === undefined) throw failed(`cannot find WorkloadGroup ${namespace}/${name}`);
    if (group.serviceAccount !== "" && group.serviceAccount !== identity.serviceAccount) {
      throw failed(`service account mismatch: "${group.serviceAccount}" vs "${identity.serviceAccount}"`);
    }
    const [address = ""] = String(metadata["INSTANCE_IPS"] ?? "").split(",");
    if (address === "") throw failed("no address in INSTANCE_IPS");
    const network = String(metadata["NETWORK"] ?? "");
    const entryName = [name, address.replaceAll(":", "-"), ...(network === "" ? [] : [network])]
      .join("-")
      .slice(-253);
    const key = `${namespace}/${entryName}`;
    const known = this.#entries.get(key);
    if (known !== undefined) {
      clearTimeout(known.removal);
      known.connections += 1;
      known.workload = { ...known.workload, connected: true };
      return key;
    }
    const proxyConfig = (metadata["PROXY_CONFIG"] ?? {}) as Record<string, unknown>;
    const workload: Workload = {
      name: entryName,
      namespace,
      group: name,
      address,
      serviceAccount: group.serviceAccount,
      labels: { ...group.labels, ...(metadata["LABELS"] as Record<string, string> | undefined) },
      health: proxyConfig["readinessProbe"] === undefined ? { healthy: true, message: "" } : undefined,
      connected: true,
    };
    this.#entries.set(key, { workload, connections: 1 });
    this.#onChange();
    return key;
  }

  disconnect(key: string): void {
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    entry.connections -= 1;
    if (entry.connections > 0) return;
    entry.workload = { ...entry.workload, connected: false };
    entry.removal = setTimeout(() => {
      this.#entries.delete(key);
      this.#onChange();
    }, this.#graceMs).unref();
  }

  /** @param reason why it is unhealthy; undefined: it is healthy */
  setHealth(key: string, reason: string | undefined): void {
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    entry.workload = { ...entry.workload, health: { healthy: reason === undefined, message: reason ?? "" } };
    this.#onChange();
  }

  stop(): void {
    for (const { removal } of this.#entries.values()) clearTimeout(removal);
  }
}
