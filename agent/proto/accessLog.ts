import { type BinaryReader, readMapEntry, readMessage } from "./wire.ts";

/** What both kinds of entry say (envoy.data.accesslog.v3.AccessLogCommon); empty where Envoy says nothing. */
export interface LoggedCommon {
  /** Address of whoever connected to Envoy. */
  readonly peerAddress: string;
  /** Where that was going. */
  readonly localAddress: string;
  /** URI of the certificates of a connection to Envoy. */
  readonly localPrincipal: string;
  readonly peerPrincipal: string;
  readonly upstreamCluster: string;
  /** Envoy's short names, joined by commas; `-` if there is none. */
  readonly responseFlags: string;
  readonly tags: ReadonlyMap<string, string>;
  /** When it began, in milliseconds since 1970. */
  readonly startedMs: number;
  readonly durationMs: number;
  readonly streamId: string;
  /** envoy.data.accesslog.v3.AccessLogType */
  readonly type: number;
}

export interface LoggedRequest extends LoggedCommon {
  readonly requestHeaders: ReadonlyMap<string, string>;
  /** Of a gRPC call, from headers or trailers; empty for other requests. */
  readonly grpcStatus: string;
  /** 0 if none was sent. */
  readonly responseCode: number;
  readonly requestBytes: number;
  readonly responseBytes: number;
}

export interface LoggedConnection extends LoggedCommon {
  readonly receivedBytes: number;
  readonly sentBytes: number;
}

/** envoy.service.accesslog.v3.StreamAccessLogsMessage. */
export interface LoggedBatch {
  /** On the first message of a stream only. */
  readonly logName: string | undefined;
  readonly requests: readonly LoggedRequest[];
  readonly connections: readonly LoggedConnection[];
}

/** envoy.data.accesslog.v3.AccessLogType, those that are of interest. */
export const LOG_TYPE = { none: 0, periodic: 2, connectionEnd: 3, requestEnd: 6 } as const;

/** By field number of envoy.data.accesslog.v3.ResponseFlags; the order is that of Envoy's %RESPONSE_FLAGS%. */
const FLAGS = [
  ...["", "LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC"],
  ...["URX", "SI", "IH", "DPE", "UMSDR", "RFCF", "NFCF", "DT", "UPE", "NC", "OM", "DF", "DR"],
];
const UTF8 = new TextDecoder();
const NO_ENTRIES: ReadonlyMap<string, string> = new Map();

/** @throws {Error} on malformed bytes */
export function readLoggedBatch(bytes: Uint8Array): LoggedBatch {
  let logName: string | undefined;
  const requests: LoggedRequest[] = [];
  const connections: LoggedConnection[] = [];
  readMessage(bytes, (field, reader) => {
    if (field === 1)
      readMessage(reader.bytes(), (inner, identifier) => {
        if (inner !== 2) return false;
        logName = identifier.string();
        return true;
      });
    else if (field === 2) readEntries(reader.bytes(), (entry) => requests.push(readRequest(entry)));
    else if (field === 3) readEntries(reader.bytes(), (entry) => connections.push(readConnection(entry)));
    else return false;
    return true;
  });
  return { logName, requests, connections };
}

function readEntries(bytes: Uint8Array, onEntry: (entry: Uint8Array) => void): void {
  readMessage(bytes, (field, reader) => {
    if (field !== 1) return false;
    onEntry(reader.bytes());
    return true;
  });
}

/** HTTPAccessLogEntry: common_properties 1, request 3, response 4. */
function readRequest(bytes: Uint8Array): LoggedRequest {
  let common = NOTHING;
  let [requestBytes, responseBytes, responseCode] = [0, 0, 0];
  let grpcStatus = "";
  let requestHeaders: Map<string, string> | undefined;
  readMessage(bytes, (field, reader) => {
    if (field === 1) common = readCommon(reader.bytes());
    else if (field === 3)
      readMessage(reader.bytes(), (inner, request) => {
        if (inner === 12) requestBytes = Number(request.uint64());
        else if (inner === 13) requestHeaders = withEntry(requestHeaders, request);
        else return false;
        return true;
      });
    else if (field === 4)
      readMessage(reader.bytes(), (inner, response) => {
        if (inner === 1) responseCode = readNumbers(response.bytes())[0];
        else if (inner === 3) responseBytes = Number(response.uint64());
        // Headers and trailers: the status is all that is asked for.
        else if (inner === 4 || inner === 5) grpcStatus = UTF8.decode(readMapEntry(response.bytes()).value);
        else return false;
        return true;
      });
    else return false;
    return true;
  });
  return {
    ...common,
    requestHeaders: requestHeaders ?? NO_ENTRIES,
    grpcStatus,
    responseCode,
    requestBytes,
    responseBytes,
  };
}

