import type { Machine } from "../../lab/lab.ts";
import { sleep } from "../../lab/lab.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import type { Target } from "../stage.ts";

const WIPES = ["nft flush ruleset", "iptables -t nat -F"] as const;
const ROUNDS = { quick: 1, full: 10 } as const;
/** The monitor hears of the wipe, and a unit starts. */
const RESTORED_WITHIN_MS = 1_000;
/** Until it is taken for gone. */
const PATIENCE_MS = 3_000;
const PAUSE_MS = 1_500;

export const fault: Fault = {
  name: "rules-flushed",
  about: "somebody wipes netfilter's rules, while plain text comes in, too, which STRICT forbids",
  async run(stage, scale) {
    const targets = scale === "quick" ? [stage.vmmesh] : stage.targets;
    const plain = new Map(targets.map((target) => [target, stage.plainText(target)]));
    const slowest = new Map<Target, number | undefined>();
    try {
      return await underLoad(
        stage,
        "rules-flushed",
        targets,
        async () => {
          const words = targets.map(async (target) => {
            const took = await wipe(target.machine, ROUNDS[scale]);
            slowest.set(target, took.includes(undefined) ? undefined : Math.max(...took.map(Number)));
            return `${target.side}: back after ${took.map((ms) => (ms === undefined ? "never" : `${ms} ms`)).join(", ")}`;
          });
          return (await Promise.all(words)).join("; ");
        },
        {
          // The peer puts nothing back by itself.
          wellWithinMs: 15_000,
          after: async (target) => {
            const seen = await plain.get(target)?.stop();
            const past = (seen?.requests ?? 0) - (seen?.lost ?? 0);
            const end = `${past} of ${seen?.requests} plain requests came past Envoy`;
            if (target.side === "peer") {
              await target.machine.exec("systemctl restart peer");
              await stage.well(target);
              return { end };
            }
            const ms = slowest.get(target);
            const broken = past > 0 || ms === undefined || ms > RESTORED_WITHIN_MS;
            return broken ? { end, unmet: `${end}; the rules were back after ${ms ?? "never"} ms` } : { end };
          },
        },
      );
    } finally {
      for (const load of plain.values()) await load.stop().catch(() => undefined);
    }
  },
};

/** @returns for each wipe, after how many ms another jump to Envoy stood where the old one had been; never: undefined */
async function wipe(machine: Machine, rounds: number): Promise<(number | undefined)[]> {
  const took: (number | undefined)[] = [];
  for (let round = 0; round < rounds; round += 1)
    for (const how of WIPES) {
      // No two tables get one handle, nor two rules of a table: other handles are another rule.
      const { stdout } = await machine.exec(`
        handle() { nft -a list table ip nat 2>/dev/null | sed -nE '/^table|jump ISTIO_INBOUND/s/.*# (handle [0-9]*)/\\1/p' | paste -sd ' '; }
        now() { date +%s%3N; }
        before=$(handle); from=$(now); ${how} || exit 1
        while :; do
          after=$(handle)
          if [ "\${after#*handle*handle}" != "$after" ] && [ "$after" != "$before" ]; then echo $(($(now) - from)); exit; fi
          if [ $(($(now) - from)) -gt ${PATIENCE_MS} ]; then
            if [ "$after" = "$before" ]; then echo "the old rule still stands" >&2; exit 1; fi
            echo never; exit
          fi
        done`);
      took.push(stdout.trim() === "never" ? undefined : Number(stdout));
      await sleep(PAUSE_MS);
    }
  return took;
}
