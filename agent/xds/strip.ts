import { TYPE_URL } from "../proto/discovery.ts";
import { BinaryReader, BinaryWriter, readAny, readMessage, WireType } from "../proto/wire.ts";

const TCP_EXCHANGE = "envoy.tcp.metadataexchange.config.MetadataExchange";

/**
 * What an istiod with default settings names and only Istio's own Envoy build has: the type of its configuration → the
 * name that istiod gives it (ch. 10 of the VM protocol). None of it decides who may talk to whom.
 *
 * Closed, and by type, not by name: Envoy goes by the type too, so what calls itself `istio.stats` and is an
 * authorization filter stays.
 */
const REMOVABLE: ReadonlyMap<string, string> = new Map([
  [TCP_EXCHANGE, "istio.metadata_exchange"],
  ["io.istio.http.peer_metadata.Config", "istio.metadata_exchange"],
  ["istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig", "istio.alpn"],
  ["stats.PluginConfig", "istio.stats"],
]);

/** Two Envoys that agree on it write metadata in front of a TCP connection's own bytes. */
const PEER_EXCHANGE_ALPN = Buffer.from("istio-peer-exchange");

const HTTP_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TLS_CONTEXTS: readonly string[] = ["Upstream", "Downstream"].map(
  (side) => `envoy.extensions.transport_sockets.tls.v3.${side}TlsContext`,
);
/** Configuration as JSON of a type that is named inside: `type_url` 1. */
const TYPED_STRUCTS: readonly string[] = ["udpa.type.v1.TypedStruct", "xds.type.v3.TypedStruct"];

/** Is this type of extension configuration (`stats.PluginConfig`) one that the Envoy knows? */
export type HasExtension = (type: string) => boolean;

export interface Stripped {
  /** The same reference if nothing was taken out. */
  readonly any: Uint8Array;
  /** Types of what was taken out, each once; `nameOf` says what istiod calls them. */
  readonly removed: readonly string[];
}

/**
 * Takes Istio's own extensions out of a cluster or a listener, if the Envoy does not have them: network filters, HTTP
 * filters, and with the TCP metadata exchange its protocol in ALPN. That must go as well: a peer that has the exchange
 * would agree on it and write metadata into a connection whose other end passes it on to the application.
 *
 * Everything else stays byte for byte and in order, also what is unknown here. Other extensions that Envoy lacks stay
 * too: it refuses the resource, because what they were meant to enforce is not known.
 *
 * @param any google.protobuf.Any of a resource of the type `typeUrl`; bytes that are none are returned as they are
 */
export function strip(typeUrl: string, any: Uint8Array, has: HasExtension): Stripped {
  const root =
    typeUrl === TYPE_URL.cluster ? "cluster" : typeUrl === TYPE_URL.listener ? "listener" : undefined;
  if (root === undefined) return { any, removed: [] };
  const removed = new Set<string>();
  const fields = editsOf(has, removed)[root];
  try {
    return { any: edit(any, { 2: (value) => edit(value, fields) }), removed: [...removed] };
  } catch {
    return { any, removed: [] };
  }
}

/** `stats.PluginConfig` → `istio.stats`. */
export function nameOf(type: string): string {
  return REMOVABLE.get(type) ?? type;
}

/**
 * What an Envoy says of itself in its node message (envoy.config.core.v3.Node: extensions 9; Extension: type_urls 6).
 * One that does not list its extensions is taken to have all: it gets what istiod sends.
 */
export function extensionsOf(node: Uint8Array): HasExtension {
  const types = new Set<string>();
  try {
    readMessage(node, (field, reader) => {
      if (field !== 9) return false;
      readMessage(reader.bytes(), (inner, extension) => {
        if (inner !== 6) return false;
        types.add(typeName(extension.string()));
        return true;
      });
      return true;
    });
  } catch {
    types.clear();
  }
  return types.size === 0 ? () => true : (type) => types.has(type);
}

/** One for all: a writer begins with more memory than most messages have, and `finish` empties it for the next. */
const HEADER = new BinaryWriter();

