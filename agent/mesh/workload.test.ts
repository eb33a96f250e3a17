import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { VmmeshError } from "../core/errors.ts";
import { readBundle } from "./bundle.ts";
import { parseEnv } from "./env.ts";
import { nodeMetadata, nodeOf } from "./node.ts";
import { parseProbe } from "./probe.ts";
import { renderSidecarEnv, SIDECAR_KEYS } from "./sidecar.ts";
import type { Workload } from "./types.ts";
import { type MachineNames, type WorkloadInput, workloadOf } from "./workload.ts";

const machine: MachineNames = {
  hostname: "vm-1.example.org",
  addresses: [
    { interface: "lo", family: 4, address: "127.0.0.1", bits: 8 },
    { interface: "docker0", family: 4, address: "172.17.0.1", bits: 16 },
    { interface: "eth0", family: 4, address: "10.0.0.7", bits: 24 },
    { interface: "eth0", family: 6, address: "fe80::1", bits: 64 },
    { interface: "eth0", family: 6, address: "2001:db8::7", bits: 64 },
    { interface: "kube-ipvs0", family: 4, address: "10.96.0.1", bits: 32 },
  ],
};

function workload(
  clusterEnv: Readonly<Record<string, string>> = {},
  sidecarEnv: Readonly<Record<string, string>> = {},
  more: Partial<WorkloadInput> = {},
): Workload {
  return workloadOf({
    clusterEnv: new Map(Object.entries({ ISTIO_NAMESPACE: "bar", ...clusterEnv })),
    sidecarEnv: new Map(Object.entries(sidecarEnv)),
    proxyConfig: {},
    machine,
    ...more,
  });
}

function failure(work: () => unknown): VmmeshError {
  try {
    work();
  } catch (thrown) {
    if (thrown instanceof VmmeshError) return thrown;
  }
  throw new Error("no VmmeshError");
}

describe("addresses", () => {
  test.for([
    {
      name: "interfaces, container bridges last, nothing of loopback, link-local or kube-proxy",
      env: {},
      want: ["10.0.0.7", "2001:db8::7", "172.17.0.1"],
    },
    {
      name: "what the operator says comes first",
      env: { ISTIO_SVC_IP: "192.0.2.1" },
      want: ["192.0.2.1", "10.0.0.7", "2001:db8::7", "172.17.0.1"],
    },
    {
      name: "and is not listed twice",
      env: { ISTIO_SVC_IP: "2001:db8::7" },
      want: ["2001:db8::7", "10.0.0.7", "172.17.0.1"],
    },
  ])("$name", ({ env, want }) => {
    expect(workload({}, env).addresses).toEqual(want);
  });

  test("a machine with loopback alone has none", () => {
    const alone = { ...machine, addresses: machine.addresses.slice(0, 1) };
    expect(failure(() => workload({}, {}, { machine: alone })).code).toBe("NO_ADDRESS");
  });
});

