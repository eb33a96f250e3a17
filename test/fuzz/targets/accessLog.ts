import type { ServedStream } from "../../../agent/platform/grpc.ts";
import { countAccessLog } from "../../../agent/telemetry/accessLog.ts";
import { istioWorkload } from "../../../agent/telemetry/istioLabels.ts";
import { IstioStats } from "../../../agent/telemetry/istioStats.ts";
import { encode, toStruct } from "../../controlplane/protos.ts";
import type { Target } from "../target.ts";
import { isMalformed, mutateMessage } from "../wire.ts";

const SPIFFE = "spiffe://cluster.local/ns/default/sa/reviews";
const san = { subject_alt_name: [{ uri: SPIFFE }] };
const common_properties = {
  downstream_direct_remote_address: { socket_address: { address: "10.0.0.7", port_value: 1 } },
  downstream_local_address: { socket_address: { address: "10.0.0.8", port_value: 80 } },
  tls_properties: { local_certificate_properties: san, peer_certificate_properties: san },
  upstream_cluster: "outbound|80||details.default.svc.cluster.local",
  start_time: { seconds: 1_700_000_000 },
  duration: { nanos: 7_000_000 },
  response_flags: { failed_local_healthcheck: true, unauthorized_details: { reason: "EXTERNAL_SERVICE" } },
  custom_tags: {
    services: '[{"host":"a.b.svc","name":"a","namespace":"b"}]',
    workload: "details-v1;default;details;v1;Kubernetes",
    principal: SPIFFE,
  },
  stream_id: "1",
  access_log_type: "DownstreamEnd",
};
const metadata = encode("google.protobuf.Struct", toStruct({ NAMESPACE: "default", LABELS: { app: "x" } }));
const BATCH = "envoy.service.accesslog.v3.StreamAccessLogsMessage";
const batch = (log_name: string): Uint8Array =>
  encode(BATCH, {
    identifier: { log_name },
    http_logs: {
      log_entry: [
        {
          common_properties,
          request: {
            request_headers: {
              "x-envoy-peer-metadata": metadata.toString("base64"),
              "content-type": "application/grpc",
            },
          },
          response: {
            response_code: { value: 200 },
            response_trailers: { "grpc-status": "0" },
            response_body_bytes: 9,
          },
        },
      ],
    },
    tcp_logs: {
      log_entry: [{ common_properties, connection_properties: { received_bytes: 1, sent_bytes: 2 } }],
    },
  });

const LINE =
  /^(# (HELP|TYPE) \w+ [^\n]*|\w+\{(\w+="([^"\\\n]|\\[\\"n]){0,600}",?)+\} (NaN|[+-]?Inf|-?\d[\d.e+-]*))$/;

export const target: Target = {
  about: "an access log fails its stream in words, or ends in Prometheus' text format with bounded labels",
  covers: /\/agent\/(proto|telemetry)\//,
  seeds: [batch("inbound"), batch("outbound")],
  words: [
    "inbound",
    "outbound",
    ";;;;",
    '[{"host":1}]',
    "spiffe://a/ns/b/sa/c",
    "\\",
    '"',
    "\n",
    "application/grpc",
  ],
  mutate: mutateMessage,
  run(bytes) {
    const failed: string[] = [];
    let deliver: (message: Uint8Array) => void = () => undefined;
    const unused = (): never => {
      throw new Error("the access log is never answered");
    };
    const stream: ServedStream = {
      send: unused,
      onDrain: unused,
      onClose: unused,
      end: unused,
      onMessage: (listener) => {
        deliver = listener;
      },
      fail: (why) => failed.push(why),
    };
    const stats = new IstioStats({
      own: istioWorkload({ workload: "w", namespace: "default", cluster: "Kubernetes" }, {}),
      ownPrincipal: SPIFFE,
      workloadAt: (address) => (address === "10.0.0.7" ? "r;default;r;v1;k" : undefined),
      since: new Date(0),
      ownProbes: [],
      onDropped: () => undefined,
    });
    countAccessLog(stream, stats);
    deliver(bytes);
    for (const why of failed)
      if (!isMalformed(new Error(why.replace("not an access log: ", ""))))
        throw new Error(`it failed with: ${why}`);
    const lines = stats.render().split("\n").slice(0, -1);
    const wrong = lines.find((line) => !LINE.test(line));
    if (wrong !== undefined) throw new Error(`no line of the text format: ${wrong}`);
  },
};