/** The value of a length-delimited field, after it: the same reference if it stays, undefined if it goes. */
type Edit = (value: Uint8Array) => Uint8Array | undefined;
/** By field number. */
type Edits = Readonly<Record<number, Edit>>;

/** The places of filters and of ALPN, from the leaves up. Field numbers from the .proto files named. */
function editsOf(has: HasExtension, removed: Set<string>): { cluster: Edits; listener: Edits } {
  const drop = (type: string): undefined => {
    removed.add(type);
    return undefined;
  };
  const within =
    (fields: Edits): Edit =>
    (value) =>
      edit(value, fields);
  /** A filter whose configuration is in `typedConfig`; only what is known to hold filters is looked into. */
  const filter =
    (typedConfig: number, inside: ReadonlyMap<string, Edits> = new Map()): Edit =>
    (value) => {
      const type = configType(value, typedConfig);
      if (REMOVABLE.has(type) && !has(type)) return drop(type);
      const fields = inside.get(type);
      return fields === undefined ? value : edit(value, { [typedConfig]: within({ 2: within(fields) }) });
    };

  // common_tls_context 1, in it alpn_protocols 4 (transport_sockets/tls/v3/tls.proto)
  const alpn: Edit = (value) =>
    PEER_EXCHANGE_ALPN.equals(value) && !has(TCP_EXCHANGE) ? drop(TCP_EXCHANGE) : value;
  // typed_config 3 (config/core/v3/base.proto, TransportSocket)
  const socket: Edit = (value) =>
    TLS_CONTEXTS.includes(configType(value, 3))
      ? edit(value, { 3: within({ 2: within({ 1: within({ 4: alpn }) }) }) })
      : value;
  // http_filters 5; HttpFilter: typed_config 4 (http_connection_manager.proto)
  const inManager: Edits = { 5: filter(4) };
  // filters 3, transport_socket 6; Filter: typed_config 4 (config/listener/v3/listener_components.proto)
  const chain = within({ 3: filter(4, new Map([[HTTP_MANAGER, inManager]])), 6: socket });
  return {
    // filter_chains 3, default_filter_chain 25 (config/listener/v3/listener.proto)
    listener: { 3: chain, 25: chain },
    // transport_socket 24, filters 40, transport_socket_matches 43, in it transport_socket 3 (config/cluster/v3/cluster.proto);
    // Filter: typed_config 2 (config/cluster/v3/filter.proto)
    cluster: { 24: socket, 40: filter(2), 43: within({ 3: socket }) },
  };
}

/** The type that a google.protobuf.Any in `field` configures, also through a TypedStruct; empty if there is none. */
function configType(message: Uint8Array, field: number): string {
  let type = "";
  readMessage(message, (at, reader) => {
    if (at !== field) return false;
    const any = readAny(reader.bytes());
    type = typeName(any.typeUrl);
    // The first field of a TypedStruct is a string, as in an Any.
    if (TYPED_STRUCTS.includes(type)) type = typeName(readAny(any.value).typeUrl);
    return true;
  });
  return type;
}

/** Copies a message but for the fields that `edits` changes. @returns the same reference if none was */
function edit(message: Uint8Array, edits: Edits): Uint8Array {
  const reader = new BinaryReader(message);
  const parts: Uint8Array[] = [];
  let copied = 0;
  while (reader.pos < reader.len) {
    const start = reader.pos;
    const [field, wireType] = reader.tag();
    const change = wireType === WireType.LengthDelimited ? edits[field] : undefined;
    if (change === undefined) {
      reader.skip(wireType, field);
      continue;
    }
    const before = reader.bytes();
    const after = change(before);
    if (after === before) continue;
    parts.push(message.subarray(copied, start));
    copied = reader.pos;
    if (after !== undefined)
      parts.push(HEADER.tag(field, WireType.LengthDelimited).uint32(after.length).finish(), after);
  }
  return parts.length === 0 ? message : Buffer.concat([...parts, message.subarray(copied)]);
}

/** `type.googleapis.com/stats.PluginConfig` → `stats.PluginConfig`. */
function typeName(typeUrl: string): string {
  return typeUrl.slice(typeUrl.lastIndexOf("/") + 1);
}
