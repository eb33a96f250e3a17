import assert from "node:assert/strict";
import { webcrypto, X509Certificate } from "node:crypto";
import "reflect-metadata";
import {
  Client,
  type ClientDuplexStream,
  credentials,
  Metadata,
  type ServiceError,
  status,
} from "@grpc/grpc-js";
import * as x509 from "@peculiar/x509";
import { decode, encode, type Message, TYPE_PREFIX, toStruct } from "./protos.ts";
import { TYPES } from "./resources.ts";

/** Where a control plane is. */
export interface Endpoint {
  readonly address: string;
  readonly port: number;
  /** Name that its certificate must carry. */
  readonly serverName: string;
  readonly rootCert: string;
  readonly clusterId: string;
}

/** A control plane and a workload that may join it: the embedded one's or the real istiod's. */
export interface Target extends Endpoint {
  readonly trustDomain: string;
  /** Good for `istio-ca`, of the service account below. */
  readonly token: string;
  readonly namespace: string;
  readonly serviceAccount: string;
  /** A WorkloadGroup of that namespace and service account. */
  readonly group: string;
  /** A service that selects the group's workloads, and the cluster that an outside client has for it. */
  readonly service: { readonly host: string; readonly cluster: string; readonly inboundCluster: string };
}

export interface ContractCheck {
  readonly name: string;
  check(target: Target): Promise<void>;
}

const DEADLINE_MS = 20_000;
const CREATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const WAIT_MS = 15_000;

/**
 * In istiod 1.31 a first stream races with the watch on the entry that it makes: about one in six got listeners for its
 * ports, but never the clusters that they name. The next stream of the same machine has them.
 */
const RACE_MS = 3_000;