/** TCPAccessLogEntry: common_properties 1, connection_properties 2. */
function readConnection(bytes: Uint8Array): LoggedConnection {
  let common = NOTHING;
  let [receivedBytes, sentBytes] = [0, 0];
  readMessage(bytes, (field, reader) => {
    if (field === 1) common = readCommon(reader.bytes());
    else if (field === 2) [receivedBytes, sentBytes] = readNumbers(reader.bytes());
    else return false;
    return true;
  });
  return { ...common, receivedBytes, sentBytes };
}

const NOTHING: LoggedCommon = {
  peerAddress: "",
  localAddress: "",
  localPrincipal: "",
  peerPrincipal: "",
  upstreamCluster: "",
  responseFlags: "-",
  tags: NO_ENTRIES,
  startedMs: 0,
  durationMs: 0,
  streamId: "",
  type: LOG_TYPE.none,
};

/** Numbers from accesslog.proto: downstream_direct_remote_address is 20, what a header claims (2) is not asked for. */
function readCommon(bytes: Uint8Array): LoggedCommon {
  const read: { -readonly [K in keyof LoggedCommon]: LoggedCommon[K] } = { ...NOTHING };
  let tags: Map<string, string> | undefined;
  readMessage(bytes, (field, reader) => {
    switch (field) {
      case 3:
        read.localAddress = readAddress(reader.bytes());
        return true;
      case 4:
        readMessage(reader.bytes(), (inner, tls) => {
          if (inner === 4) read.localPrincipal = readUri(tls.bytes());
          else if (inner === 5) read.peerPrincipal = readUri(tls.bytes());
          else return false;
          return true;
        });
        return true;
      case 5:
        read.startedMs = readMs(reader.bytes());
        return true;
      case 15:
        read.upstreamCluster = reader.string();
        return true;
      case 16:
        read.responseFlags = readFlags(reader.bytes());
        return true;
      case 20:
        read.peerAddress = readAddress(reader.bytes());
        return true;
      case 22:
        tags = withEntry(tags, reader);
        return true;
      case 23:
        read.durationMs = readMs(reader.bytes());
        return true;
      case 26:
        read.streamId = reader.string();
        return true;
      case 33:
        read.type = reader.int32();
        return true;
      default:
        return false;
    }
  });
  if (tags !== undefined) read.tags = tags;
  return read;
}

/** google.protobuf.Duration or Timestamp: seconds and nanoseconds. */
function readMs(bytes: Uint8Array): number {
  const [seconds, nanos] = readNumbers(bytes);
  return seconds * 1000 + nanos / 1e6;
}

/** The first two fields of a message of numbers: of a wrapper, a time, or ConnectionProperties. */
function readNumbers(bytes: Uint8Array): [first: number, second: number] {
  let [first, second] = [0, 0];
  readMessage(bytes, (field, reader) => {
    if (field === 1) first = Number(reader.uint64());
    else if (field === 2) second = Number(reader.uint64());
    else return false;
    return true;
  });
  return [first, second];
}

function withEntry(entries: Map<string, string> | undefined, reader: BinaryReader): Map<string, string> {
  const { key, value } = readMapEntry(reader.bytes());
  return (entries ?? new Map<string, string>()).set(key, UTF8.decode(value));
}

/** CertificateProperties: subject_alt_name 1; SubjectAltName: uri 1. */
function readUri(bytes: Uint8Array): string {
  let uri = "";
  readMessage(bytes, (field, reader) => {
    if (field !== 1) return false;
    readMessage(reader.bytes(), (inner, name) => {
      if (inner !== 1 || uri !== "") return false;
      uri = name.string();
      return true;
    });
    return true;
  });
  return uri;
}

/** envoy.config.core.v3.Address: socket_address 1; SocketAddress: address 2. */
function readAddress(bytes: Uint8Array): string {
  let address = "";
  readMessage(bytes, (field, reader) => {
    if (field !== 1) return false;
    readMessage(reader.bytes(), (inner, socket) => {
      if (inner !== 2) return false;
      address = socket.string();
      return true;
    });
    return true;
  });
  return address;
}

/** All are booleans, but one, whose presence says it. */
function readFlags(bytes: Uint8Array): string {
  const flags: string[] = [];
  readMessage(bytes, (field) => {
    flags.push(FLAGS[field] ?? `${field}`);
    return false;
  });
  return flags.length === 0 ? "-" : flags.join(",");
}
