import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import type { Machine } from "../../lab/lab.ts";

const OBSERVERS = new URL("../order.py", import.meta.url).pathname;

export interface Said {
  readonly at: number;
  readonly what: string;
  /** The chain that the first rule jumps to, when the jump is displaced. */
  readonly ahead: string;
}

/** An observer of `order.py` in the machine's network, whose lines are `TIME WORD`, until it is ended. */
export function observe(machine: Machine, ends: (() => Promise<void>)[], ...words: string[]): Said[] {
  const said: Said[] = [];
  const child = spawn("nsenter", ["-t", String(machine.pid), "-n", "/usr/bin/python3", OBSERVERS, ...words], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  createInterface({ input: child.stdout }).on("line", (line) => {
    const [at = "", what = "", ahead = ""] = line.split(" ");
    said.push({ at: Number(at), what, ahead });
  });
  ends.push(async () => {
    child.kill("SIGKILL");
  });
  return said;
}

export const between = (said: readonly Said[], from: number, to: number): Said[] =>
  said.filter(({ at }) => at >= from && at < to);
export const lost = ({ what }: Said): boolean => what !== "envoy" && what !== "past";
