import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  proxyStatus,
  request,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { istiodEnvOf } from "../lab/controlplane.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { type LoadReport, load, putLoad } from "../lab/load.ts";
import { packageFile } from "./package.ts";

/**
 * A mesh as people have it: istiod without a single switch, and the metrics provider that its chart turns on. It names
 * extensions of Istio's own Envoy in every cluster and listener; the machines have a stock Envoy.
 */
const ISTIOS = ["istio.alpn", "istio.metadata_exchange", "istio.stats"];
const MACHINES = ["details", "reviews"] as const;
const ECHO_PORT = 9000;
/** Says back what it hears, until the other side has said all. */
const ECHO = `
import socketserver, sys
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
Server(("0.0.0.0", int(sys.argv[1])), Echo).serve_forever()
`;
/** Sends ten bytes, reads ten, and waits until it is told to end. */
const TALK = `
import os, socket, sys, time
talk = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
talk.sendall(b"0123456789")
assert len(talk.recv(10, socket.MSG_WAITALL)) == 10
while not os.path.exists("/tmp/hang-up"):
    time.sleep(0.1)
`;

/** Labels of istio_requests_total: https://istio.io/latest/docs/reference/config/metrics/ */
const REQUEST_LABELS = [
  "reporter",
  ...["source", "destination"].flatMap((side) =>
    [
      ...["workload", "workload_namespace", "principal", "app", "version"],
      ...["canonical_service", "canonical_revision", "cluster"],
    ].map((name) => `${side}_${name}`),
  ),
  ...["destination_service", "destination_service_name", "destination_service_namespace"],
  ...["request_protocol", "response_code", "response_flags", "connection_security_policy"],
];
let lab: Lab;
let details: Machine;
let reviews: Machine;
let prometheus: Awaited<ReturnType<Lab["prometheus"]>>;
let envBefore: Readonly<Record<string, string>>;
let meshBefore: string;

async function setMesh(mesh: string): Promise<void> {
  const patch = JSON.stringify({ data: { mesh } });
  await lab.kubectl(["-n", "istio-system", "patch", "configmap", "istio", "--type=merge", "-p", patch]);
}

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await Promise.all(MACHINES.map((name) => lab.removeVm(name)));
  envBefore = istiodEnvOf(lab.id);
  const { stdout } = await lab.kubectl([
    "-n",
    "istio-system",
    "get",
    "configmap",
    "istio",
    "-o",
    "jsonpath={.data.mesh}",
  ]);
  meshBefore = stdout;
  await setMesh(`${meshBefore.trimEnd()}\ndefaultProviders: {metrics: [prometheus]}\n`);
  await lab.restartIstiod({});
  const deb = packageFile();
  details = await lab.vm("details", { deb });
  reviews = await lab.vm("reviews", { deb });
  for (const name of MACHINES) await defineWorkload(lab, name, 9080);
  await lab.apply(`
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: details, namespace: default}
spec:
  metadata: {labels: {app: details}}
  template: {serviceAccount: details, ports: {http: 9080, tcp: ${ECHO_PORT}}}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: default}
spec: {selector: {app: details}, ports: [{name: tcp, port: ${ECHO_PORT}, targetPort: ${ECHO_PORT}}]}
`);
  await strictMtls(lab);
  details.putFile("/opt/echo.py", ECHO);
  await details.exec(`systemd-run -q --unit=echo --uid=65534 /usr/bin/python3 /opt/echo.py ${ECHO_PORT}`);
  reviews.putFile("/opt/talk.py", TALK);
  await startApp(details, 9080);
  await startApp(reviews, 9080);
  prometheus = await lab.prometheus([details, reviews].map(({ ip }) => `${ip}:15020`));
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(MACHINES.map((name) => lab?.removeVm(name)));
  await prometheus?.stop();
  // The tests after this one use the same lab.
  if (meshBefore === undefined) return;
  await setMesh(meshBefore);
  await lab.restartIstiod(envBefore);
});

/** What Envoy has in use, as it prints it. */
async function configDump(machine: Machine): Promise<string> {
  return (await machine.exec("curl -s --unix-socket /run/vmmesh-envoy/admin.sock http://envoy/config_dump"))
    .stdout;
}

/** Until Prometheus has asked every machine so many times more. */
async function scrapes(count: number): Promise<void> {
  const asked = (): Promise<number | undefined> => prometheus.query("min(istio_agent_scrapes_total)");
  const before = (await asked()) ?? 0;
  await waitFor("scrapes", async () => (((await asked()) ?? 0) >= before + count ? true : undefined));
}

