import { messageOf } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import { SECOND_MS } from "../core/time.ts";
import { envoyArgv } from "../envoy/bootstrap.ts";
import type { Command, Host, Owner } from "../platform/host.ts";
import { FOREGROUND_UNITS, foregroundPaths, UNITS } from "../platform/services.ts";
import type { Owners } from "../platform/users.ts";
import type { Logger } from "../telemetry/log.ts";

const LOOK_MS = 50;

export interface ForegroundDeps {
  readonly host: Host;
  readonly paths: Paths;
  readonly owners: Owners;
  readonly log: Logger;
  /** How the agent is started: this program, `run`, with the same root. */
  readonly agentArgv: readonly [string, ...string[]];
}

/**
 * Stands in for systemd where there is none (a network namespace, a container): runs agent and Envoy as `join` and
 * `leave` with the same root ask, starts them again when they end, and ends them with itself.
 */
export async function runForeground(deps: ForegroundDeps, signal: AbortSignal): Promise<void> {
  const { host, paths, owners, log } = deps;
  const { folder, wanted, running } = foregroundPaths(paths);
  await host.files.remove(folder);
  await host.files.makeDir(folder, { mode: 0o700 });
  const envoy: Owner = { uid: owners.envoy.uid, gid: owners.agent.gid };
  const parts: Record<string, { command: Command; prepare(): Promise<void>; up: string }> = {
    [UNITS.agent]: {
      command: { argv: deps.agentArgv, as: owners.agent, timeoutMs: 0, inheritOutput: true },
      prepare: () => host.files.makeDir(paths.run, { mode: 0o750, owner: owners.agent }),
      up: paths.adminSocket,
    },
    [UNITS.envoy]: {
      command: {
        argv: envoyArgv({ binary: `${paths.etc}/envoy`, bootstrap: paths.bootstrap, concurrency: 1 }),
        as: envoy,
        timeoutMs: 0,
        inheritOutput: true,
      },
      prepare: () => host.files.makeDir(paths.envoyRun, { mode: 0o750, owner: envoy }),
      up: paths.envoyAdminSocket,
    },
  };
  const isWanted = async (unit: string): Promise<boolean> =>
    (await host.files.stat(wanted(unit))) !== undefined;
  const pause = (ms: number): Promise<void> => host.clock.sleep(ms, signal).catch(() => undefined);

  const attend = async (unit: string): Promise<void> => {
    const part = parts[unit];
    if (part === undefined) return;
    while (!signal.aborted) {
      if (!(await isWanted(unit))) {
        await pause(LOOK_MS);
        continue;
      }
      await part.prepare();
      await host.files.remove(part.up);
      const scope = new AbortController();
      const ended = host
        .run(part.command, AbortSignal.any([signal, scope.signal]))
        .then(({ code }) => log.warning(`${unit} ended with status ${code}`))
        .catch((thrown: unknown) => {
          if (!signal.aborted && !scope.signal.aborted) log.error(`${unit}: ${messageOf(thrown)}`);
        })
        .then(() => scope.abort());
      while (!scope.signal.aborted && !signal.aborted && (await isWanted(unit))) {
        if ((await host.files.stat(part.up)) !== undefined) await host.files.touch(running(unit));
        await pause(LOOK_MS);
      }
      const crashed = scope.signal.aborted;
      scope.abort();
      await ended;
      await host.files.remove(running(unit));
      if (crashed) await pause(SECOND_MS);
    }
  };
  log.info(`waiting for \`vmmesh join --root ${paths.root}\``);
  await Promise.all(FOREGROUND_UNITS.map(attend));
  await host.files.remove(folder);
}