/** What vmmesh leans on in a control plane, one promise per row. */
export const CONTRACT: readonly ContractCheck[] = [
  {
    name: "a token gets a certificate for the token's identity, whatever the request asks for",
    async check(target) {
      const { chain } = await enroll(target, { token: target.token });
      assert.equal(spiffeOf(chain[0]), spiffe(target));
    },
  },
  {
    name: "the answer ends with the roots, and the chain leads to one of them",
    async check(target) {
      const { chain } = await enroll(target, { token: target.token });
      assert.ok(chain.length > 1, "leaf and roots are separate elements");
      const root = new X509Certificate(chain.at(-1) ?? "");
      assert.ok(new X509Certificate(chain[chain.length - 2] ?? "").verify(root.publicKey));
    },
  },
  {
    name: "a certificate gets the next one without a token",
    async check(target) {
      const first = await enroll(target, { token: target.token });
      const next = await enroll(target, { client: first });
      assert.equal(spiffeOf(next.chain[0]), spiffe(target));
      assert.notEqual(
        new X509Certificate(next.chain[0] ?? "").serialNumber,
        new X509Certificate(first.chain[0] ?? "").serialNumber,
      );
    },
  },
  {
    name: "a token of somebody else is refused",
    async check(target) {
      const forged = `${target.token.split(".").slice(0, 2).join(".")}.${Buffer.alloc(64, 7).toString("base64url")}`;
      await refused(enroll(target, { token: forged }), status.UNAUTHENTICATED, /authenticate/);
    },
  },
  {
    name: "no credential is refused",
    check: (target) => refused(enroll(target, {}), status.UNAUTHENTICATED, /authenticate/),
  },
  {
    name: "a lifetime above the limit is refused with the limit",
    async check(target) {
      const wish = enroll(target, { token: target.token, seconds: 10_000 * 3600 });
      await refused(wish, undefined, /greater than the max allowed TTL/);
    },
  },
  {
    name: "clusters: those for what the mesh does not know, and one per service port",
    async check(target) {
      await using stream = new AdsStream(target, nodeOf(target, "10.254.0.1"));
      const clusters = await stream.subscribe(TYPES.cluster);
      const names = clusters.map((it) => it.name);
      for (const name of ["PassthroughCluster", "BlackHoleCluster", target.service.cluster])
        assert.ok(names.includes(name), `${name} in ${names}`);
    },
  },
  {
    name: "listeners: virtualOutbound on 15001, virtualInbound on 15006",
    async check(target) {
      await using stream = new AdsStream(target, nodeOf(target, "10.254.0.2"));
      await stream.subscribe(TYPES.cluster);
      const listeners = await stream.subscribe(TYPES.listener);
      const portOf = (name: string): unknown => {
        const address = listeners.find((it) => it.name === name)?.message["address"] as {
          socket_address?: { port_value?: number };
        };
        return address?.socket_address?.port_value;
      };
      assert.deepEqual([portOf("virtualOutbound"), portOf("virtualInbound")], [15001, 15006]);
    },
  },
  {
    name: "the name table has the service, and comes as one resource",
    async check(target) {
      await using stream = new AdsStream(target, nodeOf(target, "10.254.0.3"));
      await stream.subscribe(TYPES.cluster);
      await stream.subscribe(TYPES.listener);
      const tables = await stream.subscribe(TYPES.names);
      assert.equal(tables.length, 1);
      const table = tables[0]?.message["table"] as Record<string, { ips: string[]; shortname: string }>;
      assert.ok((table[target.service.host]?.ips.length ?? 0) > 0, `${target.service.host} has an address`);
    },
  },
  {
    name: "a machine that connects with its group is registered, has its inbound cluster at its second stream at the latest, and is an endpoint",
    async check(target) {
      const node = nodeOf(target, "10.254.0.4", { group: true });
      await using machine = new AdsStream(target, node);
      await machine.subscribe(TYPES.cluster);
      const inbound = (it: Resource): boolean => it.name === target.service.inboundCluster;
      await machine.until(TYPES.cluster, inbound, RACE_MS).catch(async () => {
        await using again = new AdsStream(target, node);
        await again.subscribe(TYPES.cluster);
        await again.until(TYPES.cluster, inbound);
      });
      await using peer = new AdsStream(target, nodeOf(target, "10.254.0.5"));
      await peer.subscribe(TYPES.endpoints, [target.service.cluster]);
      await peer.until(TYPES.endpoints, (it) => JSON.stringify(it.message).includes('"10.254.0.4"'));
    },
  },
  {
    name: "a machine with a probe is an endpoint while it reports healthy, and not before or after",
    async check(target) {
      const has = (it: Resource): boolean => JSON.stringify(it.message).includes('"10.254.0.6"');
      await using machine = new AdsStream(target, nodeOf(target, "10.254.0.6", { group: true, probe: true }));
      await machine.subscribe(TYPES.cluster);
      await machine.subscribe(TYPES.listener);
      await using peer = new AdsStream(target, nodeOf(target, "10.254.0.7"));
      const [before] = await peer.subscribe(TYPES.endpoints, [target.service.cluster]);
      assert.ok(before !== undefined && !has(before), "no endpoint before the first report");
      machine.send({ type_url: `${TYPE_PREFIX}istio.v1.HealthInformation` });
      await peer.until(TYPES.endpoints, has);
      machine.send({
        type_url: `${TYPE_PREFIX}istio.v1.HealthInformation`,
        error_detail: { code: 13, message: "probe failed" },
      });
      await peer.until(TYPES.endpoints, (it) => !has(it));
    },
  },
  {
    name: "a group that does not exist ends the stream and names it",
    async check(target) {
      await using stream = new AdsStream(target, nodeOf(target, "10.254.0.8", { group: "no-such-group" }));
      await refused(
        stream.subscribe(TYPES.cluster),
        status.FAILED_PRECONDITION,
        /cannot find WorkloadGroup .*no-such-group/,
      );
    },
  },
  {
    name: "a node of another namespace than the credential's is refused",
    async check(target) {
      const node = nodeOf({ ...target, namespace: "kube-system" }, "10.254.0.9");
      await using stream = new AdsStream(target, node);
      await refused(stream.subscribe(TYPES.cluster), status.PERMISSION_DENIED, /no identities/);
    },
  },
  {
    name: "a stream whose first request tells no node is refused",
    async check(target) {
      await using stream = new AdsStream(target, undefined);
      await refused(stream.subscribe(TYPES.cluster), status.INVALID_ARGUMENT, /node/);
    },
  },
];