/** What the machines say themselves, for a message. */
async function shown(): Promise<string> {
  const command =
    "curl -s http://127.0.0.1:15020/stats/prometheus | grep -E '^(istio_requests|istio_tcp|vmmesh_istio|envoy_access_logs)'";
  const said = await Promise.all(
    [details, reviews].map((machine) => machine.exec(`${command}`, { allowFail: true })),
  );
  return said.map(({ stdout }) => stdout).join("\n");
}

const selector = (labels: Readonly<Record<string, string>>): string =>
  `{${Object.entries(labels)
    .map(([name, value]) => `${name}="${value}"`)
    .join(",")}}`;

describe("an istiod with default settings, and a stock Envoy", () => {
  test.for(MACHINES)("%s joins", async (name) => {
    const machine = name === "details" ? details : reviews;
    cpSync(await istioctlBundle(lab, name), `${machine.root}/root/bundle`, { recursive: true });
    const { stdout } = await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
    expect(stdout).toContain(`joined: this machine is ${spiffe(name)}`);
  });

  test("a request by name arrives with the client's identity, in both directions, and nothing plain does", async () => {
    expect((await arrivesAs(reviews, "http://details/", spiffe("reviews"))).server).toBe("details");
    expect((await arrivesAs(details, "http://reviews/", spiffe("details"))).server).toBe("reviews");
    for (let round = 0; round < 20; round += 1)
      expect((await request(reviews, "http://details.default.svc.cluster.local/")).status).toBe(200);
    const plain = await lab.exec(["curl", "-s", "-m", "3", `http://${details.ip}:9080/`], {
      allowFail: true,
    });
    expect(plain.code).not.toBe(0);
  });

  test("istiod has no complaint of Envoy's, and is in sync with both", async () => {
    await waitFor("proxy-status", async () => {
      const lines = await proxyStatus(lab);
      const both = ["details.default", "reviews.default"].map((name) => lines.get(name) ?? "");
      return both.every((line) => line !== "" && !/STALE|ERROR|NOT SENT.*NOT SENT.*NOT SENT/.test(line))
        ? true
        : undefined;
    });
  });

  test("Envoy has none of Istio's own, nor the protocol that goes with them", async () => {
    const dump = await configDump(details);
    expect(dump).toContain("inbound|9080||");
    expect(dump).toContain("envoy.filters.http.router");
    for (const name of ISTIOS) expect(dump).not.toContain(`"name": "${name}"`);
    const offered = [...dump.matchAll(/"alpn_protocols": \[([^\]]*)\]/g)].map(
      ([, protocols]) => protocols ?? "",
    );
    expect(offered.length).toBeGreaterThan(0);
    for (const protocols of offered) expect(protocols).not.toContain("istio-peer-exchange");
  });

  test.for(MACHINES)(
    "%s says what was taken out, and what that costs: status, metric and log",
    async (name) => {
      const machine = name === "details" ? details : reviews;
      const { stdout } = await machine.exec("vmmesh status");
      expect(stdout).toContain("warning extensions-stripped");
      expect(stdout).not.toContain("configuration-rejected");
      const scraped = (await machine.exec("curl -s http://127.0.0.1:15020/stats/prometheus")).stdout;
      const journal = (await machine.exec("journalctl -u vmmesh-agent -o cat --no-pager")).stdout;
      for (const extension of ISTIOS) {
        expect(stdout.replace(/\s+/g, " ")).toContain(extension);
        expect(scraped).toContain(`vmmesh_xds_stripped_extensions{name="${extension}"} 1\n`);
        expect(journal).toContain(extension);
      }
    },
  );

  test("Prometheus sees Istio's request metrics rise by what was sent, on both sides, with Istio's labels", async () => {
    const ends = {
      source_workload: "reviews",
      source_workload_namespace: "default",
      source_principal: spiffe("reviews"),
      source_canonical_service: "reviews",
      source_canonical_revision: "latest",
      source_cluster: "Kubernetes",
      destination_workload: "details",
      destination_workload_namespace: "default",
      destination_principal: spiffe("details"),
      destination_canonical_service: "details",
      destination_canonical_revision: "latest",
      destination_cluster: "Kubernetes",
      destination_service: "details.default.svc.cluster.local",
      destination_service_name: "details",
      destination_service_namespace: "default",
      request_protocol: "http",
      response_code: "200",
      response_flags: "-",
    };
    const sides = [
      { reporter: "source", connection_security_policy: "unknown", source_app: "reviews" },
      { reporter: "destination", connection_security_policy: "mutual_tls", destination_app: "details" },
    ].map((side) => selector({ ...ends, ...side }));
    const read = (metric: string): Promise<(number | undefined)[]> =>
      Promise.all(sides.map((side) => prometheus.query(`sum(${metric}${side})`)));
    const metrics = [
      "istio_requests_total",
      ...["request_duration_milliseconds", "request_bytes", "response_bytes"].map(
        (name) => `istio_${name}_count`,
      ),
    ];
    await request(reviews, "http://details/");
    await scrapes(4);
    const before = await Promise.all(metrics.map(read));
    expect(before.flat(), await shown()).not.toContain(undefined);
    for (let round = 0; round < 50; round += 1)
      expect((await request(reviews, "http://details/")).status).toBe(200);
    await scrapes(4);
    expect(await Promise.all(metrics.map(read))).toEqual(
      before.map((values) => values.map((value = 0) => value + 50)),
    );
    for (const machine of [details, reviews]) {
      const scraped = (await machine.exec("curl -s http://127.0.0.1:15020/stats/prometheus")).stdout;
      const [line = ""] = scraped.match(/^istio_requests_total\{.*$/m) ?? [];
      expect([...line.matchAll(/(\w+)="/g)].map(([, name]) => name).sort()).toEqual(
        [...REQUEST_LABELS].sort(),
      );
      expect(scraped).toContain("vmmesh_istio_stats_dropped_total 0\n");
      expect(scraped).toMatch(/^envoy_access_logs_grpc_access_log_logs_dropped\{\} 0$/m);
    }
  });

  test("a TCP connection is counted when it opens, while it talks and when it ends", async () => {
    const sides = ["source", "destination"].map((reporter) =>
      selector({
        reporter,
        source_principal: spiffe("reviews"),
        source_workload: "reviews",
        destination_workload: "details",
        destination_service_name: "echo",
        request_protocol: "tcp",
      }),
    );
    const seen = (name: string): Promise<(number | undefined)[]> =>
      Promise.all(sides.map((side) => prometheus.query(`sum(istio_tcp_${name}_total${side})`)));
    const becomes = (name: string, value: number): Promise<true> =>
      waitFor(`istio_tcp_${name}_total ${value}`, async () =>
        (await seen(name)).every((one) => one === value) ? true : undefined,
      );
    await reviews.exec(
      `systemd-run -q --unit=talk --uid=65534 /usr/bin/python3 /opt/talk.py echo.default.svc.cluster.local ${ECHO_PORT}`,
    );
    await becomes("connections_opened", 1).catch(async () => expect.fail(await shown()));
    await becomes("sent_bytes", 10);
    expect(await seen("received_bytes")).toEqual([10, 10]);
    expect(await seen("connections_closed")).toEqual([0, 0]);
    await reviews.exec("touch /tmp/hang-up");
    await becomes("connections_closed", 1);
    expect(await seen("connections_opened")).toEqual([1, 1]);
    expect(await seen("sent_bytes")).toEqual([10, 10]);
  });

  test("an agent that stands still costs no request, and what it misses is counted", async () => {
    const seen = async (query: string): Promise<number> => (await prometheus.query(query)) ?? 0;
    const counts = async (): Promise<{ source: number; destination: number }> => {
      const toDetails = { destination_service_name: "details", response_code: "200" };
      const requests = (reporter: string): string =>
        `istio_requests_total${selector({ ...toDetails, reporter })}`;
      const dropped = `envoy_access_logs_grpc_access_log_logs_dropped{instance="${details.ip}:15020"}`;
      return {
        source: await seen(`sum(${requests("source")})`),
        destination: await seen(`sum(${requests("destination")}) + sum(${dropped})`),
      };
    };
    putLoad(reviews);
    const before = await counts();
    expect(before.source).toBeGreaterThan(0);
    await details.exec("systemctl kill --kill-whom=main -s STOP vmmesh-agent");
    let report: LoadReport;
    try {
      report = await load(reviews, "http://details/", 200, 10);
    } finally {
      await details.exec("systemctl kill --kill-whom=main -s CONT vmmesh-agent");
    }
    expect(report).toMatchObject({ sent: 2000, failed: 0 });
    await scrapes(4);
    expect(await counts()).toEqual({
      source: before.source + report.sent,
      destination: before.destination + report.sent,
    });
  });

  test("the warning survives a restart of the agent, and goes when istiod is told to name them no more", async () => {
    await details.exec("systemctl restart vmmesh-agent");
    const shown = async (): Promise<boolean> =>
      (await details.exec("vmmesh status", { allowFail: true })).stdout.includes("extensions-stripped");
    await waitFor("the warning", async () => ((await shown()) ? true : undefined));
    await setMesh(meshBefore);
    await lab.restartIstiod({ PILOT_ENABLE_ALPN_FILTER: "false", PILOT_ENABLE_METADATA_EXCHANGE: "false" });
    await waitFor("no warning", async () => ((await shown()) ? undefined : true), 60_000);
    expect((await arrivesAs(reviews, "http://details/", spiffe("reviews"))).server).toBe("details");
    expect((await arrivesAs(details, "http://reviews/", spiffe("details"))).server).toBe("reviews");
  });
});
