import { afterAll, beforeAll, describe, test } from "vitest";
import { CONTRACT, type Target } from "../controlplane/contract.ts";
import type { MeshService } from "../controlplane/resources.ts";
import { type ControlPlane, startControlPlane } from "../controlplane/server.ts";

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

describe("the embedded control plane keeps the contract that istiod keeps", () => {
  let plane: ControlPlane;
  let target: Target;
  beforeAll(async () => {
    plane = await startControlPlane({ address: "127.0.0.1", port: 0, services: [DETAILS], groups: [GROUP] });
    target = {
      address: "127.0.0.1",
      port: plane.port,
      serverName: plane.serverName,
      rootCert: plane.rootCert,
      clusterId: "Kubernetes",
      trustDomain: "cluster.local",
      token: plane.mintToken({ namespace: "default", serviceAccount: "details" }),
      namespace: "default",
      serviceAccount: "details",
      group: "details",
      service: {
        host: "details.default.svc.cluster.local",
        cluster: "outbound|80||details.default.svc.cluster.local",
        inboundCluster: "inbound|9080||",
      },
    };
  });
  afterAll(() => plane.stop());

  test.for(CONTRACT)("$name", ({ check }) => check(target));
});
