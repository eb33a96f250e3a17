import { TYPE_URL } from "../../../agent/proto/discovery.ts";
import { writeAny } from "../../../agent/proto/wire.ts";
import { workloadAt } from "../../../agent/xds/endpoints.ts";
import { extensionsOf, strip } from "../../../agent/xds/strip.ts";
import { decode, encode, TYPE_PREFIX } from "../../controlplane/protos.ts";
import type { Target } from "../target.ts";
import { mutateMessage } from "../wire.ts";

const opaque = (type: string) => ({ type_url: TYPE_PREFIX + type, value: Buffer.from("x") });
const named = (name: string, typed_config: object) => ({ name, typed_config });
const stats = named("istio.stats", opaque("stats.PluginConfig"));
const exchange = named(
  "istio.metadata_exchange",
  opaque("envoy.tcp.metadataexchange.config.MetadataExchange"),
);
const http = named("hcm", {
  "@type": `${TYPE_PREFIX}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`,
  stat_prefix: "p",
  http_filters: [named("alpn", opaque("istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig")), stats],
});
const tcp = named("tcp", {
  "@type": `${TYPE_PREFIX}envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`,
  stat_prefix: "p",
  cluster: "c",
  access_log: [named("file", opaque("x"))],
});
const transport_socket = named("tls", {
  "@type": `${TYPE_PREFIX}envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext`,
  common_tls_context: { alpn_protocols: ["istio-peer-exchange", "h2"] },
});
const [LISTENER, CLUSTER] = ["envoy.config.listener.v3.Listener", "envoy.config.cluster.v3.Cluster"] as const;
const types = { [LISTENER]: TYPE_URL.listener, [CLUSTER]: TYPE_URL.cluster };

export const target: Target = {
  about:
    "what istiod sends is taken out once: nothing for an Envoy that has it all, nothing more at the second time, and what was a resource is one after it",
  covers: /\/agent\/(proto|xds)\//,
  seeds: [
    encode(LISTENER, {
      name: "l",
      traffic_direction: "INBOUND",
      filter_chains: [{ filters: [exchange, http], transport_socket }, { filters: [stats, tcp] }],
      default_filter_chain: { filters: [tcp] },
    }),
    encode(CLUSTER, {
      name: "c",
      transport_socket,
      filters: [exchange],
      transport_socket_matches: [{ name: "m", transport_socket }],
    }),
    encode("envoy.config.endpoint.v3.ClusterLoadAssignment", {
      cluster_name: "c",
      endpoints: [
        {
          lb_endpoints: [
            { endpoint: { address: { socket_address: { address: "10.0.0.7", port_value: 80 } } } },
          ],
        },
      ],
    }),
    encode("envoy.config.core.v3.Node", {
      user_agent_build_version: { version: { major_number: 1, minor_number: 36 } },
      extensions: [{ name: "e", type_urls: ["stats.PluginConfig"] }],
    }),
  ],
  words: ["stats.PluginConfig", "udpa.type.v1.TypedStruct", "istio-peer-exchange"],
  mutate: mutateMessage,
  run(bytes) {
    extensionsOf(bytes)("stats.PluginConfig");
    for (const [type, url] of Object.entries(types)) {
      const any = writeAny(url, bytes);
      workloadAt(any, "10.0.0.7");
      if (strip(url, any, () => true).any !== any) throw new Error("it changed for an Envoy that has it all");
      const once = strip(url, any, () => false);
      if (once.any !== any) {
        const twice = strip(url, once.any, () => false);
        if (twice.removed.length > 0) throw new Error(`left over at the first time: ${twice.removed.join()}`);
        if (isValid(type, any) && !isValid(type, once.any)) throw new Error("it is no resource any more");
      }
    }
  },
};

function isValid(type: string, any: Uint8Array): boolean {
  try {
    decode(type, (decode("google.protobuf.Any", any) as { value: Uint8Array }).value);
    return true;
  } catch {
    return false;
  }
}