describe("the machine's own file", () => {
  test.for([
    {
      name: "wins over the mesh's",
      mesh: { ISTIO_SERVICE_CIDR: "*" },
      own: { ISTIO_SERVICE_CIDR: "10.96.0.0/16" },
      want: { outboundCidrs: ["10.96.0.0/16"] },
    },
    {
      name: "wins when it is empty too",
      mesh: { ISTIO_SERVICE_CIDR: "*" },
      own: { ISTIO_SERVICE_CIDR: "" },
      want: { outboundCidrs: [] },
    },
    {
      name: "names Envoy, the mesh cannot",
      mesh: { VMMESH_ENVOY: "/tmp/evil" },
      own: {},
      want: { envoyPath: "envoy" },
    },
    { name: "asks for RSA", mesh: {}, own: { VMMESH_KEY_KIND: "rsa-2048" }, want: { keyKind: "rsa-2048" } },
    {
      name: "else keys are ECDSA",
      mesh: { VMMESH_KEY_KIND: "rsa-2048" },
      own: {},
      want: { keyKind: "ecdsa-p256" },
    },
    {
      name: "names the credential command, the mesh cannot",
      mesh: { VMMESH_CREDENTIAL_EXEC: "/tmp/evil" },
      own: {},
      want: { credentialExec: undefined },
    },
    {
      name: "names the credential command",
      mesh: {},
      own: { VMMESH_CREDENTIAL_EXEC: "/usr/local/lib/token" },
      want: { credentialExec: "/usr/local/lib/token" },
    },
    {
      name: "names istiod's addresses",
      mesh: { VMMESH_ISTIOD_ADDRESSES: "6.6.6.6" },
      own: { VMMESH_ISTIOD_ADDRESSES: "10.0.0.1, lb.example.org" },
      want: { istiodAddresses: ["10.0.0.1", "lb.example.org"] },
    },
    {
      name: "names the instance",
      mesh: {},
      own: { VMMESH_INSTANCE_NAME: "one" },
      want: { instanceName: "one" },
    },
    { name: "else the host name does, its first label", mesh: {}, own: {}, want: { instanceName: "vm-1" } },
    {
      name: "adds excluded inbound ports",
      mesh: { ISTIO_LOCAL_EXCLUDE_PORTS: "9000" },
      own: { ISTIO_LOCAL_EXCLUDE_PORTS: "8000" },
      want: { inboundExcludePorts: [22, 8000, 9000, 15020, 15021, 15090] },
    },
    {
      name: "takes Istio's owner groups, of which * is everybody",
      mesh: { ISTIO_OUTBOUND_OWNER_GROUPS: "*", ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: "ftp,888" },
      own: {},
      want: {
        outboundOwners: {
          only: { users: [], groups: [], units: [] },
          never: { users: [], groups: ["ftp", "888"], units: [] },
        },
      },
    },
    {
      name: "adds to Istio's own exclusions",
      mesh: { ISTIO_SERVICE_EXCLUDE_CIDR: "10.1.0.0/16", ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE: "53" },
      own: { VMMESH_OUTBOUND_EXCLUDE_CIDRS: "10.2.0.0/16", VMMESH_OUTBOUND_EXCLUDE_PORTS: "25,53" },
      want: { outboundExcludeCidrs: ["10.1.0.0/16", "10.2.0.0/16"], outboundExcludePorts: [25, 53] },
    },
  ])("$name", ({ mesh, own, want }) => {
    expect(workload(mesh, own)).toMatchObject(want);
  });
});

