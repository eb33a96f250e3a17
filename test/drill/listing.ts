import { spawn } from "node:child_process";
import type { Span, Stage, Target } from "./stage.ts";

/** Is written out about every 100 ms: the time in ms since the epoch, and how many endpoints the client's Envoy would send to. */
const LOOK = `while printf '%s ' "$(date +%s%3N)"; do
  curl -s -m 2 --unix-socket /run/vmmesh-envoy/admin.sock http://envoy/clusters | grep -c "^outbound|80||$0\\.default\\..*::health_flags::healthy"
  sleep 0.1
done`;

/**
 * Watches, in the client's own Envoy, for the times at which it knew no endpoint of a service, because istiod had withdrawn
 * the only one: what is sent then no machine can answer.
 */
export function watchListing({ client }: Stage, { machine }: Target): { stop(): readonly Span[] } {
  const child = spawn("nsenter", ["-t", String(client.pid), "-a", "/bin/sh", "-c", LOOK, machine.name]);
  const absences: Span[] = [];
  let knownAt = Date.now();
  let isUnknown = false;
  let rest = "";
  child.stdout.setEncoding("utf8");
  child.stdout.on("data", (part: string) => {
    const lines = (rest + part).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      const [at = 0, endpoints = 0] = line.split(" ").map(Number);
      if (endpoints > 0) {
        if (isUnknown) absences.push([knownAt, at]);
        knownAt = at;
      }
      isUnknown = endpoints === 0;
    }
  });
  return {
    stop: () => {
      child.kill();
      return isUnknown ? [...absences, [knownAt, Date.now()]] : absences;
    },
  };
}

/** In words: how long. */
export function unlistedInWords(absences: readonly Span[]): string {
  const total = absences.reduce((sum, [from, until]) => sum + until - from, 0);
  return total === 0
    ? "the client's Envoy knew the machine all the time"
    : `those under way while the client's Envoy knew no endpoint, because istiod had withdrawn the machine: ${total} ms`;
}
