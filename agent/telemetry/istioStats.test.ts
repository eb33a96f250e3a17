import { describe, expect, test } from "vitest";
import { encode, type Message, toStruct } from "../../test/controlplane/protos.ts";
import { readLoggedBatch } from "../proto/accessLog.ts";
import { countAccessLog } from "./accessLog.ts";
import { istioWorkload } from "./istioLabels.ts";
import { IstioStats } from "./istioStats.ts";

const BATCH = "envoy.service.accesslog.v3.StreamAccessLogsMessage";
const REVIEWS = "spiffe://cluster.local/ns/default/sa/reviews";
const DETAILS = "spiffe://cluster.local/ns/default/sa/details";
const SERVICES = JSON.stringify([
  { host: "details.default.svc.cluster.local", name: "details", namespace: "default" },
]);

const san = (uri: string): Message => ({ subject_alt_name: [{ uri }] });
const address = (ip: string): Message => ({ socket_address: { address: ip, port_value: 41000 } });
const INBOUND: Message = {
  downstream_direct_remote_address: address("10.0.0.7"),
  tls_properties: {
    local_certificate_properties: san(DETAILS),
    peer_certificate_properties: san(REVIEWS),
  },
  upstream_cluster: "inbound|9080||",
  custom_tags: { services: SERVICES },
  duration: { nanos: 7_000_000 },
  access_log_type: "DownstreamEnd",
};
const OUTBOUND: Message = {
  downstream_direct_remote_address: address("10.0.0.7"),
  upstream_cluster: "outbound|80||details.default.svc.cluster.local",
  custom_tags: {
    services: SERVICES,
    workload: "details-v1;default;details;v1;Kubernetes",
    principal: DETAILS,
  },
  duration: { seconds: 2, nanos: 500_000_000 },
  access_log_type: "DownstreamEnd",
};
const OK: Message = { response_code: { value: 200 }, response_body_bytes: 120 };

const identifier = (log_name: string): Message => ({ node: {}, log_name });
function httpBatch(log: string, common_properties: Message, more: Message = { response: OK }): Buffer {
  const log_entry = [{ common_properties, ...more }];
  return encode(BATCH, { identifier: identifier(log), http_logs: { log_entry } });
}
function tcpBatch(log: string, common_properties: Message, received: number, sent: number): Buffer {
  const connection_properties = { received_bytes: received, sent_bytes: sent };
  const log_entry = [{ common_properties, connection_properties }];
  return encode(BATCH, { identifier: identifier(log), tcp_logs: { log_entry } });
}

/** What is counted when these messages come on one stream; the machine is `details` in the one case, `reviews` in the other. */
function counted(
  name: string,
  messages: readonly Uint8Array[],
  endpoints: Readonly<Record<string, string>> = {},
): { lines: string[]; dropped: number; failed: string[] } {
  let dropped = 0;
  const failed: string[] = [];
  const stats = new IstioStats({
    own: istioWorkload(
      { workload: name, namespace: "default", cluster: "Kubernetes" },
      { app: name, version: "v2" },
    ),
    ownPrincipal: `spiffe://cluster.local/ns/default/sa/${name}`,
    ownProbes: ["127.77.0.1", "::6"],
    since: new Date(1_000_000),
    workloadAt: (ip) => endpoints[ip],
    onDropped: () => {
      dropped += 1;
    },
  });
  countAccessLog(
    {
      send: () => true,
      onMessage: (listener) => {
        for (const message of messages) listener(message);
      },
      onDrain: () => undefined,
      onClose: () => undefined,
      fail: (why) => void failed.push(why),
      end: () => undefined,
    },
    stats,
  );
  return { lines: stats.render().split("\n"), dropped, failed };
}

/** Labels and value of the only sample of a name. */
function sample(lines: readonly string[], name: string): { labels: Record<string, string>; value: number } {
  const found = lines.filter((line) => line.startsWith(`${name}{`));
  expect(found).toHaveLength(1);
  const [, inner = "", value = ""] = /\{(.*)\} (\S+)$/.exec(found[0] ?? "") ?? [];
  const labels = [...inner.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key = "", text = ""]) => [
    key,
    text,
  ]);
  return { labels: Object.fromEntries(labels), value: Number(value) };
}

