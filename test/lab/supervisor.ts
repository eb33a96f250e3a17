import { type ChildProcess, spawn } from "node:child_process";
import { cgroupOf, enterCgroup } from "./cgroup.ts";
import { connect, initOf } from "./machine.ts";
import { sleep } from "./sh.ts";
import { folderOf } from "./state.ts";

/** nspawn's exit status when the machine asked for a reboot. */
const REBOOT = 133;

/** Keeps one machine: boots it, gives it its network, boots it again after a reboot. `supervisor.ts ID NAME NUMBER`. */
const [id = "", name = "", number = ""] = process.argv.slice(2);
const root = `${folderOf(id)}/machine-${name}/root`;
let ending = false;
let child: ChildProcess | undefined;
process.on("SIGTERM", () => {
  ending = true;
  // nspawn passes a SIGTERM on as systemd's request to power off (systemd-nspawn(1), --kill-signal).
  child?.kill("SIGTERM");
  setTimeout(() => child?.kill("SIGKILL"), 8000).unref();
});

enterCgroup(cgroupOf(id, name));
while (!ending) {
  const machine = spawn(
    "systemd-nspawn",
    [
      "-D",
      root,
      "--register=no",
      "--keep-unit",
      "--private-network",
      "--console=pipe",
      "--link-journal=no",
      "--resolv-conf=off",
      "--timezone=off",
      "-M",
      `${id}-${name}`,
      "-b",
    ],
    {
      stdio: ["ignore", "inherit", "inherit"],
      env: { ...process.env, SYSTEMD_NSPAWN_UNIFIED_HIERARCHY: "1" },
    },
  );
  child = machine;
  const ended = new Promise<number>((resolve) => machine.on("exit", (code) => resolve(code ?? 255)));
  let init: number | undefined;
  while (init === undefined && machine.exitCode === null && machine.signalCode === null) {
    init = initOf(id, name);
    if (init === undefined) await sleep(20);
  }
  if (init !== undefined) await connect(id, Number(number), init);
  if ((await ended) !== REBOOT) break;
}
