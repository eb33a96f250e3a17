import {
  BinaryWriter,
  put,
  putPresent,
  type RpcStatus,
  readMapEntry,
  readMessage,
  readStatus,
  writeStatus,
} from "./wire.ts";

/**
 * The envelope of delta xDS (envoy.service.discovery.v3; field numbers from discovery.proto). Node and resources stay
 * bytes: vmmesh never re-encodes what it passes on.
 */
export interface DeltaRequest {
  /** envoy.config.core.v3.Node; on the first request of a stream only. */
  readonly node?: Uint8Array;
  readonly typeUrl: string;
  readonly subscribe: readonly string[];
  readonly unsubscribe: readonly string[];
  /** What a reconnecting client holds already: name → version. */
  readonly initialVersions: ReadonlyMap<string, string>;
  readonly responseNonce: string;
  /** Present: the response with that nonce was refused. */
  readonly error?: RpcStatus;
}

export interface Resource {
  readonly name: string;
  readonly version: string;
  /** google.protobuf.Any, as it came. */
  readonly any: Uint8Array;
}

export interface DeltaResponse {
  readonly systemVersion: string;
  readonly typeUrl: string;
  readonly resources: readonly Resource[];
  readonly removed: readonly string[];
  readonly nonce: string;
}

const UTF8 = new TextDecoder();

export function readDeltaRequest(bytes: Uint8Array): DeltaRequest {
  let node: Uint8Array | undefined;
  let [typeUrl, responseNonce] = ["", ""];
  const subscribe: string[] = [];
  const unsubscribe: string[] = [];
  const initialVersions = new Map<string, string>();
  let error: RpcStatus | undefined;
  readMessage(bytes, (field, reader) => {
    if (field === 1) node = reader.bytes();
    else if (field === 2) typeUrl = reader.string();
    else if (field === 3) subscribe.push(reader.string());
    else if (field === 4) unsubscribe.push(reader.string());
    else if (field === 5) {
      const { key, value } = readMapEntry(reader.bytes());
      initialVersions.set(key, UTF8.decode(value));
    } else if (field === 6) responseNonce = reader.string();
    else if (field === 7) error = readStatus(reader.bytes());
    else return false;
    return true;
  });
  return {
    typeUrl,
    subscribe,
    unsubscribe,
    initialVersions,
    responseNonce,
    ...(node === undefined ? {} : { node }),
    ...(error === undefined ? {} : { error }),
  };
}

export function writeDeltaRequest(request: DeltaRequest): Uint8Array {
  const writer = new BinaryWriter();
  if (request.node !== undefined) putPresent(writer, 1, request.node);
  put(writer, 2, request.typeUrl);
  for (const name of request.subscribe) putPresent(writer, 3, name);
  for (const name of request.unsubscribe) putPresent(writer, 4, name);
  for (const [name, version] of request.initialVersions) {
    const entry = new BinaryWriter();
    put(entry, 1, name);
    put(entry, 2, version);
    putPresent(writer, 5, entry.finish());
  }
  put(writer, 6, request.responseNonce);
  if (request.error !== undefined) putPresent(writer, 7, writeStatus(request.error));
  return writer.finish();
}

function readResource(bytes: Uint8Array): Resource {
  let [name, version] = ["", ""];
  let any: Uint8Array = new Uint8Array();
  readMessage(bytes, (field, reader) => {
    if (field === 1) version = reader.string();
    else if (field === 2) any = reader.bytes();
    else if (field === 3) name = reader.string();
    else return false;
    return true;
  });
  return { name, version, any };
}

export function readDeltaResponse(bytes: Uint8Array): DeltaResponse {
  let [systemVersion, typeUrl, nonce] = ["", "", ""];
  const resources: Resource[] = [];
  const removed: string[] = [];
  readMessage(bytes, (field, reader) => {
    if (field === 1) systemVersion = reader.string();
    else if (field === 2) resources.push(readResource(reader.bytes()));
    else if (field === 4) typeUrl = reader.string();
    else if (field === 5) nonce = reader.string();
    else if (field === 6) removed.push(reader.string());
    else return false;
    return true;
  });
  return { systemVersion, typeUrl, resources, removed, nonce };
}

export function writeDeltaResponse(response: DeltaResponse): Uint8Array {
  const writer = new BinaryWriter();
  put(writer, 1, response.systemVersion);
  for (const { name, version, any } of response.resources) {
    const resource = new BinaryWriter();
    put(resource, 1, version);
    put(resource, 2, any);
    put(resource, 3, name);
    putPresent(writer, 2, resource.finish());
  }
  put(writer, 4, response.typeUrl);
  put(writer, 5, response.nonce);
  for (const name of response.removed) putPresent(writer, 6, name);
  return writer.finish();
}

/** The state-of-the-world envelope; Envoy's SDS streams speak it, and its ADS where the bootstrap says `GRPC`. */
export interface SotwRequest {
  /** envoy.config.core.v3.Node; on the first request of a stream only. */
  readonly node?: Uint8Array;
  readonly version: string;
  readonly names: readonly string[];
  readonly typeUrl: string;
  readonly responseNonce: string;
  readonly error?: RpcStatus;
}

export function readSotwRequest(bytes: Uint8Array): SotwRequest {
  let node: Uint8Array | undefined;
  let [version, typeUrl, responseNonce] = ["", "", ""];
  const names: string[] = [];
  let error: RpcStatus | undefined;
  readMessage(bytes, (field, reader) => {
    if (field === 1) version = reader.string();
    else if (field === 2) node = reader.bytes();
    else if (field === 3) names.push(reader.string());
    else if (field === 4) typeUrl = reader.string();
    else if (field === 5) responseNonce = reader.string();
    else if (field === 6) error = readStatus(reader.bytes());
    else return false;
    return true;
  });
  return {
    version,
    names,
    typeUrl,
    responseNonce,
    ...(node === undefined ? {} : { node }),
    ...(error === undefined ? {} : { error }),
  };
}

export function writeSotwResponse(response: {
  version: string;
  typeUrl: string;
  nonce: string;
  resources: readonly Uint8Array[];
}): Uint8Array {
  const writer = new BinaryWriter();
  put(writer, 1, response.version);
  for (const any of response.resources) putPresent(writer, 2, any);
  put(writer, 4, response.typeUrl);
  put(writer, 5, response.nonce);
  return writer.finish();
}

export const TYPE_URL = {
  cluster: "type.googleapis.com/envoy.config.cluster.v3.Cluster",
  endpoint: "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
  listener: "type.googleapis.com/envoy.config.listener.v3.Listener",
  route: "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
  extension: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
  secret: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
  nameTable: "type.googleapis.com/istio.networking.nds.v1.NameTable",
  health: "type.googleapis.com/istio.v1.HealthInformation",
} as const;