describe("requests", () => {
  test("one that came in has the labels of Istio's server side", () => {
    const { lines } = counted("details", [httpBatch("inbound", INBOUND)], {
      "10.0.0.7": "reviews-v3;default;reviews;v3;Kubernetes",
    });
    expect(sample(lines, "istio_requests_total")).toEqual({
      value: 1,
      labels: {
        reporter: "destination",
        source_workload: "reviews-v3",
        source_workload_namespace: "default",
        source_principal: REVIEWS,
        source_app: "unknown",
        source_version: "unknown",
        source_canonical_service: "reviews",
        source_canonical_revision: "v3",
        source_cluster: "Kubernetes",
        destination_workload: "details",
        destination_workload_namespace: "default",
        destination_principal: DETAILS,
        destination_app: "details",
        destination_version: "v2",
        destination_canonical_service: "details",
        destination_canonical_revision: "v2",
        destination_cluster: "Kubernetes",
        destination_service: "details.default.svc.cluster.local",
        destination_service_name: "details",
        destination_service_namespace: "default",
        connection_security_policy: "mutual_tls",
        response_flags: "-",
        request_protocol: "http",
        response_code: "200",
      },
    });
  });

  test("one that went out has those of the client side", () => {
    const { lines } = counted("reviews", [httpBatch("outbound", OUTBOUND)]);
    const { labels } = sample(lines, "istio_requests_total");
    expect(labels).toMatchObject({
      reporter: "source",
      source_workload: "reviews",
      source_principal: REVIEWS,
      destination_workload: "details-v1",
      destination_principal: DETAILS,
      destination_canonical_revision: "v1",
      destination_service: "details.default.svc.cluster.local",
      connection_security_policy: "unknown",
    });
  });

  test("times are in milliseconds, sizes in bytes, and each lies in Istio's bucket", () => {
    const more = { request: { request_body_bytes: 30 }, response: OK };
    const { lines } = counted("reviews", [
      httpBatch("outbound", OUTBOUND, more),
      httpBatch("outbound", { ...OUTBOUND, duration: { nanos: 400_000 } }, more),
    ]);
    const bucket = (metric: string, le: string): number =>
      Number(
        lines
          .find((line) => line.startsWith(metric) && line.includes(`le="${le}"`))
          ?.split(" ")
          .at(-1),
      );
    const duration = "istio_request_duration_milliseconds_bucket";
    expect(["0.5", "1000", "2500", "+Inf"].map((le) => bucket(duration, le))).toEqual([1, 1, 2, 2]);
    expect(sample(lines, "istio_request_duration_milliseconds_sum").value).toBe(2500.4);
    expect(sample(lines, "istio_request_bytes_sum").value).toBe(60);
    expect(sample(lines, "istio_response_bytes_sum").value).toBe(240);
    expect(sample(lines, "istio_response_bytes_count").value).toBe(2);
    expect(lines.filter((line) => line === "# TYPE istio_request_bytes histogram")).toHaveLength(1);
  });

  test("a failure has its flags, and a cluster without an endpoint its service by name", () => {
    const { upstream_cluster, access_log_type } = OUTBOUND;
    const response_flags = { no_healthy_upstream: true, unauthorized_details: {} };
    const { lines } = counted("reviews", [
      httpBatch(
        "outbound",
        { upstream_cluster, access_log_type, response_flags },
        { response: { response_code: { value: 503 } } },
      ),
    ]);
    expect(sample(lines, "istio_requests_total").labels).toMatchObject({
      response_code: "503",
      response_flags: "UH,UAEX",
      destination_service: "details.default.svc.cluster.local",
      destination_service_name: "details",
      destination_service_namespace: "default",
      destination_workload: "unknown",
      source_principal: "unknown",
    });
  });

  test("what leaves the mesh has the name of its cluster, and no host: anybody can choose one", () => {
    const passed = { ...OUTBOUND, upstream_cluster: "PassthroughCluster", custom_tags: {} };
    const { labels } = sample(
      counted("reviews", [httpBatch("outbound", passed)]).lines,
      "istio_requests_total",
    );
    expect(labels).toMatchObject({
      destination_service: "unknown",
      destination_service_name: "PassthroughCluster",
      destination_service_namespace: "unknown",
    });
  });

  test.for([
    ["headers", { response_headers: { "grpc-status": "0" } }],
    ["trailers", { response_trailers: { "grpc-status": "0" } }],
  ] as const)("a gRPC call has its status, from %s", ([, status]) => {
    const request = { request_headers: { "content-type": "application/grpc+proto" } };
    const { lines } = counted("reviews", [
      httpBatch("outbound", OUTBOUND, { request, response: { ...OK, ...status } }),
    ]);
    expect(sample(lines, "istio_requests_total").labels).toMatchObject({
      request_protocol: "grpc",
      grpc_response_status: "0",
    });
  });

  test("what is no gRPC status is none in the labels, however long and different each time", () => {
    const lies = Array.from({ length: 50 }, (_, index) =>
      httpBatch("outbound", OUTBOUND, {
        request: { request_headers: { "content-type": "application/grpc" } },
        response: { ...OK, response_headers: { "grpc-status": `${index}${"9".repeat(1000)}` } },
      }),
    );
    const { lines } = counted("reviews", lies);
    expect(sample(lines, "istio_requests_total")).toMatchObject({
      value: 50,
      labels: { grpc_response_status: "" },
    });
  });

  test("requests that look alike are one series, from however many addresses", () => {
    const from = (ip: string): Buffer =>
      httpBatch("inbound", { ...INBOUND, downstream_direct_remote_address: address(ip) });
    const { lines } = counted("details", [from("10.0.0.1"), from("10.0.0.2"), from("10.0.0.1")]);
    expect(sample(lines, "istio_requests_total").value).toBe(3);
  });

  test("only the end of a request counts", () => {
    const { lines } = counted("details", [
      httpBatch("inbound", { ...INBOUND, access_log_type: "DownstreamStart" }),
      httpBatch("inbound", { ...INBOUND, access_log_type: "DownstreamPeriodic" }),
    ]);
    expect(lines).toEqual([""]);
  });
});

