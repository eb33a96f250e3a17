import { cpSync } from "node:fs";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/**
 * SIGKILL where it costs most: of a join while its rules are in force and not yet confirmed, and of a leave between its
 * parts. The moments are events, not times: the kill comes when the trial's jump is seen, when the mesh was told, and so on.
 */
let lab: Lab;
let machine: Machine;

const JOIN = "vmmesh join --bundle /root/bundle";
const RULES = "/var/lib/vmmesh-host/rules";
const CAPTURED = "iptables -t nat -S OUTPUT 2>/dev/null | grep -q ISTIO_OUTPUT";

/** Runs a command and kills it as soon as `when` is true. @returns whether it was killed, not ended before */
async function killWhen(command: string, when: string): Promise<boolean> {
  const { stdout } = await machine.exec(
    `${command} >/root/killed.log 2>&1 & p=$!; while kill -0 $p 2>/dev/null; do if ${when}; then kill -9 $p; break; fi; done; wait $p; echo $?`,
  );
  return stdout.trim().endsWith("137");
}

/** Everything of ours that can be in force or on disk. */
async function traces(): Promise<string> {
  const { stdout } = await machine.exec(
    [
      "ls -d /etc/vmmesh /var/lib/vmmesh* /run/vmmesh* 2>/dev/null",
      "iptables-save | grep -i 'istio\\|vmmesh'; ip6tables-save | grep -i 'istio\\|vmmesh'; nft list tables | grep vmmesh",
      "ip -6 address show dev lo | grep '::6/'",
      "systemctl list-units 'vmmesh*' --state=active,activating,failed --no-legend",
      "systemctl list-unit-files 'vmmesh*' --state=enabled --no-legend",
    ].join("; "),
    { allowFail: true },
  );
  return stdout;
}

const inForce = async (): Promise<boolean> => (await machine.exec(CAPTURED, { allowFail: true })).code === 0;

/** A join that was killed with its rules in force and on trial. */
async function killInTrial(options = ""): Promise<void> {
  // The trial may be over before a busy machine has run the two commands that look for it.
  for (let tries = 0; tries < 5; tries += 1) {
    await killWhen(`${JOIN} ${options}`, `[ -L ${RULES}/trial ] && ${CAPTURED}`);
    if ((await machine.exec(`readlink ${RULES}/trial`, { allowFail: true })).stdout !== "") return;
    await machine.exec("vmmesh leave --now", { allowFail: true });
  }
  throw new Error("no join could be killed within its trial");
}

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("brittle");
  machine = await lab.vm("brittle", { deb: packageFile() });
  await defineWorkload(lab, "brittle", 9080);
  cpSync(await istioctlBundle(lab, "brittle"), `${machine.root}/root/bundle`, { recursive: true });
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterEach(async () => {
  await machine.exec("vmmesh leave --now", { allowFail: true });
});

afterAll(async () => {
  await lab?.removeVm("brittle");
});

describe("a join is killed while its rules are on trial", () => {
  test("the rules go out by themselves when the time to confirm is over", async () => {
    await killInTrial("--confirm-within 5");
    const killed = performance.now();
    expect(await inForce()).toBe(true);
    await waitFor(
      "the rules to go",
      async () =>
        !(await inForce()) && (await machine.exec("nft list tables")).stdout.includes("vmmesh") === false
          ? true
          : undefined,
      10_000,
      100,
    );
    console.log(
      `a trial of 5 s was out ${((performance.now() - killed) / 1000).toFixed(1)} s after the kill`,
    );
    expect((await machine.exec(`ls ${RULES}/trial ${RULES}/confirmed`, { allowFail: true })).stdout).toBe("");
    await machine.exec("vmmesh leave --now");
    expect(await traces()).toBe("");
  });

  test("a second join at once takes the trial over, goes on and succeeds", async () => {
    await killInTrial();
    const { stdout, stderr } = await machine.exec(JOIN);
    expect(stderr).toContain("a join of this machine was interrupted: going on with it");
    expect(stdout).toContain("joined:");
    expect((await machine.exec("vmmesh status")).code).toBe(0);
    // The killed join's timer must not take the confirmed rules out.
    expect((await machine.exec("systemctl list-timers vmmesh-rollback.timer --no-legend")).stdout).toBe("");
    expect((await machine.exec("vmmesh iptables audit", { allowFail: true })).stdout).toContain(
      "nothing wrong found",
    );
    await machine.exec("vmmesh leave --now");
    expect(await traces()).toBe("");
  });

  test("leave at once gives the machine back", async () => {
    await killInTrial();
    await machine.exec("vmmesh leave");
    expect(await traces()).toBe("");
  });

  test.for([
    { name: "a reboot", act: () => machine.reboot() },
    {
      name: "a loss of power",
      act: async () => {
        await machine.kill();
        await machine.boot();
      },
    },
  ])("$name in the middle of the trial comes back without its rules, and join goes on", async ({ act }) => {
    await killInTrial();
    await act();
    expect(await inForce()).toBe(false);
    expect((await machine.exec("nft list tables")).stdout).not.toContain("vmmesh");
    expect(
      (await machine.exec("systemctl list-units 'vmmesh*' --state=active,failed --no-legend")).stdout,
    ).toBe("");
    expect((await machine.exec(JOIN)).stdout).toContain("joined:");
    expect((await machine.exec("vmmesh status")).code).toBe(0);
    await machine.exec("vmmesh leave --now");
    expect(await traces()).toBe("");
  });
});

describe("a leave is killed, and given again", () => {
  test("after the mesh was told: the second one waits for peers anew", async () => {
    await machine.exec(JOIN);
    expect(await killWhen("vmmesh leave", "grep -q 'telling the mesh' /root/killed.log")).toBe(true);
    expect((await machine.exec("vmmesh leave")).stderr).toContain(
      "telling the mesh that this machine leaves",
    );
    expect(await traces()).toBe("");
  });

  test.for([
    { name: "when the rules are out", when: `! ${CAPTURED}` },
    { name: "when the boot enablement is gone", when: "! systemctl is-enabled -q vmmesh.target" },
    { name: "when Envoy is stopped", when: "! systemctl is-active -q vmmesh-envoy" },
    { name: "when the agent is stopped", when: "! systemctl is-active -q vmmesh-agent" },
    { name: "when the identity is gone", when: "[ ! -e /var/lib/vmmesh/identity ]" },
    { name: "when the files are gone", when: "[ ! -e /etc/vmmesh/cluster.env ]" },
  ])("$name", async ({ when }) => {
    await machine.exec(JOIN);
    const killed = await killWhen("vmmesh leave --now", when);
    // The last moments are short: a leave that was quicker has come to its end, and there is nothing more to leave.
    if (!killed) expect(machine.getFile("/root/killed.log")).toContain("left:");
    const again = await machine.exec("vmmesh leave --now", { allowFail: true });
    console.log(killed ? "killed" : "it ended before");
    expect(again.code).toBe(again.stderr.includes("NOT_JOINED") ? 2 : 0);
    expect(await traces()).toBe("");
  });
});
