import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { decode, encode, type Message, TYPE_PREFIX } from "../../test/controlplane/protos.ts";
import { TYPE_URL } from "../proto/discovery.ts";
import { BinaryWriter, put, readAny, WireType, writeAny } from "../proto/wire.ts";
import { extensionsOf, nameOf, strip } from "./strip.ts";

const CLUSTER = "envoy.config.cluster.v3.Cluster";
const LISTENER = "envoy.config.listener.v3.Listener";
const TCP_MX = "envoy.tcp.metadataexchange.config.MetadataExchange";
const HTTP_MX = "io.istio.http.peer_metadata.Config";
const ALPN = "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig";
const STATS = "stats.PluginConfig";
const EVERY = [TCP_MX, HTTP_MX, ALPN, STATS];
const stock = (): boolean => false;
const istios = (): boolean => true;

/** An Any of a type that no .proto here describes, in the shape that protobufjs takes for `google.protobuf.Any`. */
const opaque = (type: string, value: Uint8Array = Buffer.from("opaque")): Message => ({
  type_url: TYPE_PREFIX + type,
  value,
});
/** As istiod writes the configuration of extensions that it has no Go type for: TypedStruct.type_url 1, value 2. */
function struct(type: string, wrapper = "udpa.type.v1.TypedStruct"): Message {
  const writer = new BinaryWriter();
  put(writer, 1, TYPE_PREFIX + type);
  put(writer, 2, Buffer.from("\x0a\x02\x0a\x00", "latin1"));
  return opaque(wrapper, writer.finish());
}
const filter = (name: string, typed_config: Message): Message => ({ name, typed_config });
const router = filter("envoy.filters.http.router", {
  "@type": `${TYPE_PREFIX}envoy.extensions.filters.http.router.v3.Router`,
});
const tcpProxy = filter("envoy.filters.network.tcp_proxy", {
  "@type": `${TYPE_PREFIX}envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`,
  stat_prefix: "p",
  cluster: "c",
});
const rbac = filter("envoy.filters.network.rbac", opaque("envoy.extensions.filters.network.rbac.v3.RBAC"));
const httpManager = (http_filters: readonly Message[]): Message =>
  filter("envoy.filters.network.http_connection_manager", {
    "@type": `${TYPE_PREFIX}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`,
    stat_prefix: "inbound_0.0.0.0_9080;",
    http_filters,
    use_remote_address: { value: false },
  });
const tls = (side: "Upstream" | "Downstream", alpn_protocols: readonly string[]): Message => ({
  name: "envoy.transport_sockets.tls",
  typed_config: {
    "@type": `${TYPE_PREFIX}envoy.extensions.transport_sockets.tls.v3.${side}TlsContext`,
    common_tls_context: { alpn_protocols, tls_params: { tls_minimum_protocol_version: "TLSv1_2" } },
    ...(side === "Upstream" ? { sni: "outbound_.80_._.details" } : {}),
  },
});

interface Shape {
  readonly network: readonly Message[];
  readonly http: readonly Message[];
  readonly upstream: readonly Message[];
  readonly alpn: readonly string[];
}
const DEFAULTS: Shape = {
  network: [filter("istio.metadata_exchange", struct(TCP_MX)), filter("istio.stats", struct(STATS))],
  http: [
    filter("istio.metadata_exchange", opaque(HTTP_MX)),
    filter("istio.alpn", opaque(ALPN)),
    filter("istio.stats", struct(STATS, "xds.type.v3.TypedStruct")),
  ],
  upstream: [filter("istio.metadata_exchange", struct(TCP_MX))],
  alpn: ["istio-peer-exchange"],
};
const NOTHING: Shape = { network: [], http: [], upstream: [], alpn: [] };

function listener({ network, http, alpn }: Shape, traffic_direction = "INBOUND"): Uint8Array {
  const transport_socket = tls("Downstream", [...alpn, "h2", "http/1.1"]);
  return writeAny(
    TYPE_URL.listener,
    encode(LISTENER, {
      name: "virtualInbound",
      filter_chains: [
        { name: "http", transport_socket, filters: [...network, rbac, httpManager([...http, router])] },
        { name: "tcp", transport_socket, filters: [rbac, ...network, tcpProxy] },
      ],
      default_filter_chain: { name: "rest", filters: [...network, tcpProxy] },
      traffic_direction,
    }),
  );
}
function cluster({ upstream, alpn }: Shape): Uint8Array {
  const transport_socket = tls("Upstream", [...alpn, "istio"]);
  return writeAny(
    TYPE_URL.cluster,
    encode(CLUSTER, {
      name: "outbound|80||details",
      connect_timeout: { seconds: 10 },
      transport_socket,
      filters: upstream,
      transport_socket_matches: [{ name: "tlsMode-istio", transport_socket }],
    }),
  );
}