describe("who called", () => {
  const peerMetadata = (namespace: string): string =>
    encode(
      "google.protobuf.Struct",
      toStruct({
        NAME: "productpage-v1-7b",
        NAMESPACE: namespace,
        WORKLOAD_NAME: "productpage-v1",
        CLUSTER_ID: "east",
        LABELS: { app: "productpage", version: "v1", "service.istio.io/canonical-name": "pp" },
      }),
    ).toString("base64");
  const called = (header: string, common: Message = INBOUND): Record<string, string> =>
    sample(
      counted("details", [
        httpBatch("inbound", common, {
          request: { request_headers: { "x-envoy-peer-metadata": header } },
          response: OK,
        }),
      ]).lines,
      "istio_requests_total",
    ).labels;

  test("an endpoint without a revision has the latest, as an unknown workload has", () => {
    const { lines } = counted("details", [httpBatch("inbound", INBOUND)], {
      "10.0.0.7": "reviews;default;reviews;;Kubernetes",
    });
    expect(sample(lines, "istio_requests_total").labels).toMatchObject({
      source_workload: "reviews",
      source_canonical_revision: "latest",
    });
  });

  test("Istio's Envoy at the other end says it in a header", () => {
    expect(called(peerMetadata("default"))).toMatchObject({
      source_workload: "productpage-v1",
      source_app: "productpage",
      source_version: "v1",
      source_canonical_service: "pp",
      source_canonical_revision: "v1",
      source_cluster: "east",
      source_principal: REVIEWS,
    });
  });

  test.for([
    ["of another namespace than its certificate", peerMetadata("kube-system")],
    ["that is no metadata", "bm90IGEgc3RydWN0"],
    ["nested without end", Buffer.from("0a".repeat(200), "hex").toString("base64")],
  ])("a header %s counts for nothing", ([, header = ""]) => {
    expect(called(header)).toMatchObject({
      source_workload: "unknown",
      source_workload_namespace: "default",
      source_principal: REVIEWS,
    });
  });

  test("without mutual TLS nothing is known, whatever a header says", () => {
    const plain = { ...INBOUND, tls_properties: {} };
    expect(called(peerMetadata("default"), plain)).toMatchObject({
      source_workload: "unknown",
      source_workload_namespace: "unknown",
      source_principal: "unknown",
      destination_principal: "unknown",
      connection_security_policy: "none",
    });
  });

  test("what a peer calls itself cannot break out of its label, nor be longer than a name", () => {
    const nasty = encode(
      "google.protobuf.Struct",
      toStruct({ NAMESPACE: "default", WORKLOAD_NAME: 'a"} 1\nb\\', CLUSTER_ID: "x".repeat(10_000) }),
    ).toString("base64");
    const labels = called(nasty);
    expect(labels["source_workload"]).toBe('a\\"} 1\\nb\\\\');
    expect(labels["source_cluster"]).toHaveLength(253);
  });
});

