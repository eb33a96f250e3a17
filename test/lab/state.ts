import { spawn } from "node:child_process";
import { existsSync, mkdirSync, openSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { exclusivelyNow } from "./lock.ts";
import { sleep, startTimeOf } from "./sh.ts";

/** One process of the lab: its pid can be another's by now, pid and start time together cannot (proc(5), field 22 of stat). */
export interface Process {
  readonly name: string;
  readonly pid: number;
  readonly startTime: string;
}

export interface MachineState {
  readonly number: number;
  readonly envoy: string;
}

export interface State {
  readonly id: string;
  readonly processes: readonly Process[];
  readonly machines: Readonly<Record<string, MachineState>>;
  readonly istiodEnv: Readonly<Record<string, string>>;
}

export function folderOf(id: string): string {
  return `/run/vmmesh-lab/${id}`;
}

export function readState(id: string): State {
  const path = `${folderOf(id)}/state.json`;
  if (!existsSync(path)) return { id, processes: [], machines: {}, istiodEnv: {} };
  return JSON.parse(readFileSync(path, "utf8")) as State;
}

export function changeState(id: string, change: (state: State) => State): State {
  mkdirSync(folderOf(id), { recursive: true });
  return exclusivelyNow(`${id}-state`, () => {
    const next = change(readState(id));
    const path = `${folderOf(id)}/state.json`;
    writeFileSync(`${path}.new`, JSON.stringify(next, null, 1));
    renameSync(`${path}.new`, path);
    return next;
  });
}

export function lives(process: Process): boolean {
  return process.startTime !== "" && startTimeOf(process.pid) === process.startTime;
}

/** Starts a detached process with its output in FOLDER/NAME.log, and records it. */
export function start(
  id: string,
  name: string,
  argv: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Process {
  const [program = "", ...args] = argv;
  mkdirSync(folderOf(id), { recursive: true });
  const log = openSync(`${folderOf(id)}/${name}.log`, "a");
  const child = spawn(program, args, {
    detached: true,
    stdio: ["ignore", log, log],
    env: { ...process.env, ...env },
  });
  child.unref();
  const pid = child.pid;
  if (pid === undefined) throw new Error(`${program} cannot be started`);
  const recorded: Process = { name, pid, startTime: startTimeOf(pid) ?? "" };
  changeState(id, (state) => ({
    ...state,
    processes: [...state.processes.filter((it) => it.name !== name), recorded],
  }));
  return recorded;
}

/** Ends one process, and its group if it leads one: TERM, then KILL after `graceMs`. */
export async function end(found: Process, graceMs = 5000): Promise<void> {
  const signal = (name: NodeJS.Signals): void => {
    for (const target of [-found.pid, found.pid]) {
      if (!lives(found)) return;
      try {
        process.kill(target, name);
        return;
      } catch {
        // It leads no group, or it has ended meanwhile.
      }
    }
  };
  signal("SIGTERM");
  for (let waited = 0; lives(found) && waited < graceMs; waited += 50) await sleep(50);
  signal("SIGKILL");
  for (let waited = 0; lives(found) && waited < 2000; waited += 20) await sleep(20);
}

/** Ends a recorded process and its children in its group: TERM, then KILL after `graceMs`. Never one that is not ours. */
export async function stop(id: string, name: string, graceMs = 5000): Promise<void> {
  const found = readState(id).processes.find((it) => it.name === name);
  if (found !== undefined && lives(found)) await end(found, graceMs);
  changeState(id, (state) => ({ ...state, processes: state.processes.filter((it) => it.name !== name) }));
}

export function isRunning(id: string, name: string): boolean {
  return readState(id).processes.some((it) => it.name === name && lives(it));
}

export function removeState(id: string): void {
  rmSync(folderOf(id), { recursive: true, force: true });
}
