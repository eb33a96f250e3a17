import { spawn } from "node:child_process";
import { X509Certificate } from "node:crypto";
import { once } from "node:events";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Readable } from "node:stream";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { parse } from "yaml";
import { CONTRACT, enroll, type Target } from "../controlplane/contract.ts";
import type { MeshService } from "../controlplane/resources.ts";
import { type ControlPlane, startControlPlane } from "../controlplane/server.ts";
import { ENVOY_VERSIONS, fetchEnvoy } from "./fetch.ts";
import { TestMachine } from "./machine.ts";

const DETAILS: MeshService = {
  name: "details",
  namespace: "default",
  vip: "10.96.0.10",
  ports: [{ name: "http", port: 80, targetPort: 9080, protocol: "http" }],
  selector: { app: "details" },
};
const GROUP = {
  name: "details",
  namespace: "default",
  serviceAccount: "details",
  labels: { app: "details" },
};

const FRONT = { name: "front", namespace: "default", serviceAccount: "front", labels: { app: "front" } };

/** A group and a service account of that name, in the eyes of a workload that wants to join. */
function targetOf(plane: ControlPlane, name: string): Target {
  return {
    address: "127.0.0.1",
    port: plane.port,
    serverName: plane.serverName,
    rootCert: plane.rootCert,
    clusterId: "Kubernetes",
    trustDomain: "cluster.local",
    token: plane.mintToken({ namespace: "default", serviceAccount: name }),
    namespace: "default",
    serviceAccount: name,
    group: name,
    service: {
      host: "details.default.svc.cluster.local",
      cluster: "outbound|80||details.default.svc.cluster.local",
      inboundCluster: "inbound|9080||",
    },
  };
}

describe("the embedded control plane keeps the contract that istiod keeps", () => {
  let plane: ControlPlane;
  let target: Target;
  beforeAll(async () => {
    plane = await startControlPlane({ address: "127.0.0.1", port: 0, services: [DETAILS], groups: [GROUP] });
    target = targetOf(plane, "details");
  });
  afterAll(() => plane.stop());

  test.for(CONTRACT)("$name", ({ check }) => check(target));

  test("after a rotation the new root signs, and a certificate of the older one still proves who it is", async () => {
    const old = await enroll(target, { token: target.token });
    await plane.rotateRoot();
    const next = await enroll(target, { client: old });
    const roots = next.chain.at(-1) ?? "";
    expect(roots.match(/BEGIN CERTIFICATE/g)).toHaveLength(2);
    expect(roots.endsWith(target.rootCert)).toBe(true);
    expect(new X509Certificate(next.chain[0] ?? "").verify(new X509Certificate(roots).publicKey)).toBe(true);
  });
});

test("the command serves, and writes bundles whose papers get a certificate", async () => {
  const out = await mkdtemp(join(tmpdir(), "vmmesh-bundles-"));
  const script = new URL("../controlplane/main.ts", import.meta.url).pathname;
  const argv = [script, "--listen", "127.0.0.1:0", "--out", out, "--group", "details:9080:10.96.0.10"];
  const child = spawn(process.execPath, argv, { stdio: ["ignore", "pipe", "inherit"] });
  try {
    const [line] = (await once(child.stdout, "data")) as [Buffer];
    const { listening, bundles } = JSON.parse(line.toString()) as { listening: string; bundles: string[] };
    const read = (name: string): Promise<string> => readFile(join(out, "details", name), "utf8");
    expect(bundles).toEqual([join(out, "details")]);
    expect(await read("hosts")).toBe("127.0.0.1 istiod.istio-system.svc\n");
    expect(parse(await read("mesh.yaml"))).toMatchObject({
      defaultConfig: { discoveryAddress: `istiod.istio-system.svc:${listening.split(":")[1]}` },
    });
    expect(await read("cluster.env")).toContain("\nISTIO_META_AUTO_REGISTER_GROUP='details'\n");
    const { chain } = await enroll(
      {
        address: "127.0.0.1",
        port: Number(listening.split(":")[1]),
        serverName: "istiod.istio-system.svc",
        rootCert: await read("root-cert.pem"),
        clusterId: "Kubernetes",
      },
      { token: await read("istio-token") },
    );
    expect(chain).toHaveLength(2);
  } finally {
    child.kill("SIGTERM");
    if (child.exitCode === null) await once(child, "exit");
    await rm(out, { recursive: true });
  }
});