describe("TCP connections", () => {
  const at = (access_log_type: string, stream_id = "one"): Message => ({
    ...INBOUND,
    access_log_type,
    stream_id,
    start_time: { seconds: 1001 },
  });
  const values = (messages: readonly Uint8Array[]): number[] => {
    const { lines } = counted("details", messages);
    return ["connections_opened", "connections_closed", "received_bytes", "sent_bytes"].map(
      (name) => sample(lines, `istio_tcp_${name}_total`).value,
    );
  };

  test("bytes are told while it lasts, and none of them twice", () => {
    const log = [
      tcpBatch("inbound", at("TcpPeriodic"), 0, 0),
      tcpBatch("inbound", at("TcpPeriodic"), 10, 100),
      tcpBatch("inbound", at("TcpPeriodic"), 15, 100),
      tcpBatch("inbound", at("TcpConnectionEnd"), 20, 130),
    ];
    expect(values(log.slice(0, 1))).toEqual([1, 0, 0, 0]);
    expect(values(log.slice(0, 3))).toEqual([1, 0, 15, 100]);
    expect(values(log)).toEqual([1, 1, 20, 130]);
  });

  test("one whose beginning nobody saw, or that has no name, is counted whole at its end", () => {
    expect(values([tcpBatch("inbound", at("TcpConnectionEnd"), 20, 130)])).toEqual([1, 1, 20, 130]);
    const nameless = ["TcpPeriodic", "TcpPeriodic", "TcpConnectionEnd"].map((type) =>
      tcpBatch("inbound", at(type, ""), 20, 130),
    );
    expect(values(nameless)).toEqual([1, 1, 20, 130]);
  });

  test("of one that is older than the agent only what comes from now on is counted", () => {
    const old = (type: string): Message => ({ ...at(type), start_time: { seconds: 999, nanos: 5 } });
    const log = [
      tcpBatch("inbound", old("TcpPeriodic"), 1000, 2000),
      tcpBatch("inbound", old("TcpConnectionEnd"), 1003, 2004),
    ];
    expect(values(log)).toEqual([0, 1, 3, 4]);
    expect(values(log.slice(1))).toEqual([0, 1, 0, 0]);
  });

  test("that the upstream is connected counts for nothing: the peer may not have shown its certificate yet", () => {
    const early = { ...at("TcpUpstreamConnected"), tls_properties: {} };
    const { lines } = counted("details", [tcpBatch("inbound", early, 0, 0)]);
    expect(lines).toEqual([""]);
  });

  test.for(["127.77.0.1", "::6"])("the lease's health check of %s is nobody's connection", (lo) => {
    const lease = { ...at("TcpConnectionEnd"), downstream_local_address: address(lo) };
    expect(counted("details", [tcpBatch("outbound", lease, 0, 0)]).lines).toEqual([""]);
  });

  test("it has the labels of a connection: no response code", () => {
    const { labels } = sample(
      counted("details", [tcpBatch("inbound", at("TcpConnectionEnd"), 1, 1)]).lines,
      "istio_tcp_sent_bytes_total",
    );
    expect(labels).toMatchObject({ request_protocol: "tcp", reporter: "destination", response_flags: "-" });
    expect(labels).not.toHaveProperty("response_code");
  });
});

describe("bounds", () => {
  test("beyond 500 label sets nothing is counted, and that is said", () => {
    const codes = Array.from({ length: 503 }, (_, code) =>
      httpBatch("inbound", INBOUND, { response: { response_code: { value: code } } }),
    );
    const { lines, dropped } = counted("details", codes);
    expect(lines.filter((line) => line.startsWith("istio_requests_total{"))).toHaveLength(500);
    expect(dropped).toBe(3);
  });

  test("a log with another name, or none, is not ours", () => {
    expect(counted("details", [httpBatch("mine", INBOUND)]).lines).toEqual([""]);
    expect(counted("details", [encode(BATCH, { http_logs: { log_entry: [{}] } })]).lines).toEqual([""]);
  });

  test("the name on the first message holds for its stream", () => {
    const later = encode(BATCH, {
      http_logs: { log_entry: [{ common_properties: INBOUND, response: OK }] },
    });
    const { lines } = counted("details", [httpBatch("inbound", INBOUND), later]);
    expect(sample(lines, "istio_requests_total").value).toBe(2);
  });

  test("bytes that are no access log end the stream", () => {
    expect(counted("details", [Buffer.from([0x12, 0x7f, 1])]).failed).toEqual([
      expect.stringContaining("not an access log"),
    ]);
    expect(() => readLoggedBatch(Buffer.from([0x12, 0x7f, 1]))).toThrow();
  });
});
