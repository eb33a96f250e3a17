import { applyPlan } from "../../agent/iptables/apply.ts";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { planCapture } from "../../agent/iptables/plan.ts";
import { readMachine } from "../../agent/iptables/read.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { renderPlan } from "../../agent/iptables/render.ts";
import type { Files, Host } from "../../agent/platform/host.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { WISH } from "./lab.ts";

/**
 * One operation that dies at a given step, with all the programs that it has under way: SIGKILL to its process group, whose
 * leader it must be. A step is the begin or the end of a program that changes something, or the end of a write to a file. Without a kill it prints
 * how many steps there were. Arguments: rulesDir, operation, step (0: none), milliseconds to confirm.
 */
const [rulesDir = "", operation = "", step = "0", confirmWithinMs = "0"] = process.argv.slice(2);
const real = linuxHost();
let steps = 0;

function reached(): void {
  steps += 1;
  if (steps === Number(step)) process.kill(-process.pid, "SIGKILL");
}

/** `nft list`, `iptables -S`, tests in the kernel and the like are told by their words; whatever else there is counts. */
function changes(argv: readonly string[]): boolean {
  const words = argv.join(" ");
  return !/--test|--check|unshare|^flock|-save|\blist\b|--version| -S /.test(words);
}

const WRITES: readonly (keyof Files)[] = ["makeDir", "writeAtomic", "swapLink", "remove"];

const host: Host = {
  ...real,
  run: async (command, signal) => {
    const running = real.run(command, signal);
    if (!changes(command.argv)) return await running;
    reached();
    const result = await running;
    reached();
    return result;
  },
  files: new Proxy(real.files, {
    get(files, name) {
      const method: unknown = Reflect.get(files, name);
      if (typeof method !== "function") return method;
      if (!WRITES.some((write) => write === name)) return method.bind(files);
      return async (...args: unknown[]) => {
        const result: unknown = await Reflect.apply(method, files, args);
        reached();
        return result;
      };
    },
  }),
};

if (operation === "clean") await removeCapture(host, rulesDir);
else if (operation === "repair") await loadConfirmed(host, rulesDir);
else {
  const wish =
    operation === "replace" ? { ...WISH, inbound: { kind: "all", excludePorts: [] } as const } : WISH;
  const rendered = renderPlan(planCapture(wish, await readMachine(host)));
  const trial = await applyPlan(host, rendered, {
    confirmWithinMs: Number(confirmWithinMs),
    rulesDir,
    unit: "detached",
  });
  await trial.confirm();
}
process.stdout.write(`${steps}\n`);
