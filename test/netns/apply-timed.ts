import { createInterface } from "node:readline";
import { applyPlan } from "../../agent/iptables/apply.ts";
import { planCapture } from "../../agent/iptables/plan.ts";
import { readMachine } from "../../agent/iptables/read.ts";
import { renderPlan } from "../../agent/iptables/render.ts";
import type { Command, Host } from "../../agent/platform/host.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { WISH } from "./lab.ts";

/** What one apply took. */
export interface ApplyTimes {
  /** From the start of the first program that writes to the kernel to the end of the last. */
  readonly inForceMs: number;
  /** Looking at the machine, planning, and `applyPlan`: testing, arming the rollback, writing, and reading back. */
  readonly wholeMs: number;
}

/**
 * A process of its own in a network namespace: for each line that it reads it applies the rules, says what that took, and
 * takes them back. Arguments: rulesDir, the resolver whose questions are captured.
 */
const [rulesDir = "", resolver = ""] = process.argv.slice(2);
const real = linuxHost();
const { clock } = real;
const writes: { readonly started: number; readonly ended: number }[] = [];
const host: Host = {
  ...real,
  run: async (command, signal) => {
    const started = clock.monotonicMs();
    const result = await real.run(command, signal);
    if (isWrite(command)) writes.push({ started, ended: clock.monotonicMs() });
    return result;
  },
};

/** Does it change anything in the kernel's network? */
function isWrite({ argv: [program = "", ...args] }: Command): boolean {
  if (program.endsWith("-restore")) return !args.includes("--test");
  if (program === "nft") return args.includes("-f") && !args.includes("--check");
  return program === "ip" && args.includes("add");
}

const wish = { ...WISH, dns: { servers: [resolver] } };
for await (const _ of createInterface({ input: process.stdin })) {
  writes.length = 0;
  const began = clock.monotonicMs();
  const rendered = renderPlan(planCapture(wish, await readMachine(host)));
  const trial = await applyPlan(host, rendered, { confirmWithinMs: 60_000, rulesDir, unit: "detached" });
  const times: ApplyTimes = {
    inForceMs:
      Math.max(...writes.map(({ ended }) => ended)) - Math.min(...writes.map(({ started }) => started)),
    wholeMs: clock.monotonicMs() - began,
  };
  await trial.rollBack();
  process.stdout.write(`${JSON.stringify(times)}\n`);
}
