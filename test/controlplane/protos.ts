import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import protobuf from "protobufjs";

/** A message as plain data: field names as in the .proto files, enums by name, an Any as `{"@type": …, …fields}`. */
export type Message = Readonly<Record<string, unknown>>;

export const TYPE_PREFIX = "type.googleapis.com/";

const require = createRequire(import.meta.url);
const folderOf = (name: string): string => dirname(require.resolve(`${name}/package.json`));
const deps = join(folderOf("@grpc/grpc-js-xds"), "deps");
const INCLUDE = [
  ...["envoy-api", "xds", "googleapis", "protoc-gen-validate"].map((name) => join(deps, name)),
  folderOf("protobufjs"),
];

const FILES = [
  "envoy/service/accesslog/v3/als.proto",
  "envoy/service/discovery/v3/ads.proto",
  "envoy/service/secret/v3/sds.proto",
  "envoy/config/cluster/v3/cluster.proto",
  "envoy/config/endpoint/v3/endpoint.proto",
  "envoy/config/listener/v3/listener.proto",
  "envoy/config/route/v3/route.proto",
  "envoy/extensions/access_loggers/file/v3/file.proto",
  "envoy/extensions/access_loggers/grpc/v3/als.proto",
  "envoy/extensions/filters/http/router/v3/router.proto",
  "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
  "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
  "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
  "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
  "envoy/extensions/transport_sockets/tls/v3/tls.proto",
];

/** Field numbers from appendix B of Istio's VM protocol; only fields that are touched here. */
const ISTIO = {
  ca: `syntax = "proto3"; package istio.v1.auth;
    import "google/protobuf/struct.proto";
    message IstioCertificateRequest { string csr = 1; int64 validity_duration = 3; google.protobuf.Struct metadata = 4; }
    message IstioCertificateResponse { repeated string cert_chain = 1; }`,
  nds: `syntax = "proto3"; package istio.networking.nds.v1;
    message NameTable {
      message NameInfo { repeated string ips = 1; string registry = 2; string shortname = 3; string namespace = 4; repeated string alt_hosts = 5; }
      map<string, NameInfo> table = 1;
    }`,
};

let loaded: protobuf.Root | undefined;

/** Reads the .proto files once, about half a second. */
function root(): protobuf.Root {
  if (loaded !== undefined) return loaded;
  const files = new protobuf.Root();
  files.resolvePath = (_origin, target) =>
    INCLUDE.map((folder) => join(folder, target)).find((path) => existsSync(path)) ?? target;
  files.loadSync(FILES, { keepCase: true });
  for (const text of Object.values(ISTIO)) protobuf.parse(text, files, { keepCase: true });
  files.resolveAll();
  loaded = files;
  return files;
}

/**
 * @param type full name: `envoy.config.cluster.v3.Cluster`
 * @throws {Error} if `message` has a field that the type lacks: protobufjs would drop it without a word
 */
export function encode(type: string, message: Message): Buffer {
  const known = root().lookupType(type);
  checkFields(known, message, type);
  return Buffer.from(known.encode(known.fromObject(message)).finish());
}

export function decode(type: string, bytes: Uint8Array): Message {
  const known = root().lookupType(type);
  return known.toObject(known.decode(bytes), {
    enums: String,
    longs: Number,
    defaults: true,
    arrays: true,
    objects: true,
  });
}

/** The JSON value in a google.protobuf.Struct as `decode` gives it. */
export function structValue(struct: unknown): Record<string, unknown> {
  const fields = (struct as { fields?: Record<string, unknown> } | null)?.fields ?? {};
  return Object.fromEntries(Object.entries(fields).map(([key, value]) => [key, plainValue(value)]));
}

/** The other way. */
export function toStruct(value: Readonly<Record<string, unknown>>): Message {
  return { fields: Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, toValue(entry)])) };
}

function plainValue(value: unknown): unknown {
  const { kind, ...fields } = value as Record<string, unknown>;
  const name = typeof kind === "string" ? kind : Object.keys(fields)[0];
  switch (name) {
    case "structValue":
      return structValue(fields["structValue"]);
    case "listValue":
      return ((fields["listValue"] as { values?: unknown[] }).values ?? []).map(plainValue);
    case "nullValue":
    case undefined:
      return null;
    default:
      return fields[name];
  }
}

function toValue(value: unknown): Message {
  if (value === null || value === undefined) return { nullValue: 0 };
  if (typeof value === "string") return { stringValue: value };
  if (typeof value === "number") return { numberValue: value };
  if (typeof value === "boolean") return { boolValue: value };
  if (Array.isArray(value)) return { listValue: { values: value.map(toValue) } };
  return { structValue: toStruct(value as Record<string, unknown>) };
}

function checkFields(type: protobuf.Type, message: Message, at: string): void {
  for (const [key, value] of Object.entries(message)) {
    if (key === "@type") continue;
    const field = type.fields[key];
    if (field === undefined) throw new Error(`${at}: ${type.fullName} has no field \`${key}\``);
    const { resolvedType } = field;
    if (!(resolvedType instanceof protobuf.Type)) continue;
    for (const entry of field.map
      ? Object.values(value as Message)
      : field.repeated
        ? (value as unknown[])
        : [value]) {
      const inner = entry as Message;
      const named = inner["@type"];
      const target =
        typeof named === "string" ? root().lookupType(named.slice(TYPE_PREFIX.length)) : resolvedType;
      checkFields(target, inner, `${at}.${key}`);
    }
  }
}
