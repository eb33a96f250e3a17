import { describe, expect, test } from "vitest";
import { type BootstrapInput, envoyArgv, renderBootstrap } from "./bootstrap.ts";

const INPUT: BootstrapInput = {
  node: {
    id: "sidecar~10.0.0.5~vm-1.default~default.svc.cluster.local",
    cluster: "details.default",
    metadata: {},
  },
  adminSocket: "/run/vmmesh-envoy/admin.sock",
  xdsSocket: "/run/vmmesh/xds.sock",
  sdsSocket: "/run/vmmesh/sds.sock",
  adminSocketMode: 0o600,
  ipv6: true,
  lease: true,
};

interface StatsConfig {
  stats_config: {
    stats_tags: { tag_name: string; regex: string }[];
    stats_matcher: {
      inclusion_list: { patterns: { prefix?: string; suffix?: string; safe_regex?: { regex: string } }[] };
    };
  };
}

const { stats_config: STATS } = renderBootstrap({
  ...INPUT,
  stats: {
    prefixes: ["cluster_dns"],
    suffixes: [".mine"],
    regexps: [String.raw`dns\..*_total`],
    tags: ["team"],
  },
}) as unknown as StatsConfig;

/** Envoy's rule: a statistic stays if one pattern takes it; a regular expression must take the whole name. */
function kept(name: string): boolean {
  return STATS.stats_matcher.inclusion_list.patterns.some(
    ({ prefix, suffix, safe_regex: regex }) =>
      (prefix !== undefined && name.startsWith(prefix)) ||
      (suffix !== undefined && name.endsWith(suffix)) ||
      (regex !== undefined && new RegExp(`^(?:${regex.regex})$`).test(name)),
  );
}

/** Envoy's rule: the first group of each expression is cut out of the name, the second is the tag's value. */
function tagged(name: string): { name: string; tags: Record<string, string> } {
  const tags: Record<string, string> = {};
  let rest = name;
  for (const { tag_name: tag, regex } of STATS.stats_tags) {
    const match = new RegExp(regex).exec(name);
    if (match === null) continue;
    tags[tag] = match[2] ?? "";
    rest = rest.replace(match[1] ?? "", "");
  }
  return { name: rest, tags };
}

describe("which statistics stay", () => {
  test.for([
    {
      name: "requests of a service",
      stat: "cluster.outbound|80||details.default.svc.cluster.local;.upstream_rq_200",
      want: true,
    },
    {
      name: "latency of a service",
      stat: "cluster.outbound|80||details.default.svc.cluster.local;.upstream_rq_time",
      want: true,
    },
    { name: "endpoints of a service", stat: "cluster.outbound|80||a.b;.membership_healthy", want: true },
    {
      name: "a peer with a wrong certificate",
      stat: "cluster.outbound|80||a.b;.ssl.fail_verify_san",
      want: true,
    },
    { name: "requests to the control plane", stat: "cluster.xds-grpc;.upstream_cx_active", want: true },
    {
      name: "the main thread's share of admin",
      stat: "listener.admin.main_thread.downstream_cx_active",
      want: false,
    },
    // Seen with istiod 1.31: without this a sum over a service counted each request twice.
    {
      name: "requests of a service, told again",
      stat: "cluster.outbound|80||a.b;.external.upstream_rq_200",
      want: false,
    },
    {
      name: "requests of a service of an older istiod",
      stat: "cluster.outbound|80||a.b.upstream_rq_200",
      want: true,
    },
    { name: "a service's HTTP/2 internals", stat: "cluster.outbound|80||a.b;.http2.tx_reset", want: false },
    {
      name: "a service's retry budget",
      stat: "cluster.outbound|80||a.b;.circuit_breakers.default.remaining_rq",
      want: false,
    },
    { name: "connections of a listener", stat: "listener.0.0.0.0_15006.downstream_cx_total", want: true },
    { name: "connections of an IPv6 listener", stat: "listener.[__]_15006.downstream_cx_active", want: true },
    { name: "connections of admin", stat: "listener.admin.downstream_cx_active", want: true },
    {
      name: "one worker's share of them",
      stat: "listener.0.0.0.0_15006.worker_0.downstream_cx_total",
      want: false,
    },
    {
      name: "the tenth worker's share",
      stat: "listener.0.0.0.0_15006.worker_10.downstream_cx_active",
      want: false,
    },
    {
      name: "a listener's requests, told below http. too",
      stat: "listener.0.0.0.0_15006.http.inbound.downstream_rq_2xx",
      want: false,
    },
    { name: "requests that came in", stat: "http.inbound_0.0.0.0_9080;.downstream_rq_2xx", want: true },
    {
      name: "how a service's routes were received",
      stat: "http.outbound_10.96.0.10_80;.rds.a.b:80.update_success",
      want: false,
    },
    { name: "bytes past the mesh", stat: "tcp.PassthroughCluster.downstream_cx_rx_bytes_total", want: true },
    { name: "what readiness asks for", stat: "listener_manager.lds.update_rejected", want: true },
    { name: "Envoy itself", stat: "server.days_until_first_cert_expiring", want: true },
    { name: "connection to the control plane", stat: "control_plane.connected_state", want: true },
    { name: "denied by policy", stat: "http.inbound_0.0.0.0_9080;.rbac.denied", want: true },
    { name: "files written", stat: "filesystem.write_completed", want: false },
    { name: "wished by prefix", stat: "cluster_dns.x", want: true },
    { name: "wished by suffix", stat: "filesystem.mine", want: true },
    { name: "wished by expression", stat: "dns.cares.get_addr_total", want: true },
  ])("$name", ({ stat, want }) => {
    expect(kept(stat)).toBe(want);
  });
});