describe("what the mesh says", () => {
  test.for([
    // A bundle of istioctl 1.12 and older excludes 15090,15021,15020 only: SSH would have gone into Envoy.
    {
      name: "SSH stays out of Envoy, whatever an old bundle says",
      env: { ISTIO_INBOUND_PORTS: "*", ISTIO_LOCAL_EXCLUDE_PORTS: "15090,15021,15020" },
      want: { inbound: { kind: "all" }, inboundExcludePorts: [22, 15020, 15021, 15090] },
    },
    {
      name: "inbound ports",
      env: { ISTIO_INBOUND_PORTS: "9080,7070" },
      want: { inbound: { kind: "ports", ports: [9080, 7070] } },
    },
    {
      name: "inbound connections are redirected",
      env: {},
      want: { interception: { mode: "REDIRECT", routeTable: 133 } },
    },
    {
      name: "TPROXY, which istiod is told, too",
      env: { ISTIO_INBOUND_INTERCEPTION_MODE: "TPROXY", ISTIO_INBOUND_TPROXY_ROUTE_TABLE: "77" },
      want: { interception: { mode: "TPROXY", routeTable: 77 }, meta: { INTERCEPTION_MODE: "TPROXY" } },
    },
    {
      name: "TPROXY by the word for istiod alone",
      env: { ISTIO_META_INTERCEPTION_MODE: "TPROXY" },
      want: { interception: { mode: "TPROXY" } },
    },
    {
      name: "what the machine says of its rules istiod hears, whatever the mesh has said",
      env: { ISTIO_META_INTERCEPTION_MODE: "TPROXY", ISTIO_INBOUND_INTERCEPTION_MODE: "REDIRECT" },
      want: { interception: { mode: "REDIRECT" }, meta: { INTERCEPTION_MODE: "REDIRECT" } },
    },
    {
      name: "interfaces, in the peer's words",
      env: { ISTIO_EXCLUDE_INTERFACES: "wg0, br-+", KUBE_VIRT_INTERFACES: "virbr0", INVALID_DROP: "true" },
      want: { excludeInterfaces: ["wg0", "br-+"], virtualInterfaces: ["virbr0"], dropInvalid: true },
    },
    { name: "no inbound key: nothing is captured", env: {}, want: { inbound: { kind: "ports", ports: [] } } },
    {
      name: "an empty trust domain is the default one",
      env: { TRUST_DOMAIN: "" },
      want: { trustDomain: "cluster.local" },
    },
    {
      name: "an empty service account is `default`",
      env: { SERVICE_ACCOUNT: "" },
      want: { serviceAccount: "default" },
    },
    {
      name: "no group: nothing is registered",
      env: {},
      want: { workloadGroup: undefined, dnsCapture: false },
    },
    {
      name: "group and DNS",
      env: { ISTIO_META_AUTO_REGISTER_GROUP: "g", ISTIO_META_DNS_CAPTURE: "true" },
      want: { workloadGroup: "g", dnsCapture: true, workloadName: "g" },
    },
    {
      name: "ports of the group",
      env: { ISTIO_META_POD_PORTS: '[{"name":"http","containerPort":8080,"protocol":""}]' },
      want: { ports: [{ name: "http", port: 8080 }] },
    },
    {
      name: "the script's namespace beats the agent's",
      env: { POD_NAMESPACE: "other" },
      want: { namespace: "bar" },
    },
    {
      name: "another port of istiod",
      env: { ISTIO_PILOT_PORT: "31212" },
      want: { discoveryAddress: "istiod.istio-system.svc:31212" },
    },
    {
      name: "another istiod",
      env: { PILOT_ADDRESS: "istiod.x.svc:15012" },
      want: { discoveryAddress: "istiod.x.svc:15012" },
    },
    { name: "the default istiod", env: {}, want: { discoveryAddress: "istiod.istio-system.svc:15012" } },
    {
      name: "the external address is not on the machine: probes go to localhost",
      env: { REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION: "true" },
      want: { probeHost: "localhost" },
    },
    { name: "probes go to the first address else", env: {}, want: { probeHost: "10.0.0.7" } },
  ])("$name", ({ env, want }) => {
    expect(workload(env)).toMatchObject(want);
  });

  test("the environment stands over the ProxyConfig's metadata", () => {
    const proxyConfig = {
      proxyMetadata: { ISTIO_META_NETWORK: "a", ISTIO_META_MESH_ID: "m", UNRELATED: "x" },
    };
    expect(workload({ ISTIO_META_NETWORK: "b" }, {}, { proxyConfig })).toMatchObject({
      network: "b",
      meshId: "m",
      meta: { NETWORK: "b", MESH_ID: "m" },
    });
  });

  test.for([
    { env: { ISTIO_INBOUND_PORTS: "80,http" }, want: "ISTIO_INBOUND_PORTS in cluster.env names `http`" },
    { env: { ISTIO_SERVICE_CIDR: "10.0.0.0/99" }, want: "names `10.0.0.0/99`, which is not an IP prefix" },
    { env: { ISTIO_META_POD_PORTS: "{}" }, want: "ISTIO_META_POD_PORTS in cluster.env is not" },
    {
      env: { ISTIO_METAJSON_LABELS: "[]" },
      want: "ISTIO_METAJSON_LABELS in cluster.env is not a JSON object",
    },
    {
      env: { ISTIO_INBOUND_INTERCEPTION_MODE: "NONE" },
      want: "ISTIO_INBOUND_INTERCEPTION_MODE in cluster.env is `NONE`, which is neither REDIRECT nor TPROXY",
    },
    {
      env: { ISTIO_META_INTERCEPTION_MODE: "tproxy" },
      want: "ISTIO_META_INTERCEPTION_MODE in cluster.env is `tproxy`",
    },
    {
      env: { ISTIO_INBOUND_INTERCEPTION_MODE: "TPROXY", ISTIO_INBOUND_TPROXY_MARK: "7" },
      want: "istiod has Envoy use 1337 whatever is set here",
    },
    { env: { ISTIO_INBOUND_TPROXY_ROUTE_TABLE: "main" }, want: "is `main`, not a table between 1 and 252" },
    { env: { ISTIO_SVC_IP: "vm-1" }, want: "ISTIO_SVC_IP in cluster.env is `vm-1`" },
    { env: { PILOT_ADDRESS: "istiod" }, want: "which is not HOST:PORT" },
    { env: { ISTIO_NAMESPACE: "" }, want: "ISTIO_NAMESPACE in cluster.env is missing" },
  ])("refuses: $want", ({ env, want }) => {
    const error = failure(() => workload(env as Record<string, string>));
    expect(error.code).toBe("CONFIG_MALFORMED");
    expect(error.message).toContain(want);
  });
});

