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
import { Lab, type Machine, sleep, waitFor } from "../lab/lab.ts";
import { load, putLoad } from "../lab/load.ts";
import { packageFile } from "./package.ts";

/** A peer that sends 200 requests a second to a service with two endpoints sees none fail while one of them leaves. */
let lab: Lab;
let one: Machine;
let other: Machine;
let caller: Machine;
const NAMES = ["leaver", "stayer", "caller"] as const;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  for (const name of NAMES) await lab.removeVm(name);
  const deb = packageFile();
  one = await lab.vm("leaver", { deb });
  other = await lab.vm("stayer", { deb });
  caller = await lab.vm("caller", { deb });
  await strictMtls(lab);
  await defineWorkload(lab, "shop", 9080);
  await defineWorkload(lab, "caller", 9080);
  const shop = await istioctlBundle(lab, "shop");
  for (const machine of [one, other]) {
    await startApp(machine, 9080);
    cpSync(shop, `${machine.root}/root/bundle`, { recursive: true });
    await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
  }
  await startApp(caller, 9080);
  cpSync(await istioctlBundle(lab, "caller"), `${caller.root}/root/bundle`, { recursive: true });
  await caller.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
  putLoad(caller);
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  for (const name of NAMES) await lab?.removeVm(name);
});

describe("leave under load", () => {
  test("both endpoints serve", async () => {
    await arrivesAs(caller, "http://shop/", spiffe("caller"));
    await waitFor(
      "both to answer",
      async () =>
        Object.keys((await load(caller, "http://shop/", 200, 2)).servers).length === 2 ? true : undefined,
      60_000,
    );
  });

  test("one of two endpoints leaves: no request of its peer fails", async () => {
    const running = load(caller, "http://shop/", 200, 12);
    await sleep(2000);
    const started = performance.now();
    await one.exec("vmmesh leave");
    const took = performance.now() - started;
    const result = await running;
    console.log(
      `leave took ${(took / 1000).toFixed(1)} s under ${result.sent} requests: ${result.failed} failed ${JSON.stringify(result.failures)}; ${JSON.stringify(result.servers)}`,
    );
    expect(result.sent).toBe(2400);
    expect(result.failed).toBe(0);
    expect(result.servers["leaver"]).toBeGreaterThan(0);
  });
});
