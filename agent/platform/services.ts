import { VmmeshError } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import type { Host } from "./host.ts";

/** The units that `join` turns on. What each does is written in systemd/ and ARCHITECTURE.md. */
export const UNITS = {
  agent: "vmmesh-agent.service",
  envoy: "vmmesh-envoy.service",
  envoyLog: "vmmesh-envoy-log.socket",
  repair: "vmmesh-rules.path",
  resolvers: "vmmesh-resolvers.service",
  resolversWatch: "vmmesh-resolvers.path",
  monitor: "vmmesh-nftmon.service",
  mendRun: "vmmesh-order.service",
  repairRun: "vmmesh-rules.service",
  fence: "vmmesh-fence.service",
  hold: "vmmesh-hold.service",
  holdInput: "vmmesh-hold.socket",
  target: "vmmesh.target",
} as const;

export interface UnitState {
  readonly active: boolean;
  readonly enabled: boolean;
}

/** Starts and stops our long-running parts: systemd's work on a machine, `vmmesh run --foreground`'s in a namespace. */
export interface Services {
  readonly kind: "systemd" | "foreground";
  state(unit: string): Promise<UnitState>;
  /** Resolves when the unit says that it is up (READY=1 for the agent). @throws {VmmeshError} UNIT_FAILED with its last words */
  start(unit: string): Promise<void>;
  stop(unit: string): Promise<void>;
  restart(unit: string): Promise<void>;
  enable(unit: string): Promise<void>;
  disable(unit: string): Promise<void>;
  /** Has the manager read the units' files again. */
  reload(): Promise<void>;
}

/** Who puts rules right, in the order in which they are ended: the quick one starts the careful one as it ends. */
export const REPAIRS = [UNITS.mendRun, UNITS.repairRun] as const;

/** Ends a repair that is under way, and what holds the second fence: they would put back, or keep, what is being taken out. */
export async function stopRepairs(services: Services): Promise<void> {
  for (const unit of [...REPAIRS, UNITS.hold, UNITS.holdInput]) await services.stop(unit);
}

const START_TIMEOUT_MS = 90_000;

/** Is PID 1 systemd and answering? (sd_booted(3): /run/systemd/system exists.) */
export async function hasSystemd(host: Pick<Host, "files">): Promise<boolean> {
  return (await host.files.stat("/run/systemd/system"))?.kind === "directory";
}

export function systemdServices(host: Pick<Host, "run">): Services {
  const systemctl = async (args: string[], what: string): Promise<void> => {
    const result = await host.run({ argv: ["systemctl", ...args], timeoutMs: START_TIMEOUT_MS });
    if (result.code === 0) return;
    const unit = args.at(-1) ?? "";
    const journal = await host.run({
      argv: ["journalctl", "-u", unit, "-n", "5", "-o", "cat", "--no-pager"],
    });
    const lastWords = journal.stdout.trim().split("\n").slice(-5).join(" | ");
    throw new VmmeshError("UNIT_FAILED", `${unit} could not be ${what}`, {
      cause: new Error(
        [result.stderr.trim().split("\n")[0], lastWords].filter(Boolean).join("; its last words: "),
      ),
      next: `Read \`journalctl -u ${unit}\`, mend what it names, and run the same command again.`,
    });
  };
  return {
    kind: "systemd",
    async state(unit) {
      const { stdout } = await host.run({
        argv: ["systemctl", "show", "-p", "ActiveState", "-p", "UnitFileState", unit],
      });
      return {
        active: /^ActiveState=(active|activating|reloading)$/m.test(stdout),
        enabled: /^UnitFileState=enabled$/m.test(stdout),
      };
    },
    start: (unit) => systemctl(["start", unit], "started"),
    async stop(unit) {
      await systemctl(["stop", unit], "stopped");
      // What failed before, or was stopped in the middle of a oneshot, would stay on systemd's list of failed units.
      await host.run({ argv: ["systemctl", "reset-failed", unit] });
    },
    restart: (unit) => systemctl(["restart", unit], "restarted"),
    enable: (unit) => systemctl(["enable", "--quiet", unit], "enabled"),
    disable: (unit) => systemctl(["disable", "--quiet", unit], "disabled"),
    reload: () => systemctl(["daemon-reload"], "read again"),
  };
}

/** Where a foreground supervisor and `join` meet: a file per unit that should run, one per unit that does. */
export function foregroundPaths(paths: Paths): {
  wanted: (unit: string) => string;
  running: (unit: string) => string;
  folder: string;
} {
  const folder = `${paths.run}-foreground`;
  return {
    folder,
    wanted: (unit) => `${folder}/${unit}.wanted`,
    running: (unit) => `${folder}/${unit}.running`,
  };
}

/** The units that a foreground supervisor runs; the rest of systemd's units have no counterpart there. */
export const FOREGROUND_UNITS: readonly string[] = [UNITS.agent, UNITS.envoy];

/** Speaks to a `vmmesh run --foreground` that serves the same root. */
export function foregroundServices(host: Pick<Host, "files" | "clock">, paths: Paths): Services {
  const { wanted, running } = foregroundPaths(paths);
  const known = (unit: string): boolean => FOREGROUND_UNITS.includes(unit);
  const until = async (unit: string, up: boolean): Promise<void> => {
    const deadline = host.clock.monotonicMs() + START_TIMEOUT_MS;
    while (((await host.files.stat(running(unit))) !== undefined) !== up) {
      if (host.clock.monotonicMs() > deadline) {
        throw new VmmeshError(
          "UNIT_FAILED",
          `${unit} was not ${up ? "started" : "stopped"} within ${START_TIMEOUT_MS / 1000} s`,
          {
            next: "Is `vmmesh run --foreground` running with the same --root? Its output says why the part does not start.",
          },
        );
      }
      await host.clock.sleep(50);
    }
  };
  const services: Services = {
    kind: "foreground",
    async state(unit) {
      const want = (await host.files.stat(wanted(unit))) !== undefined;
      return { active: (await host.files.stat(running(unit))) !== undefined, enabled: want };
    },
    async start(unit) {
      if (!known(unit)) return;
      await host.files.touch(wanted(unit));
      await until(unit, true);
    },
    async stop(unit) {
      if (!known(unit)) return;
      await host.files.remove(wanted(unit));
      await until(unit, false);
    },
    async restart(unit) {
      await services.stop(unit);
      await services.start(unit);
    },
    async enable() {},
    async disable() {},
    async reload() {},
  };
  return services;
}