describe("names and tags of statistics", () => {
  test.for([
    {
      name: "a service, as newer istiods end its name",
      stat: "cluster.outbound|80|v1|details.default.svc.cluster.local;.upstream_rq_503",
      want: {
        name: "cluster.upstream_rq",
        tags: { cluster_name: "outbound|80|v1|details.default.svc.cluster.local", response_code: "503" },
      },
    },
    {
      name: "a service, as older istiods name it",
      stat: "cluster.outbound|443||www.ssl.com.upstream_cx_total",
      want: { name: "cluster.upstream_cx_total", tags: { cluster_name: "outbound|443||www.ssl.com" } },
    },
    {
      name: "TLS of a service",
      stat: "cluster.inbound|9080||;.ssl.handshake",
      want: { name: "cluster.ssl.handshake", tags: { cluster_name: "inbound|9080||" } },
    },
    {
      name: "a class of answers",
      stat: "http.inbound_0.0.0.0_9080;.downstream_rq_2xx",
      want: {
        name: "http.downstream_rq",
        tags: { http_conn_manager_prefix: "inbound_0.0.0.0_9080", response_code_class: "2xx" },
      },
    },
    {
      name: "denied by policy",
      stat: "http.inbound_0.0.0.0_9080;.rbac.denied",
      want: {
        name: "http.rbac",
        tags: { http_conn_manager_prefix: "inbound_0.0.0.0_9080", authz_enforce_result: "denied" },
      },
    },
    {
      name: "a listener on IPv6",
      stat: "listener.[__]_15006.downstream_cx_active",
      want: { name: "listener.downstream_cx_active", tags: { listener_address: "[__]_15006" } },
    },
    {
      name: "bytes past the mesh",
      stat: "tcp.PassthroughCluster.downstream_cx_total",
      want: { name: "tcp.downstream_cx_total", tags: { tcp_prefix: "PassthroughCluster" } },
    },
    {
      name: "an operator's own tag",
      stat: "team=.=red;.;requests",
      want: { name: "requests", tags: { team: "red" } },
    },
    {
      name: "nothing to tag",
      stat: "cluster_manager.cds.update_success",
      want: { name: "cluster_manager.cds.update_success", tags: {} },
    },
  ])("$name", ({ stat, want }) => {
    expect(tagged(stat)).toEqual(want);
  });
});

describe("renderBootstrap", () => {
  test("runtime values overlay ours: true and false become booleans, an empty text removes a key", () => {
    const runtime = { "re2.max_program_size.error_level": "", "a.b": "true", "c.d": "12" };
    expect(renderBootstrap({ ...INPUT, runtime })).toMatchObject({
      layered_runtime: {
        layers: [
          {
            static_layer: {
              "envoy.reloadable_features.http_reject_path_with_fragment": false,
              "a.b": true,
              "c.d": "12",
            },
          },
          { admin_layer: {} },
        ],
      },
    });
  });

  test("an agent that was away is dialled again within two seconds, not within Envoy's own thirty", () => {
    const wait = { base_interval: "0.2s", max_interval: "2s" };
    expect(renderBootstrap(INPUT)).toMatchObject({
      dynamic_resources: {
        ads_config: { grpc_services: [{ envoy_grpc: { retry_policy: { retry_back_off: wait } } }] },
      },
    });
  });

  test("without a lease there is no health check on the redirect's port", () => {
    expect(JSON.stringify(renderBootstrap({ ...INPUT, lease: false }))).not.toContain("127.77.0.1");
  });

  test.for([
    { name: "a relative path", xdsSocket: "run/xds.sock" },
    { name: "a path that the kernel would cut off", xdsSocket: `/${"x".repeat(107)}` },
  ])("a socket with $name is refused", ({ xdsSocket }) => {
    expect(() => renderBootstrap({ ...INPUT, xdsSocket })).toThrow(
      expect.objectContaining({ code: "CONFIG_MALFORMED" }),
    );
  });

  test("the longest path that unix(7) allows is taken", () => {
    expect(() => renderBootstrap({ ...INPUT, xdsSocket: `/${"x".repeat(106)}` })).not.toThrow();
  });
});

describe("envoyArgv", () => {
  test("defaults are Istio's, one thread per processor, one line per message", () => {
    expect(envoyArgv({ binary: "/usr/bin/envoy", bootstrap: "/run/vmmesh/bootstrap.json" }).join(" ")).toBe(
      "/usr/bin/envoy --config-path /run/vmmesh/bootstrap.json --disable-hot-restart --drain-time-s 45 " +
        "--drain-strategy immediate --local-address-ip-version v4 --file-flush-interval-msec 1000 --log-level warning " +
        "--log-format %l envoy %n: %v (%g:%#, thread %t) --log-format-escaped --skip-deprecated-logs",
    );
  });

  test("every option has its flag", () => {
    const argv = envoyArgv({
      binary: "/usr/bin/envoy",
      bootstrap: "/b.json",
      concurrency: 2,
      logLevel: "debug",
      componentLogLevel: "rbac:trace",
      drainSeconds: 5,
      addressFamily: 6,
    });
    expect(argv.join(" ")).toMatch(
      /--drain-time-s 5 .*--local-address-ip-version v6 .*--log-level debug .*--component-log-level rbac:trace --concurrency 2$/,
    );
  });
});