interface Credentials {
  readonly token?: string;
  readonly client?: { readonly key: string; readonly chain: readonly string[] };
  readonly seconds?: number;
}

interface Resource {
  readonly name: string;
  readonly message: Message;
}

/** @returns a fresh key (PKCS#8 PEM) and the elements of the CA's answer */
export async function enroll(target: Endpoint, how: Credentials): Promise<{ key: string; chain: string[] }> {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const keys = await webcrypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  const san = new x509.SubjectAlternativeNameExtension(
    [{ type: "url", value: "spiffe://somebody/ns/else/sa/root" }],
    true,
  );
  const request = await x509.Pkcs10CertificateRequestGenerator.create({
    keys,
    signingAlgorithm: algorithm,
    extensions: [san],
  });
  const client = dial(target, how.client);
  try {
    const answer = await new Promise<Message>((resolve, reject) => {
      client.makeUnaryRequest(
        CREATE,
        (message: Message) => encode("istio.v1.auth.IstioCertificateRequest", message),
        (bytes) => decode("istio.v1.auth.IstioCertificateResponse", bytes),
        {
          csr: request.toString("pem"),
          validity_duration: how.seconds ?? 3600,
          metadata: toStruct({ CertSigner: "" }),
        },
        headers(target, how.token),
        { deadline: Date.now() + DEADLINE_MS },
        (error: ServiceError | null, response?: Message) =>
          response === undefined ? reject(error) : resolve(response),
      );
    });
    const key = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey)).toString("base64");
    return {
      key: `-----BEGIN PRIVATE KEY-----\n${key.replaceAll(/.{64}/g, "$&\n").trimEnd()}\n-----END PRIVATE KEY-----\n`,
      chain: answer["cert_chain"] as string[],
    };
  } finally {
    client.close();
  }
}

function dial(target: Endpoint, client?: Credentials["client"]): Client {
  const tls = credentials.createSsl(
    Buffer.from(target.rootCert),
    ...(client === undefined
      ? []
      : [Buffer.from(client.key), Buffer.from(client.chain.slice(0, -1).join(""))]),
  );
  return new Client(`${target.address}:${target.port}`, tls, {
    "grpc.ssl_target_name_override": target.serverName,
    "grpc.default_authority": target.serverName,
    "grpc.use_local_subchannel_pool": 1,
  });
}

function headers(target: Endpoint, token: string | undefined): Metadata {
  const metadata = new Metadata();
  metadata.set("clusterid", target.clusterId);
  if (token !== undefined) metadata.set("authorization", `Bearer ${token}`);
  return metadata;
}

function nodeOf(
  target: Target,
  address: string,
  more: { group?: boolean | string; probe?: boolean } = {},
): Message {
  const { namespace, serviceAccount } = target;
  const name = `contract-${address.replaceAll(".", "-")}`;
  const group = more.group === true ? target.group : more.group;
  const metadata = {
    NAME: name,
    NAMESPACE: namespace,
    SERVICE_ACCOUNT: serviceAccount,
    INSTANCE_IPS: address,
    CLUSTER_ID: target.clusterId,
    ISTIO_VERSION: "1.31.0",
    DNS_CAPTURE: "true",
    ...(typeof group === "string" ? { AUTO_REGISTER_GROUP: group } : {}),
    PROXY_CONFIG: more.probe === true ? { readinessProbe: { tcpSocket: { port: 9080 } } } : {},
  };
  return {
    id: `sidecar~${address}~${name}.${namespace}~${namespace}.svc.cluster.local`,
    cluster: `${target.group}.${namespace}`,
    metadata: toStruct(metadata),
  };
}