describe("what an istiod with default settings sends", () => {
  test("a listener loses Istio's filters at both levels, and keeps the rest to the byte", () => {
    const { any, removed } = strip(TYPE_URL.listener, listener(DEFAULTS), stock);
    expect(Buffer.from(any)).toEqual(Buffer.from(listener(NOTHING)));
    expect([...removed].sort()).toEqual(EVERY);
    expect(new Set(removed.map(nameOf))).toEqual(
      new Set(["istio.alpn", "istio.metadata_exchange", "istio.stats"]),
    );
  });

  test("a cluster loses the metadata exchange, as a filter and as a protocol of ALPN", () => {
    const { any, removed } = strip(TYPE_URL.cluster, cluster(DEFAULTS), stock);
    expect(Buffer.from(any)).toEqual(Buffer.from(cluster(NOTHING)));
    expect(removed).toEqual([TCP_MX]);
    expect(decode(CLUSTER, readAny(any).value)["filters"]).toEqual([]);
  });

  test("Istio's own Envoy gets the very bytes", () => {
    for (const [typeUrl, bytes] of [
      [TYPE_URL.listener, listener(DEFAULTS)],
      [TYPE_URL.cluster, cluster(DEFAULTS)],
    ] as const) {
      const stripped = strip(typeUrl, bytes, istios);
      expect(stripped.any).toBe(bytes);
      expect(stripped.removed).toEqual([]);
    }
  });

  test("only what this Envoy lacks goes", () => {
    const { any, removed } = strip(TYPE_URL.listener, listener(DEFAULTS), (type) => type !== ALPN);
    expect(removed).toEqual([ALPN]);
    const http = DEFAULTS.http.filter(({ name }) => name !== "istio.alpn");
    expect(Buffer.from(any)).toEqual(Buffer.from(listener({ ...DEFAULTS, http })));
  });
});

