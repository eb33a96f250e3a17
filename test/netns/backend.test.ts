import { spawn } from "node:child_process";
import { readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { applyPlan, removeCapture } from "../../agent/iptables/apply.ts";
import { eventually, Lab, SERVICE, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const options = () => ({ confirmWithinMs: 30_000, rulesDir: lab.rulesDir, unit: "detached" as const });

/** A kernel without nf_tables: nothing but iptables-legacy, and its lock, stands between the machine and the mesh. */
const LEGACY = {
  backend: "legacy",
  programs: { 4: "iptables-legacy", 6: "ip6tables-legacy" },
  nft: false,
} as const;

/** Registered legacy tables stay until the next boot; here they are made first, so that equality can be asked for. */
async function registerLegacy(): Promise<void> {
  for (const table of ["raw", "mangle", "nat"])
    await lab.insideShell(`iptables-legacy -t ${table} -S; ip6tables-legacy -t ${table} -S`);
}

const lockFile = () => join(dirname(lab.rulesDir), "xtables.lock");

/** Somebody who has the lock and does not let go of it. */
async function holdLock() {
  const child = spawn("flock", [lockFile(), "sh", "-c", "echo held; read _"]);
  await new Promise((resolve) => child.stdout.once("data", resolve));
  return { pid: child.pid, release: () => child.stdin.end("\n") };
}

/** Does a program wait for the lock? @see proc_locks(5): `->` */
function isAwaited(): boolean {
  const waiting = new RegExp(`-> FLOCK .*:${statSync(lockFile()).ino} `);
  return waiting.test(readFileSync("/proc/locks", "utf8"));
}

describe("another program holds the lock of iptables-legacy", () => {
  test("a removal says who, leaves everything in force, and is done when it is asked for again", async () => {
    await lab.populate();
    await registerLegacy();
    const before = await lab.firewall("legacy");
    await (await applyPlan(lab.host, await lab.rendered(WISH, LEGACY), options())).confirm();
    const inForce = await lab.firewall("legacy");
    const held = await holdLock();
    await expect(removeCapture(lab.host, lab.rulesDir)).rejects.toMatchObject({
      code: "RULES_REJECTED",
      message: expect.stringContaining(`flock (pid ${held.pid}) holds`),
    });
    expect(await lab.firewall("legacy")).toEqual(inForce);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    held.release();
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      residue: [],
      foreignUnchanged: true,
    });
    expect(await lab.firewall("legacy")).toEqual(before);
  });

  test("an apply says who, and nothing of it is in force", async () => {
    await registerLegacy();
    const before = await lab.firewall("legacy");
    const held = await holdLock();
    await expect(applyPlan(lab.host, await lab.rendered(WISH, LEGACY), options())).rejects.toMatchObject({
      code: "RULES_REJECTED",
      message: expect.stringContaining(`flock (pid ${held.pid}) holds`),
    });
    held.release();
    expect(await lab.firewall("legacy")).toEqual(before);
  });

  test("nobody confirms: the timer's rollback waits, and takes all out when the lock is free", async () => {
    await lab.populate();
    await applyPlan(lab.host, await lab.rendered(WISH, LEGACY), { ...options(), confirmWithinMs: 1000 });
    const held = await holdLock();
    const log = `${lab.rulesDir}/${(await lab.host.files.readLink(`${lab.rulesDir}/trial`)) ?? ""}/undo.log`;
    await eventually(async () => isAwaited(), 5000);
    expect(await lab.host.files.readLink(`${lab.rulesDir}/trial`)).toBeDefined();
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    held.release();
    await eventually(async () => (await lab.dial(UID.app, SERVICE.ip, 80)) === "DIRECT", 5000);
    await eventually(
      async () => !(await lab.firewall("legacy")).some((line) => /ISTIO|VMMESH/.test(line)),
      5000,
    );
    expect(await lab.host.files.readText(log)).toBe("");
  });
});
