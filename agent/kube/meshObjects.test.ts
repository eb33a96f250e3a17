import { describe, expect, test } from "vitest";
import { FakeKube, type FakeKubeOptions } from "../../test/fakes/kube-api.ts";
import { VmmeshError } from "../core/errors.ts";
import { KubeClient, type KubeObject } from "./client.ts";
import type { KubeAccess } from "./kubeconfig.ts";
import {
  dnsLabel,
  ensureMeshObjects,
  type MeshOutcome,
  type MeshRequest,
  planMeshObjects,
} from "./meshObjects.ts";
import { parsePorts } from "./ports.ts";

const NAMESPACE: KubeObject = { apiVersion: "v1", kind: "Namespace", metadata: { name: "default" } };

function group(spec: KubeObject["spec"]): KubeObject {
  return {
    apiVersion: "networking.istio.io/v1",
    kind: "WorkloadGroup",
    metadata: { name: "details", namespace: "default" },
    ...(spec === undefined ? {} : { spec }),
  };
}

function service(spec: KubeObject["spec"]): KubeObject {
  return {
    apiVersion: "v1",
    kind: "Service",
    metadata: { name: "details", namespace: "default" },
    ...(spec === undefined ? {} : { spec }),
  };
}

function request(more: Partial<MeshRequest> & { port?: string[] } = {}): MeshRequest {
  const { port = [], ...rest } = more;
  return { namespace: "default", hostname: "vm-1.example.org", ports: parsePorts(port), labels: {}, ...rest };
}

const DETAILS = { workloadGroup: "details", service: "details", port: ["http:9080"] };
const FITTING = group({
  metadata: { labels: { app: "details" } },
  template: { serviceAccount: "details", ports: { "http-9080": 9080 } },
});
const FITTING_SERVICE = service({ selector: { app: "details" }, ports: [{ name: "http", port: 9080 }] });

interface Run {
  readonly outcome?: MeshOutcome;
  readonly error?: VmmeshError;
  readonly fake: FakeKube;
}

async function ensure(options: FakeKubeOptions, wish: MeshRequest, rehearse = false): Promise<Run> {
  await using fake = await FakeKube.start(options);
  await using client = new KubeClient(accessTo(fake));
  try {
    return { outcome: await ensureMeshObjects(client, wish, { rehearse }), fake };
  } catch (thrown) {
    if (thrown instanceof VmmeshError) return { error: thrown, fake };
    throw thrown;
  }
}

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

const deedsOf = ({ outcome }: Run): string[] =>
  (outcome?.deeds ?? []).map(({ did, what }) => `${did} ${what}`);

describe("names made from a host name", () => {
  test.for([
    ["vm-1.example.org", "vm-1"],
    ["VM_1", "vm-1"],
    ["-x-", "x"],
    ["___", "vm"],
    ["", "vm"],
    [`${"a".repeat(80)}`, "a".repeat(63)],
    [`${"a".repeat(62)}-b`, "a".repeat(62)],
  ] as const)("%s → %s", ([host, want]) => {
    expect(dnsLabel(host)).toBe(want);
  });
});