describe("in the place of istio.stats", () => {
  const LOGGERS = ["Http", "Tcp"].map(
    (kind) => `envoy.extensions.access_loggers.grpc.v3.${kind}GrpcAccessLogConfig`,
  );
  const FORMAT = "envoy.type.tracing.v3.CustomTag.value";
  const withLoggers = (type: string): boolean => LOGGERS.includes(type);
  /** The filters of the first two chains, as plain data: `http_connection_manager`, `tcp_proxy`. */
  const proxies = (bytes: Uint8Array): Record<string, unknown>[] => {
    const { filter_chains } = decode(LISTENER, readAny(bytes).value) as {
      filter_chains: { filters: { name: string; typed_config: { type_url: string; value: Uint8Array } }[] }[];
    };
    return filter_chains
      .flatMap(({ filters }) => filters)
      .filter(({ name }) => /manager|proxy/.test(name))
      .map(
        ({ typed_config: { type_url, value } }) =>
          decode(type_url.slice(TYPE_PREFIX.length), value) as Record<string, unknown>,
      );
  };
  const loggersOf = (proxy: Record<string, unknown> | undefined): Record<string, unknown>[] =>
    ((proxy?.["access_log"] ?? []) as { typed_config: { type_url: string; value: Uint8Array } }[]).map(
      ({ typed_config: { type_url, value } }) =>
        decode(type_url.slice(TYPE_PREFIX.length), value) as Record<string, unknown>,
    );
  const stripped = (bytes: Uint8Array, has = withLoggers) => strip(TYPE_URL.listener, bytes, has).any;

  test("an access logger to the agent stands in both kinds of chain, with what the labels need", () => {
    const [http, tcp] = proxies(stripped(listener(DEFAULTS)));
    const [httpLog] = loggersOf(http);
    const [tcpLog] = loggersOf(tcp);
    expect(httpLog).toMatchObject({
      additional_request_headers_to_log: ["content-type", "x-envoy-peer-metadata"],
      additional_response_trailers_to_log: ["grpc-status"],
    });
    for (const log of [httpLog, tcpLog])
      expect(log).toMatchObject({
        common_config: {
          log_name: "inbound",
          grpc_service: { envoy_grpc: { cluster_name: "xds-grpc", authority: "vmmesh.local" } },
          transport_api_version: "V3",
          buffer_flush_interval: { seconds: 1 },
          buffer_size_bytes: { value: 65_536 },
          custom_tags: [
            {
              tag: "services",
              metadata: {
                kind: { cluster: {} },
                metadata_key: { key: "istio", path: [{ key: "services" }] },
              },
            },
          ],
        },
      });
    expect(tcp).toMatchObject({
      access_log_options: { access_log_flush_interval: { seconds: 5 }, flush_access_log_on_connected: false },
    });
  });

  test("outbound it asks for the other end: its workload, and from Envoy 1.37 on its certificate", () => {
    const bytes = listener(DEFAULTS, "OUTBOUND");
    const tagsOf = (has: (type: string) => boolean): unknown => {
      const [log] = loggersOf(proxies(stripped(bytes, has))[0]);
      const { custom_tags } = (log?.["common_config"] ?? { custom_tags: [] }) as {
        custom_tags: { tag: string }[];
      };
      return custom_tags.map(({ tag }) => tag);
    };
    expect(tagsOf(withLoggers)).toEqual(["services", "workload"]);
    expect(tagsOf((type) => withLoggers(type) || type === FORMAT)).toEqual([
      "services",
      "workload",
      "principal",
    ]);
  });

  const withLogs = (access_log: readonly Message[], more: Message = {}): Uint8Array => {
    const typed_config = { ...(tcpProxy["typed_config"] as Message), access_log, ...more };
    return writeAny(
      TYPE_URL.listener,
      encode(LISTENER, {
        filter_chains: [{ filters: [...DEFAULTS.network, { ...tcpProxy, typed_config }] }],
        traffic_direction: "INBOUND",
      }),
    );
  };
  const typed_config = opaque("envoy.extensions.access_loggers.file.v3.FileAccessLog");

  test("the mesh's own access log goes on to tell of a TCP connection once, and through its own filter", () => {
    const filtered = { name: "filtered", typed_config, filter: { response_flag_filter: { flags: ["UH"] } } };
    const [tcp] = proxies(stripped(withLogs([{ name: "file", typed_config }, filtered])));
    const atEnd = { log_type_filter: { types: ["TcpConnectionEnd"], exclude: false } };
    expect(tcp).toMatchObject({
      access_log: [
        { name: "file", filter: atEnd },
        {
          name: "filtered",
          filter: { and_filter: { filters: [{ response_flag_filter: { flags: ["UH"] } }, atEnd] } },
        },
        { name: "envoy.access_loggers.tcp_grpc", filter: null },
      ],
      access_log_options: { access_log_flush_interval: { seconds: 5 } },
    });
  });

  test("a proxy that somebody has told when to log keeps that", () => {
    const access_log_options = {
      flush_access_log_on_connected: false,
      access_log_flush_interval: { seconds: 60 },
    };
    const [tcp] = proxies(stripped(withLogs([{ name: "file", typed_config }], { access_log_options })));
    expect(tcp).toMatchObject({
      access_log: [{ name: "file", filter: null }, {}],
      access_log_options,
    });
  });

  test.for([
    ["a listener without istio.stats", listener({ ...DEFAULTS, http: [], network: [] }), withLoggers],
    ["an Envoy that has istio.stats", listener(DEFAULTS), (type: string) => type === STATS],
    ["an Envoy without the loggers", listener(DEFAULTS), stock],
    ["a listener of no direction", listener(DEFAULTS, "UNSPECIFIED"), withLoggers],
  ] as const)("%s gets none", ([, bytes, has]) => {
    for (const proxy of proxies(stripped(bytes, has))) expect(proxy["access_log"]).toEqual([]);
  });

  test("an Envoy says with its version whether it takes format strings in tags", () => {
    const of = (major_number: number, minor_number: number): boolean =>
      extensionsOf(
        encode("envoy.config.core.v3.Node", {
          user_agent_build_version: { version: { major_number, minor_number } },
          extensions: [{ name: "x", type_urls: ["x"] }],
        }),
      )(FORMAT);
    expect([of(1, 36), of(1, 37), of(1, 40), of(2, 0)]).toEqual([false, true, true, true]);
  });
});

describe("what stays, though Envoy will refuse it", () => {
  test.for([
    ["a WebAssembly filter", "envoy.extensions.filters.http.wasm.v3.Wasm"],
    ["an external authorization", "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"],
    ["a check of tokens", "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"],
    ["Istio's old authentication", "istio.envoy.config.filter.http.authn.v2alpha1.FilterConfig"],
    ["somebody's own", "com.example.Guard"],
  ])("%s, even by the name of an extension that may go", ([, type = ""]) => {
    const both = [filter("istio.stats", opaque(type)), filter("istio.alpn", struct(type))];
    const bytes = listener({ ...NOTHING, http: both, network: both });
    expect(strip(TYPE_URL.listener, bytes, stock)).toEqual({ any: bytes, removed: [] });
  });

  test("a filter that is fetched by itself", () => {
    const discovered = { name: "istio.stats", config_discovery: { type_urls: [TYPE_PREFIX + STATS] } };
    const bytes = listener({ ...NOTHING, http: [discovered] });
    expect(strip(TYPE_URL.listener, bytes, stock).any).toBe(bytes);
  });

  test.for([TYPE_URL.route, TYPE_URL.endpoint, TYPE_URL.secret])("everything in a %s", (typeUrl) => {
    const bytes = listener(DEFAULTS);
    expect(strip(typeUrl, bytes, stock).any).toBe(bytes);
  });

  test("bytes that are no message", () => {
    const bytes = writeAny(TYPE_URL.listener, Buffer.from([0x1a, 0x7f, 1]));
    expect(strip(TYPE_URL.listener, bytes, stock)).toEqual({ any: bytes, removed: [] });
  });
});

