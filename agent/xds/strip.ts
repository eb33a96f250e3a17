import { TYPE_URL } from "../proto/discovery.ts";
import { BinaryReader, BinaryWriter, readAny, readMessage, WireType } from "../proto/wire.ts";
import {
  type Direction,
  endOnly,
  HTTP_LOGGER,
  httpLogger,
  TCP_LOGGER,
  tcpLogger,
  tcpLogOptions,
} from "./accessLogger.ts";

const TCP_EXCHANGE = "envoy.tcp.metadataexchange.config.MetadataExchange";
const STATS = "stats.PluginConfig";

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
  [STATS, "istio.stats"],
]);

/** Two Envoys that agree on it write metadata in front of a TCP connection's own bytes. */
const PEER_EXCHANGE_ALPN = Buffer.from("istio-peer-exchange");

const HTTP_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const TLS_CONTEXTS: readonly string[] = ["Upstream", "Downstream"].map(
  (side) => `envoy.extensions.transport_sockets.tls.v3.${side}TlsContext`,
);
/** Configuration as JSON of a type that is named inside: `type_url` 1. */
const TYPED_STRUCTS: readonly string[] = ["udpa.type.v1.TypedStruct", "xds.type.v3.TypedStruct"];

/** A field that Envoy has since 1.37; an older one refuses a tag that has nothing else. */
const TAG_FORMAT = "envoy.type.tracing.v3.CustomTag.value";
const TAG_FORMAT_SINCE = { major: 1, minor: 37 };

