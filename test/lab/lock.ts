import { linkSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { say, sleep, startTimeOf } from "./sh.ts";

const FOLDER = "/run/vmmesh-lab-locks";
let tries = 0;

/** Takes the lock unless a living process has it; one of a dead holder is free. */
function take(name: string): boolean {
  mkdirSync(FOLDER, { recursive: true });
  const path = `${FOLDER}/${name}`;
  tries += 1;
  const own = `${path}.${process.pid}.${tries}`;
  writeFileSync(own, `${process.pid} ${startTimeOf(process.pid)}`);
  try {
    // A hard link is made whole or not at all, and never over another.
    linkSync(own, path);
    return true;
  } catch {
    const [pid, startTime] = holderOf(path);
    if (pid !== undefined && startTimeOf(Number(pid)) !== startTime) {
      try {
        renameSync(path, own);
        // Another waiter was quicker, and this is the lock of a living one already: it is put back.
        if (holderOf(own).join() !== [pid, startTime].join()) linkSync(own, path);
      } catch {
        // Another waiter has removed it.
      }
    }
    return false;
  } finally {
    rmSync(own, { force: true });
  }
}

function holderOf(path: string): string[] {
  try {
    return readFileSync(path, "utf8").split(" ");
  } catch {
    return [];
  }
}

/** Runs `work` while no other process of this machine runs work of this name. @throws {Error} after `timeoutMs` of waiting */
export async function exclusively<T>(
  name: string,
  work: () => Promise<T>,
  timeoutMs = 45 * 60_000,
): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  const patience = performance.now() + 1000;
  let told = false;
  while (!take(name)) {
    if (!told && performance.now() > patience) {
      told = true;
      say(`waiting for process ${holderOf(`${FOLDER}/${name}`)[0] ?? "?"}, which is at it (${name})`);
    }
    if (performance.now() > deadline)
      throw new Error(`${FOLDER}/${name} is held by process ${holderOf(`${FOLDER}/${name}`)[0] ?? "?"}`);
    await sleep(50);
  }
  try {
    return await work();
  } finally {
    rmSync(`${FOLDER}/${name}`, { force: true });
  }
}

/** The same for a moment's work, without a turn of the event loop. */
export function exclusivelyNow<T>(name: string, work: () => T): T {
  const wait = new Int32Array(new SharedArrayBuffer(4));
  while (!take(name)) Atomics.wait(wait, 0, 0, 5);
  try {
    return work();
  } finally {
    rmSync(`${FOLDER}/${name}`, { force: true });
  }
}
