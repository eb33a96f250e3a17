import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { FakeKube, type FakeKubeOptions } from "../../test/fakes/kube-api.ts";
import { VmmeshError } from "../core/errors.ts";
import { readBundle, renderBundle, writeBundle } from "../mesh/bundle.ts";
import { type BundleRequest, type MadeBundle, makeBundle, readMesh } from "./bundle.ts";
import { KubeClient, type KubeObject } from "./client.ts";
import type { KubeAccess } from "./kubeconfig.ts";

const golden = (name: string): string =>
  readFileSync(new URL(`../mesh/golden/foo/${name}`, import.meta.url), "utf8");

/** The input of istioctl's own golden test (chapter 1.4). */
const MESH = `
defaultConfig:
  proxyMetadata:
    CLUSTER_MESH_CONFIG_VALUE: foo
    ISTIO_META_DNS_CAPTURE: "false"
    PROXY_CONFIG_ANNOT_VALUE: bad
trustDomain: ""
`;
const GROUP: KubeObject = {
  apiVersion: "networking.istio.io/v1",
  kind: "WorkloadGroup",
  metadata: {
    name: "foo",
    namespace: "bar",
    annotations: { "proxy.istio.io/config": "proxyMetadata:\n  PROXY_CONFIG_ANNOT_VALUE: bar\n" },
  },
  spec: { template: { serviceAccount: "vm-serviceaccount" }, probe: { httpGet: { port: 8080 } } },
};

function configMap(namespace: string, name: string, data: Record<string, string>): KubeObject {
  return { apiVersion: "v1", kind: "ConfigMap", metadata: { name, namespace }, data };
}

function gateway(more: Partial<KubeObject>): KubeObject {
  return {
    apiVersion: "v1",
    kind: "Service",
    metadata: { name: "istio-eastwestgateway", namespace: "istio-system" },
    ...more,
  };
}

function cluster(...more: KubeObject[]): KubeObject[] {
  const objects = [
    ...["bar", "istio-system"].map(
      (name): KubeObject => ({ apiVersion: "v1", kind: "Namespace", metadata: { name } }),
    ),
    {
      apiVersion: "v1",
      kind: "ServiceAccount",
      metadata: { name: "vm-serviceaccount", namespace: "bar" },
    } as const,
    configMap("istio-system", "istio", { mesh: MESH }),
    configMap("istio-system", "istio-rev-1", { mesh: MESH }),
    configMap("istio-system", "istio-sidecar-injector-rev-1", {
      values: '{"global":{"multiCluster":{"clusterName":"Kubernetes"}}}',
    }),
    configMap("bar", "istio-ca-root-cert", { "root-cert.pem": golden("root-cert.pem") }),
    gateway({ status: { loadBalancer: { ingress: [{ ip: "10.10.10.11" }] } } }),
    ...more,
  ];
  // A later object stands for the earlier of the same name; one without spec, status and data takes it away.
  return [
    ...new Map(objects.map((it) => [`${it.kind} ${it.metadata.namespace} ${it.metadata.name}`, it])).values(),
  ];
}

const without = (objects: readonly KubeObject[], name: string): KubeObject[] =>
  objects.filter(({ metadata }) => metadata.name !== name);

function accessTo(fake: FakeKube): KubeAccess {
  return {
    source: "a test",
    server: fake.url,
    user: "tester",
    namespace: undefined,
    ca: undefined,
    certificate: undefined,
    token: undefined,
    serverName: undefined,
    proxyUrl: undefined,
    verify: true,
    impersonate: undefined,
    warnings: [],
  };
}

async function make(
  request: Partial<BundleRequest> = {},
  options: FakeKubeOptions = { objects: cluster() },
): Promise<{ bundle: MadeBundle; fake: FakeKube }> {
  await using fake = await FakeKube.start(options);
  await using client = new KubeClient(accessTo(fake));
  return { bundle: await makeBundle(client, { group: GROUP, tokenSeconds: 3600, ...request }), fake };
}

async function failure(work: Promise<unknown>): Promise<VmmeshError> {
  const thrown = await work.then(
    () => undefined,
    (error: unknown) => error,
  );
  if (thrown instanceof VmmeshError) return thrown;
  throw new Error(`no VmmeshError but ${String(thrown)}`);
}

