import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  proxyStatus,
  request,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
  workloadEntries,
} from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { installPeer, startPeer, stopPeer } from "../lab/peer.ts";

/**
 * The acceptance of the join, passed by the peer: the real pilot-agent and its istio-iptables with a stock Envoy. What
 * fails here is wrong with the test or the lab, not with vmmesh.
 */
let lab: Lab;
let peera: Machine;
let peerb: Machine;
const NAMES = ["peera", "peerb"] as const;
const machineOf = (name: (typeof NAMES)[number]): Machine => (name === "peera" ? peera : peerb);
const other = (name: (typeof NAMES)[number]): (typeof NAMES)[number] =>
  name === "peera" ? "peerb" : "peera";

beforeAll(async () => {
  requireRoot();
  // The peer with a stock Envoy is never ready with a default istiod, which an earlier test may have left behind.
  lab = await Lab.open({ istiodDefaults: false });
  await cleanNamespace(lab);
  await Promise.all(NAMES.map((name) => lab.removeVm(name)));
  peera = await lab.vm("peera");
  peerb = await lab.vm("peerb");
  await strictMtls(lab);
  for (const name of NAMES) {
    await defineWorkload(lab, name, 9080);
    await startApp(machineOf(name), 9080);
    await installPeer(lab, machineOf(name), name);
    await startPeer(machineOf(name));
  }
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(NAMES.map((name) => lab?.removeVm(name)));
});

describe("two machines join a real mesh with pilot-agent", () => {
  test("both are in sync in istioctl proxy-status", async () => {
    await waitFor("proxy-status", async () => {
      const lines = await proxyStatus(lab);
      return NAMES.every((name) => {
        const line = lines.get(`${name}.default`) ?? "";
        return [...line.matchAll(/SYNCED/g)].length >= 4 && !/STALE|NOT SENT/.test(line);
      })
        ? true
        : undefined;
    });
  });

  test.for(NAMES)("a WorkloadEntry of %s turns Healthy", async (name) => {
    await waitFor("the entry", async () => {
      const entry = (await workloadEntries(lab)).get(`${name}-${machineOf(name).ip}`);
      return entry?.healthy === true && entry.address === machineOf(name).ip ? true : undefined;
    });
  });

  test.for(NAMES)("a request from %s arrives with its identity, by name and by ClusterIP", async (name) => {
    const [from, to] = [machineOf(name), other(name)];
    for (const host of [to, `${to}.default.svc.cluster.local`])
      expect((await arrivesAs(from, `http://${host}/`, spiffe(name))).server).toBe(to);
    const { stdout } = await lab.kubectl(["get", "service", to, "-o", "jsonpath={.spec.clusterIP}"]);
    expect((await arrivesAs(from, `http://${stdout}/`, spiffe(name))).server).toBe(to);
  });

  test.for(NAMES)("plain text from outside the mesh is refused by %s", async (name) => {
    const { code } = await lab.exec(["curl", "-s", "-m", "3", `http://${machineOf(name).ip}:9080/`], {
      allowFail: true,
    });
    expect(code).not.toBe(0);
  });

  test("with the probe failing the endpoint goes away, and comes back with it", async () => {
    await peerb.exec("touch /tmp/unhealthy; chmod 644 /tmp/unhealthy");
    await waitFor("the entry to turn unhealthy", async () =>
      (await workloadEntries(lab)).get(`peerb-${peerb.ip}`)?.healthy === false ? true : undefined,
    );
    await waitFor("no endpoint", async () =>
      (await request(peera, "http://peerb/")).status === 503 ? true : undefined,
    );
    await peerb.exec("rm /tmp/unhealthy");
    await arrivesAs(peera, "http://peerb/", spiffe("peera"));
  });

  test("a stopped peer goes out of the endpoints", async () => {
    await stopPeer(peerb);
    await waitFor("no endpoint", async () =>
      (await request(peera, "http://peerb/")).status === 503 ? true : undefined,
    );
  });
});