/** A field that no message here has, of any wire type. */
const unknownField = fc
  .tuple(fc.integer({ min: 1000, max: 5000 }), fc.constantFrom(0, 1, 2, 5), fc.uint8Array({ maxLength: 200 }))
  .map(([field, wireType, content]) => {
    const writer = new BinaryWriter();
    writer.tag(field, wireType as WireType);
    if (wireType === 0) writer.uint32(content.length);
    else if (wireType === 1) writer.fixed64(content.length);
    else if (wireType === 5) writer.fixed32(content.length);
    else writer.bytes(content);
    return Buffer.from(writer.finish());
  });

/** Listener ← chain ← filters, each with unknown fields around what is known; `own` says whether Istio's are in. */
function wrapped(noise: readonly Buffer[], own: boolean): Uint8Array {
  const at = (index: number): Buffer => noise[index % noise.length] ?? Buffer.of();
  const field = (number: number, ...parts: readonly Uint8Array[]): Buffer =>
    Buffer.from(
      new BinaryWriter().tag(number, WireType.LengthDelimited).bytes(Buffer.concat(parts)).finish(),
    );
  const istios_ = own
    ? field(5, at(0), field(1, Buffer.from("istio.stats")), field(4, writeAny(TYPE_PREFIX + STATS, at(1))))
    : Buffer.of();
  const other = field(5, at(2), field(4, writeAny(`${TYPE_PREFIX}com.example.Guard`, at(3)), at(4)), at(0));
  const manager = Buffer.concat([at(1), other, istios_, at(2), other, istios_, at(3)]);
  const any = Buffer.concat([
    field(
      1,
      Buffer.from(
        `${TYPE_PREFIX}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`,
      ),
    ),
    field(2, manager),
    at(4),
  ]);
  const chain = Buffer.concat([at(0), field(3, at(1), field(4, any), at(2)), at(3)]);
  return Buffer.concat([
    field(1, Buffer.from(TYPE_URL.listener)),
    field(2, at(4), field(3, chain), at(0), field(25, chain), at(1)),
    at(2),
  ]);
}

describe("for all messages", () => {
  const noise = fc.array(unknownField, { minLength: 1, maxLength: 5 });

  test("unknown fields at every level survive, in order", () => {
    fc.assert(
      fc.property(noise, (fields) => {
        const { any, removed } = strip(TYPE_URL.listener, wrapped(fields, true), stock);
        expect(removed).toEqual([STATS]);
        expect(Buffer.from(any).equals(wrapped(fields, false))).toBe(true);
      }),
    );
  });

  test("what is stripped once stays as it is, by reference", () => {
    fc.assert(
      fc.property(noise, fc.boolean(), (fields, own) => {
        const once = strip(TYPE_URL.listener, wrapped(fields, own), stock).any;
        expect(strip(TYPE_URL.listener, once, stock)).toEqual({ any: once, removed: [] });
        expect(strip(TYPE_URL.listener, once, stock).any).toBe(once);
      }),
    );
  });

  test("no bytes make it throw", () => {
    fc.assert(
      fc.property(fc.uint8Array(), fc.constantFrom(TYPE_URL.listener, TYPE_URL.cluster), (bytes, typeUrl) => {
        expect(strip(typeUrl, bytes, stock)).toEqual({ any: bytes, removed: [] });
      }),
    );
  });
});

describe("what an Envoy says it has", () => {
  const node = (extensions: readonly Message[]): Buffer =>
    encode("envoy.config.core.v3.Node", { id: "sidecar~…", user_agent_name: "envoy", extensions });
  const tcp = { name: "envoy.filters.network.tcp_proxy", type_urls: ["envoy.extensions.x.TcpProxy"] };

  test("a type that is listed is there, another is not", () => {
    const has = extensionsOf(node([tcp, { name: "envoy.filters.http.istio_stats", type_urls: [STATS] }]));
    expect(EVERY.filter(has)).toEqual([STATS]);
  });

  test.for([
    ["no extensions", node([])],
    ["extensions without their types", node([{ name: "envoy.filters.network.tcp_proxy" }])],
    ["bytes that are no node", Buffer.from("a node, opaque to the relay")],
  ] as const)("%s: nothing is taken from it", ([, bytes]) => {
    expect(EVERY.every(extensionsOf(bytes))).toBe(true);
  });
});
