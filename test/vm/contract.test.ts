import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { CONTRACT, type Target } from "../controlplane/contract.ts";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, waitFor } from "../lab/lab.ts";

/**
 * What vmmesh leans on in a control plane, asked of the real istiod. The same list is held against the embedded one
 * (test/envoy/controlplane.test.ts), which is admitted by nothing else.
 */
let results: ReadonlyMap<string, string | undefined>;

beforeAll(async () => {
  requireRoot();
  const lab = await Lab.open();
  await cleanNamespace(lab);
  // The checks say themselves which of their machines has a probe.
  await defineWorkload(lab, "details", 9080, { probe: "" });
  const bundle = await istioctlBundle(lab, "details");
  const target: Target = {
    address: lab.address,
    port: 15012,
    serverName: "istiod.istio-system.svc",
    rootCert: readFileSync(`${bundle}/root-cert.pem`, "utf8"),
    clusterId: "Kubernetes",
    trustDomain: "cluster.local",
    token: readFileSync(`${bundle}/istio-token`, "utf8").trim(),
    namespace: "default",
    serviceAccount: "details",
    group: "details",
    service: {
      host: "details.default.svc.cluster.local",
      cluster: "outbound|80||details.default.svc.cluster.local",
      inboundCluster: "inbound|9080||",
    },
  };
  console.log("versions:", JSON.stringify(await lab.versions()));
  // istiod hears of the new Service and group through its watches, some time after the API server has them.
  await waitFor("istiod to know the service", async () => {
    const { stdout } = await lab.exec([
      "curl",
      "-s",
      "-m",
      "3",
      "http://127.0.0.1:8080/debug/configz?types=WorkloadGroup",
    ]);
    return stdout.includes('"details"') ? true : undefined;
  });
  const program = new URL("../controlplane/contract-main.ts", import.meta.url).pathname;
  const { stdout } = await lab.exec([process.execPath, program], { input: JSON.stringify(target) });
  const list = JSON.parse(stdout) as { name: string; error?: string }[];
  results = new Map(list.map(({ name, error }) => [name, error]));
}, 300_000);

describe("the real istiod keeps the contract", () => {
  test.for(CONTRACT)("$name", ({ name }) => {
    expect(results.has(name)).toBe(true);
    expect(results.get(name)).toBeUndefined();
  });
});
