import { readFileSync } from "node:fs";
import type { Machine } from "../lab/lab.ts";
import type { Span, Target } from "./stage.ts";

export type Process = "agent" | "envoy";

/** How the shell finds the pid of each; both agents are the main process of their unit. */
const FIND: Readonly<Record<Target["side"], Readonly<Record<Process, string>>>> = {
  vmmesh: { agent: "pgrep -u vmmesh -f agentd.mjs", envoy: "pgrep -u vmmesh-envoy -x envoy" },
  peer: { agent: "pgrep -u istio-proxy -x pilot-agent", envoy: "pgrep -u istio-proxy -x envoy" },
};

/** PID inside the machine; undefined while there is none. */
export async function pidOf({ machine, side }: Target, process: Process): Promise<number | undefined> {
  const { stdout } = await machine.exec(FIND[side][process], { allowFail: true });
  const pid = Number(stdout.split("\n")[0]);
  return pid > 0 ? pid : undefined;
}

/** Envoy's port for what other machines send. */
const INBOUND = 15_006;
const LISTEN = "0A";
const LOOK_MS = 10;

/**
 * Watches the kernel's table of sockets, from outside the machine, for the times at which nobody listens on this port, which
 * is Envoy's for what comes in if none is named: exact to 10 ms.
 */
export function watchAbsence(machine: Machine, port = INBOUND): { stop(): readonly Span[] } {
  const table = `/proc/${machine.pid}/net/tcp`;
  const wanted = new RegExp(`:${port.toString(16).toUpperCase()} 0+:0000 ${LISTEN} `);
  const absences: Span[] = [];
  let presentAt = Date.now();
  let isAbsent = false;
  const look = (): void => {
    const now = Date.now();
    if (!wanted.test(readFileSync(table, "utf8"))) {
      isAbsent = true;
      return;
    }
    if (isAbsent) absences.push([presentAt, now]);
    isAbsent = false;
    presentAt = now;
  };
  const timer = setInterval(look, LOOK_MS);
  return {
    stop: () => {
      clearInterval(timer);
      if (isAbsent) absences.push([presentAt, Date.now()]);
      return absences;
    },
  };
}

/** In words: how often and how long. */
export function absenceInWords(absences: readonly Span[]): string {
  const lengths = absences.map(([from, until]) => until - from).sort((a, b) => a - b);
  if (lengths.length === 0) return "Envoy's port was never unattended";
  const total = lengths.reduce((sum, each) => sum + each, 0);
  return `nobody listened on Envoy's port ${lengths.length} times, ${total} ms in all, ${lengths[lengths.length >> 1]} ms in the middle, ${lengths.at(-1)} ms at most`;
}