describe("a plan", () => {
  test("of a bare join: everything is named after the machine, and each choice says why", () => {
    const plan = planMeshObjects(request(), { group: undefined });
    expect(plan.objects.map(({ kind, metadata }) => `${kind} ${metadata.name}`)).toEqual([
      "ServiceAccount vm-1",
      "WorkloadGroup vm-1",
    ]);
    expect(plan.choices).toEqual([
      { name: "namespace", value: "default", why: "as given" },
      { name: "workload group", value: "vm-1", why: "this machine's host name" },
      { name: "service account", value: "vm-1", why: "the group's name" },
      { name: "app", value: "vm-1", why: "the group's name, or --labels app=" },
      { name: "ports", value: "all inbound", why: "no --port was given" },
      { name: "service", value: "none", why: "neither --service nor --port was given" },
    ]);
  });

  test("with everything given: ports carry their protocol by name and by appProtocol", () => {
    const wish = request({
      workloadGroup: "details-vm",
      serviceAccount: "bookinfo-details",
      service: "details",
      port: ["http:9080", "grpc:7070"],
      labels: { app: "details", version: "v1" },
      network: "net-2",
      probe: { httpGet: { port: 9080 } },
    });
    expect(planMeshObjects(wish, { group: undefined }).objects).toEqual([
      {
        apiVersion: "v1",
        kind: "ServiceAccount",
        metadata: { name: "bookinfo-details", namespace: "default" },
      },
      {
        apiVersion: "networking.istio.io/v1",
        kind: "WorkloadGroup",
        metadata: { name: "details-vm", namespace: "default" },
        spec: {
          metadata: { labels: { app: "details", version: "v1" } },
          template: {
            serviceAccount: "bookinfo-details",
            ports: { "http-9080": 9080, "grpc-7070": 7070 },
            network: "net-2",
          },
          probe: { httpGet: { port: 9080 } },
        },
      },
      {
        apiVersion: "v1",
        kind: "Service",
        metadata: { name: "details", namespace: "default", labels: { app: "details" } },
        spec: {
          selector: { app: "details" },
          ports: [
            { name: "http-9080", port: 9080, targetPort: 9080, protocol: "TCP", appProtocol: "http" },
            { name: "grpc-7070", port: 7070, targetPort: 7070, protocol: "TCP", appProtocol: "grpc" },
          ],
        },
      },
    ]);
  });

  test("ports without a Service name make one of the app's name", () => {
    const plan = planMeshObjects(request({ port: ["tcp:3306"] }), { group: undefined });
    expect(plan.choices.at(-1)).toEqual({
      name: "service",
      value: "vm-1",
      why: "the app's name, because ports were given",
    });
  });

  test("an existing group gives account, app and ports", () => {
    const plan = planMeshObjects(request({ workloadGroup: "details", service: "details" }), {
      group: FITTING,
    });
    expect(plan.choices.slice(2, 5)).toEqual([
      { name: "service account", value: "details", why: "that of the workload group" },
      { name: "app", value: "details", why: "label of the workload group" },
      { name: "ports", value: "http:9080", why: "those of the workload group" },
    ]);
    expect(plan.objects.at(-1)?.spec?.["ports"]).toMatchObject([{ name: "http-9080", appProtocol: "http" }]);
  });

  test.for([
    { name: "a Service without any port", wish: { service: "details" }, want: "has no ports" },
    {
      name: "a group that cannot be a name",
      wish: { workloadGroup: "De_tails" },
      want: "--workload-group De_tails",
    },
    { name: "an account that cannot be a name", wish: { serviceAccount: "-" }, want: "--service-account -" },
    { name: "a namespace that cannot be a name", wish: { namespace: "../x" }, want: "--namespace ../x" },
  ])("refuses $name", ({ wish, want }) => {
    expect(() => planMeshObjects(request(wish), { group: undefined })).toThrow(want);
  });
});

describe("what is made and what is kept", () => {
  test.for([
    {
      name: "an empty namespace: all three are made",
      objects: [],
      want: [
        "made ServiceAccount default/details",
        "made WorkloadGroup default/details",
        "made Service default/details",
      ],
    },
    {
      name: "the group's account is missing: it alone is made",
      objects: [FITTING, FITTING_SERVICE],
      want: [
        "made ServiceAccount default/details",
        "kept WorkloadGroup default/details",
        "kept Service default/details",
      ],
    },
    {
      name: "a group that names no ports stands for any",
      objects: [group({ template: { serviceAccount: "details" } })],
      want: [
        "made ServiceAccount default/details",
        "kept WorkloadGroup default/details",
        "made Service default/details",
      ],
    },
  ])("$name", async ({ objects, want }) => {
    const run = await ensure({ objects: [NAMESPACE, ...objects] }, request(DETAILS));
    expect(run.error).toBeUndefined();
    expect(deedsOf(run)).toEqual(want);
  });

  test("a second join makes nothing and says so", async () => {
    await using fake = await FakeKube.start({ objects: [NAMESPACE] });
    await using client = new KubeClient(accessTo(fake));
    await ensureMeshObjects(client, request(DETAILS));
    const before = structuredClone([...fake.objects]);
    const again = await ensureMeshObjects(client, request(DETAILS));
    expect(again.deeds.map(({ did }) => did)).toEqual(["kept", "kept", "kept"]);
    expect([...fake.objects]).toEqual(before);
  });

  test("a rehearsal writes nothing", async () => {
    const run = await ensure({ objects: [NAMESPACE] }, request(DETAILS), true);
    expect(deedsOf(run)).toEqual([
      "missing ServiceAccount default/details",
      "missing WorkloadGroup default/details",
      "missing Service default/details",
    ]);
    expect(run.fake.asked.filter((line) => !line.startsWith("get "))).toEqual([]);
  });

  test("a machine with a label of its own uses the group as it is", async () => {
    const run = await ensure(
      { objects: [NAMESPACE, FITTING] },
      request({ workloadGroup: "details", labels: { version: "v2" } }),
    );
    expect(run.outcome?.group).toEqual(FITTING);
  });
});