describe("parseProbe", () => {
  const times = {
    initialDelaySeconds: 0,
    timeoutSeconds: 1,
    periodSeconds: 10,
    successThreshold: 1,
    failureThreshold: 1,
  };
  test.for([
    {
      name: "http with Istio's defaults",
      probe: { httpGet: { port: 8080 } },
      want: { ...times, check: { kind: "http", scheme: "http", port: 8080, path: "/", headers: [] } },
    },
    {
      name: "zeros are not given",
      probe: {
        timeoutSeconds: 0,
        periodSeconds: 0,
        failureThreshold: 0,
        tcpSocket: { port: "3306", host: "" },
      },
      want: { ...times, check: { kind: "tcp", port: 3306 } },
    },
    {
      name: "everything given",
      probe: {
        initialDelaySeconds: 5,
        timeoutSeconds: 2,
        periodSeconds: 3,
        successThreshold: 4,
        failureThreshold: 6,
        httpGet: {
          port: 1,
          host: "h",
          scheme: "HTTPS",
          path: "/x",
          httpHeaders: [{ name: "A", value: "b" }],
        },
      },
      want: {
        initialDelaySeconds: 5,
        timeoutSeconds: 2,
        periodSeconds: 3,
        successThreshold: 4,
        failureThreshold: 6,
        check: {
          kind: "http",
          scheme: "https",
          host: "h",
          port: 1,
          path: "/x",
          headers: [{ name: "A", value: "b" }],
        },
      },
    },
    {
      name: "a command",
      probe: { exec: { command: ["true"] } },
      want: { ...times, check: { kind: "exec", argv: ["true"] } },
    },
    {
      name: "gRPC health",
      probe: { grpc: { port: 7070 } },
      want: { ...times, check: { kind: "grpc", port: 7070, service: "" } },
    },
    { name: "none", probe: undefined, want: undefined },
  ])("$name", ({ probe, want }) => {
    expect(parseProbe(probe)).toEqual(want);
  });

  test.for([
    { probe: {}, want: "has none of httpGet" },
    { probe: { httpGet: { port: 0 } }, want: "port 0" },
    { probe: { httpGet: { port: 80, scheme: "ftp" } }, want: "unknown scheme `ftp`" },
    { probe: { periodSeconds: -1, tcpSocket: { port: 1 } }, want: "`periodSeconds: -1`" },
    { probe: { exec: { command: "reboot" } }, want: "exec.command" },
  ])("refuses $want", ({ probe, want }) => {
    expect(failure(() => parseProbe(probe)).message).toContain(want);
  });
});

