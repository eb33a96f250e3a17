import { readFileSync } from "node:fs";
import type { Machine } from "./machine.ts";

/** To run what follows as a user without any right. */
export const ORDINARY_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] as const;

/** What `load.mjs` prints; times in ms since the epoch. */
export interface LoadReport {
  readonly sent: number;
  /** Not answered with 200, within 5 s. */
  readonly failed: number;
  /** Reason → how often. */
  readonly failures: Readonly<Record<string, number>>;
  /** Name of the application that answered → how often. */
  readonly servers: Readonly<Record<string, number>>;
  /** When each that failed was sent. */
  readonly losses: readonly number[];
  /** When the first of them was known to have failed; left out if none has. */
  readonly firstFailedAt?: number;
  /** When the answers with 200 came, thinned to one in 50 ms: enough to say when a service was back. */
  readonly answered: readonly number[];
  /** Of each request, when it was sent and when it was over, one after the other. */
  readonly spans: readonly number[];
}

const PROGRAM = "/opt/load.mjs";

/** @param seconds left out: until its input ends */
export function loadCommand(url: string, rate: number, seconds?: number): string[] {
  const numbers = [rate, ...(seconds === undefined ? [] : [seconds])].map(String);
  // The package's own Node: the machine has no other.
  return [...ORDINARY_USER, "/usr/lib/vmmesh/node", PROGRAM, url, ...numbers];
}

export function putLoad(machine: Machine): void {
  machine.putFile(PROGRAM, readFileSync(new URL("load.mjs", import.meta.url)));
}

/** Sends `rate` requests a second from a machine that has the load and the package. */
export async function load(from: Machine, url: string, rate: number, seconds: number): Promise<LoadReport> {
  const { stdout } = await from.exec(loadCommand(url, rate, seconds));
  return JSON.parse(stdout) as LoadReport;
}