const choice = ({ choices }: MadeBundle, name: string): string => {
  const found = choices.find((it) => it.name === name);
  return found === undefined ? "" : `${found.value}: ${found.why}`;
};

describe("a bundle", () => {
  test("for istioctl's golden group is istioctl's, byte for byte", async () => {
    const { bundle } = await make({ revision: "rev-1", internalIp: "10.10.10.10", autoRegister: false });
    const rendered = renderBundle(bundle);
    for (const name of ["cluster.env", "mesh.yaml", "hosts", "root-cert.pem"]) {
      expect(rendered.get(name)?.text).toBe(golden(name));
    }
    expect([...rendered.keys()].sort()).toEqual([
      "cluster.env",
      "hosts",
      "istio-token",
      "mesh.yaml",
      "root-cert.pem",
    ]);
  });

  test("asks for a token of the group's account, for istiod alone, as short as told", async () => {
    const { bundle, fake } = await make({
      tokenSeconds: 600,
      bindTokenTo: "join-vm-1",
    });
    expect(fake.objects.get("secrets/bar/join-vm-1")).not.toHaveProperty("data");
    expect(fake.seen.find(({ resource }) => resource === "serviceaccounts/token")).toMatchObject({
      namespace: "bar",
      name: "vm-serviceaccount",
      body: {
        spec: {
          audiences: ["istio-ca"],
          expirationSeconds: 600,
          boundObjectRef: { apiVersion: "v1", kind: "Secret", name: "join-vm-1", uid: "uid-of-join-vm-1" },
        },
      },
    });
    expect(bundle.tokenExpires.toISOString()).toBe("2026-11-23T00:10:00.000Z");
    expect(bundle.token?.split(".")).toHaveLength(3);
  });

  test("is not made on a Secret of somebody else's, which would outlive it or take it along", async () => {
    const theirs = {
      apiVersion: "v1",
      kind: "Secret" as const,
      metadata: { name: "join-vm-1", namespace: "bar" },
    };
    const made = make({ bindTokenTo: "join-vm-1" }, { objects: [...cluster(), theirs] });
    expect((await failure(made)).code).toBe("KUBE_CONFLICT");
  });

  test("in a rehearsal reads everything and writes nothing", async () => {
    await using fake = await FakeKube.start({ objects: cluster() });
    await using client = new KubeClient(accessTo(fake));
    expect(await readMesh(client, { group: GROUP })).not.toHaveProperty("token");
    expect(fake.asked.filter((line) => !/^(get|list) /.test(line))).toEqual([]);
  });

  test("never tells its token in what is printed", async () => {
    const { bundle } = await make();
    expect(JSON.stringify(bundle.choices)).not.toContain(bundle.token);
  });

  test("registers by itself, and carries ports, labels and network of this machine", async () => {
    const spec = {
      metadata: { labels: { app: "details", version: "v1" } },
      template: {
        serviceAccount: "vm-serviceaccount",
        network: "net-1",
        ports: { "tcp-3306": 3306, "http-9080": 9080 },
      },
    };
    const { bundle } = await make({
      group: { ...GROUP, metadata: { name: "foo", namespace: "bar" }, spec },
      labels: { version: "v2" },
      network: "net-2",
    });
    expect(Object.fromEntries(bundle.clusterEnv)).toMatchObject({
      ISTIO_META_AUTO_REGISTER_GROUP: "foo",
      ISTIO_META_POD_PORTS:
        '[{"name":"http-9080","containerPort":9080,"protocol":""},{"name":"tcp-3306","containerPort":3306,"protocol":""}]',
      ISTIO_INBOUND_PORTS: "9080,3306",
      ISTIO_META_NETWORK: "net-2",
      CANONICAL_SERVICE: "details",
      CANONICAL_REVISION: "v2",
      ISTIO_METAJSON_LABELS:
        '{"app":"details","service.istio.io/canonical-name":"details","service.istio.io/canonical-revision":"v2","version":"v2"}',
    });
    expect(bundle.clusterEnv.has("CA_ADDR")).toBe(false);
    expect(bundle.proxyConfig["discoveryAddress"]).toBeUndefined();
    expect(bundle.proxyConfig["readinessProbe"]).toBeUndefined();
  });

  test("an external address is registered, and probes stay on the machine", async () => {
    const { bundle } = await make({ externalIp: "192.0.2.1" });
    expect(Object.fromEntries(bundle.clusterEnv)).toMatchObject({
      ISTIO_SVC_IP: "192.0.2.1",
      REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION: "true",
    });
  });

  test("keys by which an annotation could run something as root are left out and named", async () => {
    const text = "proxyMetadata:\n  NODE_OPTIONS: --require /x\n  ISTIO_BIN_BASE: /tmp\n  ISTIO_META_X: y\n";
    const group = {
      ...GROUP,
      metadata: { ...GROUP.metadata, annotations: { "proxy.istio.io/config": text } },
    };
    const { bundle } = await make({ group });
    expect(bundle.refusedKeys).toEqual(["NODE_OPTIONS", "ISTIO_BIN_BASE"]);
    expect(bundle.clusterEnv.get("ISTIO_META_X")).toBe("y");
    expect(renderBundle(bundle).get("cluster.env")?.text).not.toContain("/tmp");
  });

  test("is read back from disk as it was made", async () => {
    const { bundle } = await make({ istiodAddress: "lb.example.org" });
    const { choices: _, tokenExpires: __, ...files } = bundle;
    const disk = new MemoryFiles({ "/x/y": "" });
    await writeBundle(disk, "/x/b", bundle);
    expect(await readBundle(disk, "/x/b")).toEqual({
      ...files,
      clusterEnv: new Map([...files.clusterEnv].sort()),
    });
  });

  test.for([
    { statusPort: 0, want: "22,15090,15021,15020" },
    { statusPort: 15021, want: "22,15090,15021" },
    { statusPort: 16000, want: "22,15090,15021,16000" },
  ])("status port $statusPort is left alone: $want", async ({ statusPort, want }) => {
    const { bundle } = await make(
      {},
      {
        objects: cluster(
          configMap("istio-system", "istio", { mesh: `defaultConfig: {statusPort: ${statusPort}}` }),
        ),
      },
    );
    expect(bundle.clusterEnv.get("ISTIO_LOCAL_EXCLUDE_PORTS")).toBe(want);
  });
});