describe("sidecar.env", () => {
  test("the backend is the machine's own choice, and one of four words", () => {
    expect(workload({ VMMESH_BACKEND: "legacy" }).backend).toBe("auto");
    expect(workload({}, { VMMESH_BACKEND: "nftables" }).backend).toBe("nftables");
    expect(failure(() => workload({}, { VMMESH_BACKEND: "iptables" }))).toMatchObject({
      code: "CONFIG_MALFORMED",
      message: "VMMESH_BACKEND in sidecar.env is `iptables`, not one of auto, nft, legacy, nftables",
    });
  });

  test("what is written is what the agent reads", () => {
    const text = renderSidecarEnv({
      ip: "10.0.0.9",
      instanceName: "vm-1",
      envoyPath: "/opt/en'voy",
      istiodAddresses: ["10.0.0.1", "10.0.0.2"],
      meshCidrs: ["10.96.0.0/16"],
      outboundExcludeCidrs: ["10.1.0.0/16"],
      outboundExcludePorts: [25],
      inboundExcludePorts: [9100],
      failurePolicy: ["outbound:[fd00::/8]:443=closed", "inbound:*=open"],
      outboundPorts: [443],
      outboundUsers: ["alice", "1001"],
      outboundExcludeUsers: ["backup"],
      outboundGroups: ["java"],
      outboundExcludeGroups: ["ftp"],
      outboundUnits: ["shop.service"],
      outboundExcludeUnits: ["backup"],
    });
    expect(workload({}, Object.fromEntries(parseEnv(text, "sidecar.env")))).toMatchObject({
      addresses: ["10.0.0.9", "10.0.0.7", "2001:db8::7", "172.17.0.1"],
      instanceName: "vm-1",
      envoyPath: "/opt/en'voy",
      istiodAddresses: ["10.0.0.1", "10.0.0.2"],
      meshCidrs: ["10.96.0.0/16"],
      outboundExcludeCidrs: ["10.1.0.0/16"],
      outboundExcludePorts: [25],
      inboundExcludePorts: [22, 9100, 15020, 15021, 15090],
      failurePolicy: ["outbound:[fd00::/8]:443=closed", "inbound:*=open"],
      outboundPorts: [443],
      outboundOwners: {
        only: { users: ["alice", "1001"], groups: ["java"], units: ["shop.service"] },
        never: { users: ["backup"], groups: ["ftp"], units: ["backup"] },
      },
    });
  });

  test("nothing is set: every key stands there as a comment, with its meaning", async () => {
    const text = renderSidecarEnv({});
    expect(parseEnv(text, "sidecar.env").size).toBe(0);
    for (const key of Object.keys(SIDECAR_KEYS)) expect(text).toContain(`\n#${key}=''\n`);
    await expect(renderSidecarEnv({ envoyPath: "/usr/bin/envoy" })).toMatchFileSnapshot(
      "./golden/sidecar.env",
    );
  });
});