/** One delta stream, authenticated by the target's token; answers are acknowledged as they come. */
class AdsStream implements AsyncDisposable {
  readonly #client: Client;
  readonly #stream: ClientDuplexStream<Message, Message>;
  readonly #seen: { type: string; resource: Resource | undefined }[] = [];
  #node: Message | undefined;
  #ended: Error | undefined;
  #wake: () => void = () => undefined;

  constructor(target: Target, node: Message | undefined) {
    this.#node = node;
    this.#client = dial(target);
    const messages = "envoy.service.discovery.v3.DeltaDiscovery";
    this.#stream = this.#client.makeBidiStreamRequest(
      DELTA,
      (message: Message) => encode(`${messages}Request`, message),
      (bytes) => decode(`${messages}Response`, bytes),
      headers(target, target.token),
      { deadline: Date.now() + DEADLINE_MS },
    );
    this.#stream.on("data", (response: Message) => this.#onResponse(response));
    this.#stream.on("error", (error) => {
      this.#ended = error;
      this.#wake();
    });
  }

  send(request: Message): void {
    this.#stream.write({ ...request, ...(this.#node === undefined ? {} : { node: this.#node }) });
    this.#node = undefined;
  }

  /** @returns the resources of the first answer */
  async subscribe(type: string, names: readonly string[] = []): Promise<Resource[]> {
    this.send({ type_url: TYPE_PREFIX + type, resource_names_subscribe: names });
    await this.#wait(() => this.#seen.find((it) => it.type === type));
    return this.#seen.flatMap((it) => (it.type === type && it.resource !== undefined ? [it.resource] : []));
  }

  /** Waits until the last word on some resource of the type fits. */
  async until(type: string, fits: (resource: Resource) => boolean, waitMs = WAIT_MS): Promise<void> {
    await this.#wait(() => {
      const latest = new Map(
        this.#seen.flatMap((it) =>
          it.type === type && it.resource !== undefined ? [[it.resource.name, it.resource]] : [],
        ),
      );
      return [...latest.values()].find(fits);
    }, waitMs);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stream.cancel();
    this.#client.close();
  }

  #onResponse(response: Message): void {
    const url = String(response["type_url"]);
    const type = url.slice(TYPE_PREFIX.length);
    this.#seen.push({ type, resource: undefined });
    for (const { name, resource } of response["resources"] as {
      name: string;
      resource: { value: Buffer };
    }[]) {
      this.#seen.push({ type, resource: { name, message: decode(type, resource.value) } });
    }
    this.send({ type_url: url, response_nonce: response["nonce"] });
    this.#wake();
  }

  async #wait<T>(look: () => T | undefined, waitMs = WAIT_MS): Promise<T> {
    const end = Date.now() + waitMs;
    for (;;) {
      const found = look();
      if (found !== undefined) return found;
      if (this.#ended !== undefined) throw this.#ended;
      const left = end - Date.now();
      if (left <= 0) throw new Error("the control plane did not send what was waited for");
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left);
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
  }
}

async function refused(work: Promise<unknown>, code: status | undefined, words: RegExp): Promise<void> {
  await assert.rejects(work, (error: ServiceError) => {
    if (code !== undefined) assert.equal(status[error.code], status[code], error.details);
    assert.match(error.details ?? error.message, words);
    return true;
  });
}

function spiffe(target: Target): string {
  return `spiffe://${target.trustDomain}/ns/${target.namespace}/sa/${target.serviceAccount}`;
}

function spiffeOf(pem: string | undefined): string | undefined {
  return new X509Certificate(pem ?? "").subjectAltName?.replace(/^URI:/, "");
}