describe("where istiod is reached", () => {
  test.for([
    { name: "the gateway's address", objects: [], want: ["10.10.10.11"] },
    {
      name: "several addresses",
      objects: [gateway({ status: { loadBalancer: { ingress: [{ ip: "10.0.0.1" }, { ip: "10.0.0.2" }] } } })],
      want: ["10.0.0.1", "10.0.0.2"],
    },
    {
      name: "external IPs of the Service",
      objects: [gateway({ spec: { externalIPs: ["10.0.0.3"] } })],
      want: ["10.0.0.3"],
    },
    {
      name: "a host name alone is kept",
      objects: [gateway({ status: { loadBalancer: { ingress: [{ hostname: "lb.example.org" }] } } })],
      want: ["lb.example.org"],
    },
  ])("$name", async ({ objects, want }) => {
    const { bundle } = await make({}, { objects: cluster(...objects) });
    expect([...bundle.hosts]).toEqual([["istiod.istio-system.svc", want]]);
    expect(choice(bundle, "istiod address")).toBe(
      `${want.join(", ")}: Service istio-system/istio-eastwestgateway`,
    );
  });

  test("what was given is not looked up", async () => {
    const { bundle, fake } = await make({ istiodAddress: "10.0.0.9" });
    expect([...bundle.hosts.values()]).toEqual([["10.0.0.9"]]);
    expect(fake.asked).not.toContain("get services");
  });

  test.for([
    {
      name: "no gateway",
      objects: without(cluster(), "istio-eastwestgateway"),
      want: "there is no Service istio-system/istio-eastwestgateway",
    },
    { name: "a gateway still without an address", objects: cluster(gateway({})), want: "has no address yet" },
  ])("$name: the next step is --istiod-address", async ({ objects, want }) => {
    const error = await failure(make({}, { objects }));
    expect(error.code).toBe("KUBE_NOT_FOUND");
    expect(error.message).toContain(want);
    expect(error.next).toContain("--istiod-address");
  });

  test("a port is not part of the address", async () => {
    expect((await failure(make({ istiodAddress: "10.0.0.1:15012" }))).code).toBe("USAGE");
  });
});

