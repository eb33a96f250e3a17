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
import { packageFile } from "./package.ts";

/**
 * A mesh as people have it: istiod without a single switch, and the metrics provider that its chart turns on. It names
 * extensions of Istio's own Envoy in every cluster and listener; the machines have a stock Envoy.
 */
const ISTIOS = ["istio.alpn", "istio.metadata_exchange", "istio.stats"];
const MACHINES = ["details", "reviews"] as const;
let lab: Lab;
let details: Machine;
let reviews: Machine;
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
  await strictMtls(lab);
  await startApp(details, 9080);
  await startApp(reviews, 9080);
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(MACHINES.map((name) => lab?.removeVm(name)));
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
