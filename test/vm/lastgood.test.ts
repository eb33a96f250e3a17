import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** A machine that boots while no control plane answers: it serves and calls as it did, and says that it is stale. */
const MACHINES = ["details", "reviews"] as const;
const FILE = "/var/lib/vmmesh/last-good";
let lab: Lab;
let details: Machine;
let reviews: Machine;
let stopped = false;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open({ istiodDefaults: false });
  await cleanNamespace(lab);
  await Promise.all(MACHINES.map((name) => lab.removeVm(name)));
  const deb = packageFile();
  details = await lab.vm("details", { deb });
  reviews = await lab.vm("reviews", { deb });
  await strictMtls(lab);
  for (const name of MACHINES) {
    const machine = name === "details" ? details : reviews;
    await defineWorkload(lab, name, 9080);
    await startApp(machine, 9080);
    cpSync(await istioctlBundle(lab, name), `${machine.root}/root/bundle`, { recursive: true });
    await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
  }
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(MACHINES.map((name) => lab?.removeVm(name)));
  // The tests after this one use the same lab.
  if (stopped) await lab.startIstiod();
});

/** Listeners that Envoy has added, changed or removed since it started. */
async function listenerChanges(machine: Machine): Promise<string> {
  const { stdout } = await machine.exec(
    "curl -s --unix-socket /run/vmmesh-envoy/admin.sock 'http://envoy/stats?filter=listener_manager.listener_(added|modified|removed|in_place_updated)$'",
  );
  return stdout.trim();
}

async function statusOf(machine: Machine): Promise<{
  controlPlane: { address?: string; staleSince?: string };
  conditions: { id: string }[];
}> {
  return JSON.parse((await machine.exec("vmmesh status --output json", { allowFail: true })).stdout || "{}");
}

describe("a boot without a control plane", () => {
  test("what Envoy has accepted lies on disk, for the agent alone, without a private key", async () => {
    await arrivesAs(details, "http://reviews/", spiffe("details"));
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
    await waitFor("the file", async () =>
      (await reviews.exec(`grep -qa 'outbound|80||details' ${FILE}`, { allowFail: true })).code === 0
        ? true
        : undefined,
    );
    expect((await reviews.exec(`stat -c '%a %U' ${FILE}`)).stdout.trim()).toBe("600 vmmesh");
    expect((await reviews.exec(`grep -ac 'PRIVATE KEY' ${FILE}`, { allowFail: true })).stdout.trim()).toBe(
      "0",
    );
  });

  test("the machine serves and calls with its identity again, within seconds, and says that it is stale", async () => {
    // The last accepted set is written at the end of the agent too.
    await lab.stopIstiod();
    stopped = true;
    await reviews.reboot();
    const booted = performance.now();
    expect((await arrivesAs(details, "http://reviews/", spiffe("details"))).server).toBe("reviews");
    expect((await arrivesAs(reviews, "http://details/", spiffe("reviews"))).server).toBe("details");
    console.log(`answered ${Math.round(performance.now() - booted)} ms after the boot`);
    const plain = await lab.exec(["curl", "-s", "-m", "3", `http://${reviews.ip}:9080/`], {
      allowFail: true,
    });
    expect(plain.code).not.toBe(0);
    const { controlPlane, conditions } = await statusOf(reviews);
    expect(controlPlane.staleSince).toMatch(/^20/);
    expect(controlPlane.address).toBeUndefined();
    expect(conditions.map(({ id }) => id)).toContain("configuration-stale");
    const { stdout } = await reviews.exec(
      "curl -s http://127.0.0.1:15020/stats/prometheus | grep ^vmmesh_xds_stale",
    );
    expect(stdout.trim()).toBe("vmmesh_xds_stale 1");
    expect((await reviews.exec("journalctl -u vmmesh-agent -b --no-pager")).stdout).toContain("saved at");
  });

  test("with istiod back it is connected and stale no more, and no listener was touched", async () => {
    const before = await listenerChanges(reviews);
    expect(before).toContain("listener_added");
    await lab.startIstiod();
    stopped = false;
    await waitFor(
      "the connection",
      async () => {
        const { controlPlane } = await statusOf(reviews);
        return controlPlane.address !== undefined && controlPlane.staleSince === undefined ? true : undefined;
      },
      60_000,
    );
    expect((await statusOf(reviews)).conditions.map(({ id }) => id)).not.toContain("configuration-stale");
    expect((await arrivesAs(details, "http://reviews/", spiffe("details"))).server).toBe("reviews");
    expect(await listenerChanges(reviews)).toBe(before);
  });
});