describe.for(ENVOY_VERSIONS)("two machines with Envoy %s", (version) => {
  let plane: ControlPlane;
  let client: TestMachine;
  let server: TestMachine;
  beforeAll(async () => {
    const binary = await fetchEnvoy(version);
    const options = { address: "127.0.0.1", port: 0, services: [DETAILS], groups: [GROUP, FRONT] };
    plane = await startControlPlane({ ...options, accessLogFile: "/dev/stdout" });
    client = await TestMachine.start({
      binary,
      address: "10.77.0.1",
      target: targetOf(plane, "front"),
      stdout: "fifo",
    });
    server = await TestMachine.start({
      binary,
      address: "10.77.0.2",
      target: targetOf(plane, "details"),
      stdout: "fifo",
    });
    await TestMachine.cable(client, server);
    await server.serveHeaders();
    for (const machine of [client, server]) await machine.capture();
  });
  afterAll(async () => {
    await client?.stop();
    await server?.stop();
    await plane?.stop();
  });

  test("both become ready, and nothing that was sent is refused", async () => {
    for (const machine of [client, server]) {
      expect(await machine.untilReadiness((state) => state.ready), await machine.envoyLog()).toEqual({
        ready: true,
      });
      expect((await machine.admin.version()).text).toBe(version);
      expect(await machine.admin.rejectedListeners()).toEqual([]);
    }
    expect(plane.refusals()).toEqual([]);
    expect(
      plane
        .workloads()
        .map((it) => it.name)
        .sort(),
    ).toEqual(["details-10.77.0.2", "front-10.77.0.1"]);
  });

  test("a request to the service's address arrives over mutual TLS with the client's identity", async () => {
    const headers = JSON.parse(await client.node(GET("http://10.96.0.10/"))) as Record<string, string>;
    expect(headers["x-forwarded-client-cert"]).toContain("URI=spiffe://cluster.local/ns/default/sa/front");
    expect(headers["x-forwarded-client-cert"]).toContain("By=spiffe://cluster.local/ns/default/sa/details");
  });

  test("what comes past the client's Envoy, in plain text, is refused", async () => {
    await expect(client.node(GET("http://10.77.0.2:9080/"))).rejects.toThrow(/fetch failed/);
  });

  test("exactly the requests that were made are counted, per service", async () => {
    const before = await requests(client);
    await client.node(`for (let i = 0; i < 7; i++) { ${GET("http://10.96.0.10/")} }`);
    expect((await requests(client)) - before).toBe(7);
  });

  test("the lease's health check reaches the listener that the redirect leads to", async () => {
    const lease = async (): Promise<string> =>
      textOf(await client.admin.prometheus({ query: "filter=vmmesh-lease" }));
    await expect.poll(lease).toMatch(/envoy_cluster_membership_healthy\{cluster_name="vmmesh-lease"\} 1\n/);
  });

  test("the scrape port answers GET of its one path, and nothing else", async () => {
    const ask = (path: string, method = "GET"): Promise<string> =>
      client.node(
        `console.log((await fetch("http://127.0.0.1:15090${path}", { method: "${method}" })).status)`,
      );
    const answers = await Promise.all([
      ask("/stats/prometheus?usedonly"),
      ask("/stats/prometheus", "POST"),
      ask("/quitquitquit", "POST"),
      ask("/config_dump"),
    ]);
    expect(answers.map((it) => it.trim())).toEqual(["200", "404", "404", "404"]);
  });

  test("both come back by themselves when the control plane drops them", async () => {
    plane.dropConnections();
    const back = (): boolean => [client, server].every((it) => it.reconnects() > 0);
    await expect.poll(back, { timeout: 10_000 }).toBe(true);
    await expect.poll(() => plane.workloads().map((it) => it.connected)).toEqual([true, true]);
  });

  test("a new endpoint list reaches Envoy while it runs: an unselected service has none", async () => {
    plane.setServices([{ ...DETAILS, selector: { app: "nobody" } }]);
    await expect
      .poll(() => client.node(`console.log((await fetch("http://10.96.0.10/")).status)`))
      .toBe("503\n");
    plane.setServices([DETAILS]);
    await expect
      .poll(() => client.node(`console.log((await fetch("http://10.96.0.10/")).status)`))
      .toBe("200\n");
  });

  test("the access log comes out of /dev/stdout", async () => {
    await expect.poll(() => server.accessLog()).toMatch(/"GET \/ HTTP\/1\.1" 200/);
  });

  test("draining closes the inbound listener, outbound goes on", async () => {
    // The client's Envoy keeps its connection for the next request.
    expect(await server.admin.activeConnections()).toBeGreaterThan(0);
    await client.admin.drainInbound();
    await expect.poll(() => client.node(GET("http://10.96.0.10/"))).toContain("x-forwarded-client-cert");
  });
});

test("an Envoy whose /dev/stdout is a socket refuses the mesh's access log, and readiness says so", async () => {
  const binary = await fetchEnvoy("1.40.0");
  const options = { address: "127.0.0.1", port: 0, services: [DETAILS], groups: [GROUP], graceMs: 50 };
  const plane = await startControlPlane({ ...options, accessLogFile: "/dev/stdout" });
  const machine = await TestMachine.start({
    binary,
    address: "10.77.0.3",
    target: targetOf(plane, "details"),
    stdout: "socket",
  });
  try {
    const state = await machine.untilReadiness((it) => !it.ready && it.reason.startsWith("rejected"));
    expect(state).toMatchObject({ ready: false, reason: expect.stringContaining("/dev/stdout") });
    expect(plane.refusals()[0]?.message).toContain("/dev/stdout");
  } finally {
    await machine.stop();
  }
  try {
    // The grace period of a machine that went away is over.
    await expect.poll(() => plane.workloads()).toEqual([]);
  } finally {
    await plane.stop();
  }
});

const GET = (url: string): string => `console.log(await (await fetch("${url}")).text());`;

async function textOf(stream: Readable): Promise<string> {
  return Buffer.concat((await stream.toArray()) as Buffer[]).toString("utf8");
}

async function requests(machine: TestMachine): Promise<number> {
  const text = await textOf(await machine.admin.prometheus({ query: "filter=upstream_rq_total" }));
  const match = /^envoy_cluster_upstream_rq_total\{cluster_name="outbound\|80\|\|details[^}]*\} (\d+)$/m.exec(
    text,
  );
  return Number(match?.[1] ?? 0);
}
