import { AGENT_GRPC } from "../core/paths.ts";
import { LOG_TYPE } from "../proto/accessLog.ts";
import { BinaryWriter, put, WireType, writeAny } from "../proto/wire.ts";

const GRPC_LOGGERS = "envoy.extensions.access_loggers.grpc.v3";
export const HTTP_LOGGER = `${GRPC_LOGGERS}.HttpGrpcAccessLogConfig`;
export const TCP_LOGGER = `${GRPC_LOGGERS}.TcpGrpcAccessLogConfig`;

/** Seen from the workload, as `traffic_direction` of a listener says. It names the log. */
export type Direction = "inbound" | "outbound";

/**
 * An Envoy sends what it has after this time or at this size. What the agent does not take fast enough it drops and
 * counts (`access_logs.grpc_access_log.logs_dropped`): no request waits for it.
 */
const FLUSH_SECONDS = 1;
const BUFFER_BYTES = 64 * 1024;
/** How often an open TCP connection tells its bytes: as often as `istio.stats` does. */
const TCP_REPORT_SECONDS = 5;
/** envoy.config.core.v3.ApiVersion: the only one that Envoy still takes. */
const API_V3 = 2;

type Field = readonly [number: number, value: string | Uint8Array | number];

/** A message of length-delimited and varint fields. */
function message(...fields: readonly Field[]): Uint8Array {
  const writer = new BinaryWriter();
  for (const [number, value] of fields) {
    if (typeof value !== "number") put(writer, number, value);
    else writer.tag(number, WireType.Varint).uint32(value);
  }
  return writer.finish();
}

/** In `google.protobuf.Duration` and in the wrappers of numbers the value is field 1. */
const boxed = (value: number): Uint8Array => message([1, value]);

/** A custom tag from the metadata of the chosen `cluster` or `host` (type/tracing/v3/custom_tag.proto, type/metadata/v3/metadata.proto). */
function metadataTag(tag: string, of: "cluster" | "host", key: string, path: string): Uint8Array {
  // MetadataKind is a oneof of empty messages, which `put` would leave out.
  const kind = new BinaryWriter()
    .tag(of === "cluster" ? 3 : 4, WireType.LengthDelimited)
    .uint32(0)
    .finish();
  const metadataKey = message([1, key], [2, message([1, path])]);
  return message([1, tag], [5, message([1, kind], [2, metadataKey])]);
}

/**
 * What istiod says of the two ends: the services of a cluster (a list as JSON), the workload of an endpoint
 * (`name;namespace;service;revision;cluster`), and who the peer has proved to be.
 */
function tagsOf(direction: Direction, formats: boolean): Uint8Array[] {
  const services = metadataTag("services", "cluster", "istio", "services");
  if (direction === "inbound") return [services];
  const principal = message([1, "principal"], [6, "%UPSTREAM_PEER_URI_SAN%"]);
  return [services, metadataTag("workload", "host", "istio", "workload"), ...(formats ? [principal] : [])];
}

/** CommonGrpcAccessLogConfig: over the connection that Envoy's configuration comes by, which every bootstrap has. */
function common(direction: Direction, formats: boolean): Uint8Array {
  const envoyGrpc = message([1, AGENT_GRPC.cluster], [2, AGENT_GRPC.authority]);
  return message(
    [1, direction],
    [2, message([1, envoyGrpc])],
    [3, boxed(FLUSH_SECONDS)],
    [4, boxed(BUFFER_BYTES)],
    [6, API_V3],
    ...tagsOf(direction, formats).map((tag): Field => [8, tag]),
  );
}

/** envoy.config.accesslog.v3.AccessLog: name 1, typed_config 4. */
const accessLog = (name: string, type: string, config: Uint8Array): Uint8Array =>
  message([1, name], [4, writeAny(`type.googleapis.com/${type}`, config)]);

/**
 * An access logger that tells the agent of every request: what Istio's `istio.stats` would have counted.
 *
 * @param formats this Envoy takes format strings in custom tags
 */
export function httpLogger(direction: Direction, formats: boolean): Uint8Array {
  const headers = ["content-type", ...(direction === "inbound" ? ["x-envoy-peer-metadata"] : [])];
  const config = message(
    [1, common(direction, formats)],
    ...headers.map((header): Field => [2, header]),
    // gRPC puts its status into the headers of a response without a body, else into the trailers.
    [3, "grpc-status"],
    [4, "grpc-status"],
  );
  return accessLog("envoy.access_loggers.http_grpc", HTTP_LOGGER, config);
}

/** The same for TCP connections. */
export function tcpLogger(direction: Direction, formats: boolean): Uint8Array {
  return accessLog("envoy.access_loggers.tcp_grpc", TCP_LOGGER, message([1, common(direction, formats)]));
}

/**
 * TcpAccessLogOptions: log every few seconds while a connection is open. Not already when the upstream is connected: the
 * handshake with the peer may not be over then, and who that is not known. The options hold for every logger of a proxy:
 * the others get `endOnly`.
 */
export function tcpLogOptions(): Uint8Array {
  return message([1, boxed(TCP_REPORT_SECONDS)]);
}

/**
 * A filter for a logger that shall go on to log once, at the end of a connection (envoy.config.accesslog.v3:
 * AccessLogFilter: and_filter 6, log_type_filter 13; AndFilter: filters 1; LogTypeFilter: types 1).
 *
 * @param filter the one that it has
 */
export function endOnly(filter?: Uint8Array): Uint8Array {
  const atEnd = message([13, message([1, Uint8Array.of(LOG_TYPE.connectionEnd)])]);
  return filter === undefined ? atEnd : message([6, message([1, filter], [1, atEnd])]);
}
