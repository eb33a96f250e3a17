import { spawn } from "node:child_process";
import { once } from "node:events";
import { text } from "node:stream/consumers";
import { describe, expect, test } from "vitest";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { eventually, Lab } from "./lab.ts";

/** Killed at every step: each begin and end of a program, each write. What is left is the state before or the one after. */
const CONFIRM_MS = 2500;
/** At once, each in its own namespaces: most of the time is a trial's. */
const SIDE_BY_SIDE = 6;
const FOREIGN = `
for i in iptables-nft ip6tables-nft; do
  $i -t nat -N KUBE-SERVICES; $i -t nat -A OUTPUT -m comment --comment "it's kube's" -j KUBE-SERVICES
  $i -A INPUT -p tcp --dport 22 -j ACCEPT
done
nft add table inet foreign; nft add chain inet foreign input '{ type filter hook input priority 5; }'
nft add rule inet foreign input tcp dport 2222 counter accept`;
const WIPE =
  "iptables-nft -t nat -F ISTIO_OUTPUT; ip6tables-nft -t mangle -F VMMESH_LEASE; nft delete table ip vmmesh";

type Operation = "apply" | "replace" | "repair" | "clean";

/** @returns how many steps it took; undefined: it was killed */
async function operate(lab: Lab, operation: Operation, step: number): Promise<number | undefined> {
  const program = new URL("killed-at.ts", import.meta.url).pathname;
  const child = spawn(
    "ip",
    [
      ...["netns", "exec", lab.machine, process.execPath, program],
      ...[lab.rulesDir, operation, String(step), String(CONFIRM_MS)],
    ],
    // A group of its own: what it has under way dies with it, what it has detached does not.
    { stdio: ["ignore", "pipe", "inherit"], detached: true },
  );
  const [said] = await Promise.all([text(child.stdout), once(child, "exit")]);
  if (child.signalCode === "SIGKILL") return undefined;
  expect(child.exitCode).toBe(0);
  return Number(said);
}

/** Nothing on trial, and no rollback under way. */
async function settled(lab: Lab): Promise<void> {
  const { rulesDir } = lab;
  await eventually(
    async () =>
      (
        await lab.inside([
          "sh",
          "-c",
          `[ ! -L ${rulesDir}/trial ] && { [ ! -d ${rulesDir} ] || flock -n ${rulesDir} true; }`,
        ])
      ).code === 0,
    CONFIRM_MS + 8000,
  );
}

/** The machine as the operation meets it. @returns the rules without ours */
async function prepare(lab: Lab, operation: Operation): Promise<string[]> {
  await lab.insideShell(FOREIGN);
  const empty = await lab.firewall();
  if (operation !== "apply") await lab.install();
  if (operation === "repair") await lab.insideShell(WIPE);
  return empty;
}

interface Whole {
  readonly steps: number;
  readonly before: readonly string[];
  readonly after: readonly string[];
}

/** The operation, not killed. */
async function whole(operation: Operation): Promise<Whole> {
  await using lab = await Lab.make();
  await prepare(lab, operation);
  const before = await lab.firewall();
  const steps = await operate(lab, operation, 0);
  if (steps === undefined) throw new Error("it was to live");
  return { steps, before, after: await lab.firewall() };
}

/** @returns whether it came to this step: what happens side by side does not always take as many */
async function killedAt(operation: Operation, step: number, { before, after }: Whole): Promise<boolean> {
  await using lab = await Lab.make();
  const empty = await prepare(lab, operation);
  if ((await operate(lab, operation, step)) !== undefined) return false;
  await settled(lab);
  if (operation === "apply" || operation === "replace") {
    const kept = (await lab.inside(["test", "-e", `${lab.rulesDir}/confirmed/load.sh`])).code === 0;
    const left = await lab.firewall();
    expect(left, "confirmed or taken back, nothing between").toEqual(
      kept && left.join("\n") === after.join("\n") ? after : before,
    );
    // Whoever repeats the command gets what it promises.
    await operate(lab, operation, 0);
    expect(await lab.firewall()).toEqual(after);
  }
  if (operation === "repair") {
    await loadConfirmed(lab.host, lab.rulesDir);
    expect(await lab.firewall()).toEqual(after);
  }
  expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({ residue: [] });
  expect(await lab.firewall()).toEqual(empty);
  return true;
}

describe("killed at every step, with all that was under way", () => {
  test.for([
    ["apply", "where there were no rules of ours"],
    ["replace", "over rules that were confirmed, of which one chain goes"],
    ["repair", "after somebody's wipe"],
    ["clean", "of rules that were confirmed"],
  ] as const)(
    "%s %s: it is as before or as after, the command works when it is given again, and clean leaves others' rules alone",
    { timeout: 240_000 },
    async ([operation]) => {
      const expected = await whole(operation);
      const steps = Array.from({ length: expected.steps }, (_, at) => at + 1);
      let killed = 0;
      const worker = async (): Promise<void> => {
        for (let step = steps.shift(); step !== undefined; step = steps.shift()) {
          try {
            if (await killedAt(operation, step, expected)) killed += 1;
          } catch (thrown) {
            throw new Error(`killed at step ${step} of ${expected.steps}`, { cause: thrown });
          }
        }
      };
      await Promise.all(Array.from({ length: SIDE_BY_SIDE }, worker));
      console.log(`${operation}: killed at ${killed} of ${expected.steps} steps`);
      expect(killed).toBeGreaterThan(0.9 * expected.steps);
    },
  );
});