/** Is this type of extension configuration (`stats.PluginConfig`) one that the Envoy knows? So too for `TAG_FORMAT`. */
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
 * In the place of `istio.stats` comes an access logger, by which the agent counts what that would have counted.
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
  try {
    const fields = editsOf(has, removed, root === "listener" ? directionOf(any) : undefined)[root];
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
 * What an Envoy says of itself in its node message (envoy.config.core.v3.Node: user_agent_build_version 8, extensions 9;
 * BuildVersion: version 1; Extension: type_urls 6).
 * One that does not list its extensions is taken to have all: it gets what istiod sends.
 */
export function extensionsOf(node: Uint8Array): HasExtension {
  const types = new Set<string>();
  let listed = false;
  try {
    readMessage(node, (field, reader) => {
      if (field === 8) {
        readMessage(reader.bytes(), (inner, build) => {
          if (inner !== 1) return false;
          if (hasTagFormat(build.bytes())) types.add(TAG_FORMAT);
          return true;
        });
        return true;
      }
      if (field !== 9) return false;
      readMessage(reader.bytes(), (inner, extension) => {
        if (inner !== 6) return false;
        types.add(typeName(extension.string()));
        listed = true;
        return true;
      });
      return true;
    });
  } catch {
    listed = false;
  }
  return listed ? (type) => types.has(type) : () => true;
}

/** envoy.type.v3.SemanticVersion: major_number 1, minor_number 2. */
function hasTagFormat(version: Uint8Array): boolean {
  let [major, minor] = [0, 0];
  readMessage(version, (field, reader) => {
    if (field === 1) major = reader.uint32();
    else if (field === 2) minor = reader.uint32();
    else return false;
    return true;
  });
  const { major: sinceMajor, minor: sinceMinor } = TAG_FORMAT_SINCE;
  return major > sinceMajor || (major === sinceMajor && minor >= sinceMinor);
}

/** envoy.config.listener.v3.Listener.traffic_direction is 16; its values are INBOUND 1, OUTBOUND 2. */
function directionOf(any: Uint8Array): Direction | undefined {
  let direction = 0;
  readMessage(readAny(any).value, (field, reader) => {
    if (field !== 16) return false;
    direction = reader.int32();
    return true;
  });
  return ([undefined, "inbound", "outbound"] as const)[direction];
}

/** One for all: a writer begins with more memory than most messages have, and `finish` empties it for the next. */
const HEADER = new BinaryWriter();

/** The value of a length-delimited field, after it: the same reference if it stays, undefined if it goes. */
type Edit = (value: Uint8Array) => Uint8Array | undefined;
/** By field number. */
type Edits = Readonly<Record<number, Edit>>;

/** The places of filters and of ALPN, from the leaves up. Field numbers from the .proto files named. */
function editsOf(
  has: HasExtension,
  removed: Set<string>,
  direction: Direction | undefined,
): { cluster: Edits; listener: Edits } {
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
    (
      typedConfig: number,
      dropped: Set<string> = new Set(),
      inside: ReadonlyMap<string, Edit> = new Map(),
    ): Edit =>
    (value) => {
      const type = configType(value, typedConfig);
      if (REMOVABLE.has(type) && !has(type)) {
        dropped.add(type);
        return drop(type);
      }
      const change = inside.get(type);
      return change === undefined ? value : edit(value, { [typedConfig]: within({ 2: change }) });
    };

  // common_tls_context 1, in it alpn_protocols 4 (transport_sockets/tls/v3/tls.proto)
  const alpn: Edit = (value) =>
    PEER_EXCHANGE_ALPN.equals(value) && !has(TCP_EXCHANGE) ? drop(TCP_EXCHANGE) : value;
  // typed_config 3 (config/core/v3/base.proto, TransportSocket)
  const socket: Edit = (value) =>
    TLS_CONTEXTS.includes(configType(value, 3))
      ? edit(value, { 3: within({ 2: within({ 1: within({ 4: alpn }) }) }) })
      : value;
  const formats = has(TAG_FORMAT);
  // http_filters 5, access_log 13; HttpFilter: typed_config 4 (http_connection_manager.proto)
  const manager: Edit = (value) => {
    const dropped = new Set<string>();
    const edited = edit(value, { 5: filter(4, dropped) });
    return dropped.has(STATS) && direction !== undefined && has(HTTP_LOGGER)
      ? append(edited, 13, httpLogger(direction, formats))
      : edited;
  };
  // filter 2 (config/accesslog/v3/accesslog.proto)
  const onlyAtEnd: Edit = (log) =>
    hasField(log, 2) ? edit(log, { 2: (own) => endOnly(own) }) : append(log, 2, endOnly());
  // filters 3, transport_socket 6; Filter: typed_config 4 (config/listener/v3/listener_components.proto)
  const chain: Edit = (value) => {
    const dropped = new Set<string>();
    // access_log 5, access_log_options 17, and in its stead 15 and 16 (tcp_proxy.proto). It is the last of its chain.
    const proxy: Edit = (bytes) => {
      if (!dropped.has(STATS) || direction === undefined || !has(TCP_LOGGER)) return bytes;
      const logger = tcpLogger(direction, formats);
      if ([15, 16, 17].some((field) => hasField(bytes, field))) return append(bytes, 5, logger);
      return append(append(edit(bytes, { 5: onlyAtEnd }), 5, logger), 17, tcpLogOptions());
    };
    const inside = new Map([
      [HTTP_MANAGER, manager],
      [TCP_PROXY, proxy],
    ]);
    return edit(value, { 3: filter(4, dropped, inside), 6: socket });
  };
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

/** The message with one more field. */
function append(message: Uint8Array, field: number, value: Uint8Array): Uint8Array {
  return Buffer.concat([
    message,
    HEADER.tag(field, WireType.LengthDelimited).uint32(value.length).finish(),
    value,
  ]);
}

function hasField(message: Uint8Array, wanted: number): boolean {
  let found = false;
  readMessage(message, (field) => {
    found ||= field === wanted;
    return false;
  });
  return found;
}

/** `type.googleapis.com/stats.PluginConfig` → `stats.PluginConfig`. */
function typeName(typeUrl: string): string {
  return typeUrl.slice(typeUrl.lastIndexOf("/") + 1);
}
