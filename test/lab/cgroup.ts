import { mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";

/**
 * A machine's own place in the tree of cgroups (version 2). Without one nspawn puts every machine into the same: the systemds
 * would meet each other's processes in the units of one name, could not kill what is left of a unit, and nothing could be
 * said of one machine alone.
 */
export const cgroupOf = (id: string, name: string): string => `${mountOfCgroup2()}/vmmesh-lab-${id}-${name}`;

/** Moves this process there; what it starts stays there. */
export function enterCgroup(path: string): void {
  mkdirSync(path, { recursive: true });
  writeFileSync(`${path}/cgroup.procs`, String(process.pid));
}

/** Removes what is empty; what is not goes with the next machine of this name. */
export function removeCgroup(path: string): void {
  try {
    for (const entry of readdirSync(path, { withFileTypes: true }))
      if (entry.isDirectory()) removeCgroup(`${path}/${entry.name}`);
    rmdirSync(path);
  } catch {
    // It was never made, or somebody still runs there.
  }
}

/** @throws {Error} without cgroup version 2 */
function mountOfCgroup2(): string {
  const line = readFileSync("/proc/self/mounts", "utf8")
    .split("\n")
    .find((it) => it.split(" ")[2] === "cgroup2");
  const path = line?.split(" ")[1];
  if (path === undefined) throw new Error("the lab's machines need cgroup version 2, and it is not mounted");
  return path;
}