describe("the node", () => {
  test("of istioctl's golden group is what Istio's agent sends (Appendix C)", async () => {
    const names = ["mesh.yaml", "cluster.env", "root-cert.pem", "hosts"];
    const files = new MemoryFiles(
      Object.fromEntries(
        names.map((name) => [
          `/b/${name}`,
          readFileSync(new URL(`./golden/foo/${name}`, import.meta.url), "utf8"),
        ]),
      ),
    );
    const { clusterEnv, proxyConfig } = await readBundle(files, "/b");
    const sidecarEnv = new Map([["ISTIO_META_AUTO_REGISTER_GROUP", "foo"]]);
    const alone = { ...machine, addresses: [] };
    const node = nodeOf(workloadOf({ clusterEnv, sidecarEnv, proxyConfig, machine: alone }));
    const labels = {
      "service.istio.io/canonical-name": "foo",
      "service.istio.io/canonical-revision": "latest",
    };
    expect(node).toEqual({
      id: "sidecar~10.10.10.10~vm-1.bar~bar.svc.cluster.local",
      cluster: "foo.bar",
      metadata: {
        INSTANCE_IPS: "10.10.10.10",
        NAME: "vm-1",
        NAMESPACE: "bar",
        SERVICE_ACCOUNT: "vm-serviceaccount",
        WORKLOAD_NAME: "foo",
        CLUSTER_ID: "Kubernetes",
        DNS_CAPTURE: "true",
        AUTO_REGISTER_GROUP: "foo",
        ISTIO_VERSION: "1.31.0",
        ENVOY_STATUS_PORT: 15021,
        ENVOY_PROMETHEUS_PORT: 15090,
        LABELS: labels,
        STATIC_LABELS: labels,
        ...labels,
        PILOT_SAN: ["istiod-rev-1.istio-system.svc"],
        METADATA_DISCOVERY: "false",
        ENVOY_SKIP_DEPRECATED_LOGS: "true",
        WORKLOAD_IDENTITY_SOCKET_FILE: "socket",
        PROXY_CONFIG: {
          controlPlaneAuthPolicy: "MUTUAL_TLS",
          discoveryAddress: "istiod-rev-1.istio-system.svc:15012",
          drainDuration: "45s",
          proxyMetadata: proxyConfig["proxyMetadata"],
          readinessProbe: { httpGet: { port: 8080 } },
          serviceCluster: "foo.bar",
          statNameLength: 189,
          statusPort: 15020,
          terminationDrainDuration: "5s",
        },
      },
    });
  });

  test.for([
    {
      name: "POD_PORTS stays a text",
      env: { ISTIO_META_POD_PORTS: '[{"name":"http","containerPort":80}]' },
      want: { POD_PORTS: '[{"name":"http","containerPort":80}]' },
    },
    {
      name: "labels stand at the top too",
      env: { ISTIO_METAJSON_LABELS: '{"app":"details"}' },
      want: { app: "details", LABELS: { app: "details" } },
    },
    {
      name: "a label does not hide a key of ours",
      env: { ISTIO_METAJSON_LABELS: '{"NAMESPACE":"evil"}' },
      want: { NAMESPACE: "bar" },
    },
    {
      name: "any other key of the mesh is passed on",
      env: { ISTIO_META_INTERCEPTION_MODE: "REDIRECT" },
      want: { INTERCEPTION_MODE: "REDIRECT" },
    },
    {
      name: "other JSON lands at the top",
      env: { ISTIO_METAJSON_X: '{"a":{"b":1}}' },
      want: { a: { b: 1 } },
    },
    {
      name: "the mesh may name a version",
      env: { ISTIO_META_ISTIO_VERSION: "1.29.2" },
      want: { ISTIO_VERSION: "1.29.2" },
    },
    { name: "all addresses", env: {}, want: { INSTANCE_IPS: "10.0.0.7,2001:db8::7,172.17.0.1" } },
  ])("metadata: $name", ({ env, want }) => {
    expect(nodeMetadata(workload(env as Record<string, string>))).toMatchObject(want);
  });

  test.for([
    {
      labels: { "topology.istio.io/locality": "eu/eu-1/a" },
      want: { region: "eu", zone: "eu-1", subZone: "a" },
    },
    { labels: { "istio-locality": "eu.eu-1" }, want: { region: "eu", zone: "eu-1" } },
    { labels: {}, want: undefined },
  ])("locality of $labels", ({ labels, want }) => {
    expect(nodeOf(workload({ ISTIO_METAJSON_LABELS: JSON.stringify(labels) })).locality).toEqual(want);
  });

  test.for([
    { env: { ISTIO_SERVICE: "foo.bar" }, want: "foo.bar" },
    { env: { ISTIO_METAJSON_LABELS: '{"app":"details"}' }, want: "details.bar" },
    { env: { ISTIO_META_WORKLOAD_NAME: "w" }, want: "w.bar" },
  ])("cluster $want", ({ env, want }) => {
    expect(workload(env as Record<string, string>).serviceCluster).toBe(want);
  });
});
