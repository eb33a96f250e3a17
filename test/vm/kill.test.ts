import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** SIGKILL at every step of a join and of a leave: what was begun can be finished or taken back, from the journal alone. */
let lab: Lab;
let machine: Machine;

const clean = async (): Promise<string> =>
  (
    await machine.exec(
      "ls -d /etc/vmmesh /var/lib/vmmesh /var/lib/vmmesh-host /run/vmmesh /run/vmmesh-envoy 2>/dev/null; iptables-save | grep -i 'istio\\|vmmesh'; " +
        "ip6tables-save | grep -i 'istio\\|vmmesh'; nft list tables | grep vmmesh; systemctl list-units 'vmmesh*' --state=active --no-legend; " +
        "systemctl list-unit-files 'vmmesh*' --state=enabled --no-legend",
      { allowFail: true },
    )
  ).stdout;

/** Starts a command and kills it (-9) when the journal has `entries` entries, or after `afterMs`. */
const killAt = (command: string, entries: number): string =>
  `${command} >/root/killed.log 2>&1 & p=$!; for i in $(seq 2000); do n=$(grep -c '"key"' /var/lib/vmmesh-host/join.json 2>/dev/null || echo 0); ` +
  `if [ "$n" -ge ${entries} ]; then kill -9 $p; break; fi; kill -0 $p 2>/dev/null || break; done; wait $p; echo "$? $n"`;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("mortal");
  machine = await lab.vm("mortal", { deb: packageFile() });
  await defineWorkload(lab, "mortal", 9080, { probe: "" });
  cpSync(await istioctlBundle(lab, "mortal"), `${machine.root}/root/bundle`, { recursive: true });
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("mortal");
});

const JOIN = "vmmesh join --bundle /root/bundle";

describe("killed at every step", () => {
  test.for([1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])(
    "join killed with %i entries in the journal, then leave: the machine is as it was",
    async (entries) => {
      const { stdout } = await machine.exec(killAt(JOIN, entries));
      expect(stdout).toMatch(/^(137|0) \d+/m);
      if ((await machine.exec("ls /var/lib/vmmesh-host/join.json", { allowFail: true })).code === 0) {
        const left = await machine.exec("vmmesh leave --now", { allowFail: true });
        expect({ code: left.code, stderr: left.code === 0 ? "" : left.stderr }).toEqual({
          code: 0,
          stderr: "",
        });
      }
      expect(await clean()).toBe("");
    },
  );

  test.for([2, 7, 10, 12])(
    "join killed with %i entries, then join again: it goes on and succeeds",
    async (entries) => {
      await machine.exec(killAt(JOIN, entries));
      const again = await machine.exec(JOIN, { allowFail: true });
      expect([0, 6]).toContain(again.code);
      expect((await machine.exec("vmmesh status", { allowFail: true })).code).toBe(0);
      await machine.exec("vmmesh leave --now");
      expect(await clean()).toBe("");
    },
  );

  test("a trial of rules whose join was killed is out by itself within the confirm time", async () => {
    await machine.exec(
      `${JOIN} --confirm-within 6 >/root/killed.log 2>&1 & p=$!; for i in $(seq 3000); do if iptables -t nat -S OUTPUT 2>/dev/null | grep -q ISTIO_OUTPUT; then kill -9 $p; break; fi; kill -0 $p 2>/dev/null || break; done; wait $p; true`,
    );
    const confirmed =
      (await machine.exec("readlink /var/lib/vmmesh-host/rules/confirmed", { allowFail: true })).stdout !==
      "";
    if (!confirmed) {
      await waitFor(
        "the rules to go",
        async () =>
          (await machine.exec("iptables-save | grep -q ISTIO", { allowFail: true })).code === 0
            ? undefined
            : true,
        12_000,
      );
    }
    console.log(`killed ${confirmed ? "after" : "during"} the trial`);
    await machine.exec("vmmesh leave --now");
    expect(await clean()).toBe("");
  });

  test("a reboot in the middle of a join comes back without it", async () => {
    await machine.exec(killAt(JOIN, 12));
    await machine.reboot();
    expect((await machine.exec("iptables-save | grep -c ISTIO", { allowFail: true })).stdout).toBe("0");
    await machine.exec("vmmesh leave --now");
    expect(await clean()).toBe("");
  });

  test.for([0.05, 0.3, 0.6, 0.9, 1.3])("leave killed after %f s, then leave again", async (seconds) => {
    await machine.exec(JOIN);
    await machine.exec(`timeout -s KILL ${seconds} vmmesh leave --now`, { allowFail: true });
    const again = await machine.exec("vmmesh leave --now", { allowFail: true });
    // Either it was over already, or it goes on where it stopped.
    expect([0, 2]).toContain(again.code);
    expect(await clean()).toBe("");
  });
});