describe("what exists and does not fit is an error, and nothing is written:", () => {
  const accountless = group({ metadata: { labels: { app: "details" } }, template: {} });
  test.for([
    {
      name: "a group without an account: peers would send plain text",
      objects: [accountless],
      wish: DETAILS,
      want: "has no service account",
      next: `patch workloadgroup details --type merge -p '{"spec":{"template":{"serviceAccount":"details"}}}'`,
    },
    {
      name: "a group of another account",
      objects: [FITTING],
      wish: { ...DETAILS, serviceAccount: "other" },
      want: "has the service account `details`, not `other`",
      next: "--service-account",
    },
    {
      name: "a group without the port",
      objects: [FITTING],
      wish: { ...DETAILS, port: ["http:9080", "tcp:1"] },
      want: "does not have port 1",
      next: '"tcp-1":1',
    },
    {
      name: "a group with the port under another protocol",
      objects: [FITTING],
      wish: { ...DETAILS, port: ["tcp:9080"] },
      want: "has port 9080 as `http-9080`, which is not tcp",
      next: "patch workloadgroup",
    },
    {
      name: "a Service for somebody else",
      objects: [FITTING, service({ selector: { app: "other" }, ports: [] })],
      wish: DETAILS,
      want: "selects app=other, which is not this machine",
      next: "--service",
    },
    {
      name: "a Service without a selector",
      objects: [FITTING, service({ ports: [] })],
      wish: DETAILS,
      want: "selects nothing",
      next: "--service",
    },
    {
      name: "a Service that is a name elsewhere",
      objects: [FITTING, service({ type: "ExternalName" })],
      wish: DETAILS,
      want: "is of type ExternalName",
      next: "--service",
    },
    {
      name: "a Service without the port",
      objects: [FITTING, service({ selector: { app: "details" }, ports: [{ name: "http", port: 80 }] })],
      wish: DETAILS,
      want: "does not have port 9080",
      next: "patch service details --type strategic",
    },
    {
      name: "a Service whose port has no protocol",
      objects: [FITTING, service({ selector: { app: "details" }, ports: [{ name: "web", port: 9080 }] })],
      wish: DETAILS,
      want: "not as http, port 9080",
      next: "appProtocol",
    },
  ])("$name", async ({ objects, wish, want, next }) => {
    const { error, fake } = await ensure({ objects: [NAMESPACE, ...objects] }, request(wish));
    expect(error?.code).toBe("KUBE_CONFLICT");
    expect(error?.message).toContain(want);
    expect(error?.next).toContain(next);
    expect(fake.asked.filter((line) => !line.startsWith("get "))).toEqual([]);
  });
});

describe("a user with few rights", () => {
  test("who may not read the namespace goes on without", async () => {
    const run = await ensure(
      { objects: [NAMESPACE], may: ({ resource }) => resource !== "namespaces" },
      request(),
    );
    expect(run.error).toBeUndefined();
  });

  test.for([
    {
      name: "reads only",
      may: "get",
      want: "user `admin` may not create serviceaccounts in namespace default",
    },
    {
      name: "does nothing",
      may: "",
      want: "user `admin` may not get workloadgroups.networking.istio.io in namespace default",
    },
  ])("who $name is told which verb on which resource", async ({ may, want }) => {
    const { error } = await ensure({ objects: [NAMESPACE], may: ({ verb }) => verb === may }, request());
    expect([error?.code, error?.message]).toEqual(["KUBE_FORBIDDEN", want]);
    expect(error?.next).toMatch(/kubectl -n default create role \S+ --verb=\w+ --resource=\S+/);
  });

  test("a namespace that does not exist is not made", async () => {
    const { error, fake } = await ensure({ objects: [] }, request({ namespace: "nope" }));
    expect([error?.code, error?.message]).toEqual([
      "KUBE_NOT_FOUND",
      "there is no Namespace nope in the cluster",
    ]);
    expect(error?.next).toContain("kubectl create namespace nope");
    expect(fake.asked).toEqual(["get namespaces"]);
  });

  test("nor when it cannot be read: the first object tells", async () => {
    const { error } = await ensure(
      { objects: [], may: ({ resource }) => resource !== "namespaces" },
      request({ namespace: "nope" }),
    );
    expect(error?.message).toBe("there is no Namespace nope in the cluster");
  });

  test("a cluster without Istio", async () => {
    const { error } = await ensure({ objects: [NAMESPACE], groups: [] }, request());
    expect(error?.message).toBe("this cluster has no workloadgroups.networking.istio.io/v1");
    expect(error?.next).toContain("istioctl install");
  });
});