describe("what is good to know but not needed", () => {
  test.for([
    {
      name: "no injector",
      may: undefined,
      want: "Kubernetes: there is no ConfigMap istio-system/istio-sidecar-injector, so the default (--cluster-id says another)",
    },
    {
      name: "no right to read it",
      may: "istio-sidecar-injector",
      want: "Kubernetes: ConfigMap istio-system/istio-sidecar-injector may not be read, so the default (--cluster-id says another)",
    },
  ])("cluster id with $name", async ({ may, want }) => {
    const { bundle } = await make(
      {},
      { objects: cluster(), may: ({ name }) => name !== may || may === undefined },
    );
    expect(choice(bundle, "cluster id")).toBe(want);
  });

  test("cluster id of the injector, and as given", async () => {
    const values = configMap("istio-system", "istio-sidecar-injector", {
      values: '{"global":{"multiCluster":{"clusterName":"west"}}}',
    });
    const { bundle } = await make({}, { objects: cluster(values) });
    expect(bundle.clusterEnv.get("ISTIO_META_CLUSTER_ID")).toBe("west");
    expect((await make({ clusterId: "east" })).bundle.clusterEnv.get("ISTIO_META_CLUSTER_ID")).toBe("east");
  });

  const ranges: KubeObject = {
    apiVersion: "networking.k8s.io/v1",
    kind: "ServiceCIDR",
    metadata: { name: "kubernetes" },
    spec: { cidrs: ["10.96.0.0/16", "fd00::/108"] },
  };
  test.for([
    {
      name: "of the cluster",
      options: { objects: cluster(ranges) },
      list: ["10.96.0.0/16", "fd00::/108"],
      want: "ServiceCIDR objects",
    },
    {
      name: "of an older cluster",
      options: { objects: cluster(), groups: ["networking.istio.io"] },
      list: [],
      want: "this cluster has no ServiceCIDR objects",
    },
    {
      name: "that may not be read",
      options: {
        objects: cluster(ranges),
        may: ({ resource }: { resource: string }) => !resource.startsWith("servicecidrs"),
      },
      list: [],
      want: "may not be read",
    },
  ])("service ranges $name", async ({ options, list, want }) => {
    const { bundle } = await make({}, options);
    expect(bundle.meshCidrs).toEqual(list);
    expect(choice(bundle, "service ranges")).toContain(want);
  });
});

describe("what is missing or refused is named:", () => {
  test.for([
    {
      name: "the mesh config of a revision",
      request: { revision: "none" },
      objects: cluster(),
      code: "KUBE_NOT_FOUND",
      want: "there is no ConfigMap istio-system/istio-none",
    },
    {
      name: "the root",
      request: {},
      objects: without(cluster(), "istio-ca-root-cert"),
      code: "KUBE_NOT_FOUND",
      want: "there is no ConfigMap bar/istio-ca-root-cert",
    },
    {
      name: "the service account",
      request: {},
      objects: without(cluster(), "vm-serviceaccount"),
      code: "KUBE_NOT_FOUND",
      want: "there is no ServiceAccount bar/vm-serviceaccount",
    },
    {
      name: "a broken mesh config",
      request: {},
      objects: cluster(configMap("istio-system", "istio", { mesh: "a: [" })),
      code: "CONFIG_MALFORMED",
      want: "ConfigMap istio-system/istio, key mesh, line 1",
    },
    {
      name: "a token too short",
      request: { tokenSeconds: 60 },
      objects: cluster(),
      code: "USAGE",
      want: "--token-duration 60",
    },
  ])("$name", async ({ request, objects, code, want }) => {
    const error = await failure(make(request, { objects }));
    expect(error.code).toBe(code);
    expect(error.message).toContain(want);
    expect(error.next).toMatch(/\.$/);
  });

  test("the right to make a token", async () => {
    const error = await failure(
      make({}, { objects: cluster(), may: ({ resource }) => resource !== "serviceaccounts/token" }),
    );
    expect(error.message).toBe("user `admin` may not create serviceaccounts/token in namespace bar");
    expect(error.next).toContain("--resource=serviceaccounts/token");
  });
});
