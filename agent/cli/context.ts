import { VmmeshError } from "../core/errors.ts";
import { type Paths, paths } from "../core/paths.ts";
import { mayReadRules } from "../iptables/trace/glimpse.ts";
import type { Host } from "../platform/host.ts";
import { linuxHost } from "../platform/linux.ts";
import {
  foregroundPaths,
  foregroundServices,
  hasSystemd,
  type Services,
  systemdServices,
} from "../platform/services.ts";
import { type Owners, readOwners } from "../platform/users.ts";
import type { Options } from "./commands.ts";

export interface Context {
  readonly host: Host;
  readonly paths: Paths;
}

export function openContext(options: Options): Context {
  return { host: linuxHost(), paths: paths(text(options, "root") ?? "/") };
}

/** @throws {VmmeshError} NOT_ROOT */
export function requireRoot(what: string): void {
  if (process.getuid?.() === 0) return;
  throw new VmmeshError("NOT_ROOT", `${what} changes the machine and must be run as root`, {
    next: `Run it with sudo: sudo vmmesh ${process.argv.slice(2).join(" ")}`,
  });
}

/**
 * For a command that takes rules out: one that the kernel refuses half-way has given up the record before it learns so.
 *
 * @throws {VmmeshError} NOT_ROOT, RULES_PRIVILEGE
 */
export async function requireNetAdmin({ host }: Context, what: string): Promise<void> {
  requireRoot(what);
  if (await mayReadRules(host.files)) return;
  throw new VmmeshError(
    "RULES_PRIVILEGE",
    `${what} changes the firewall, and root lacks CAP_NET_ADMIN here`,
    {
      next: "Run it outside the container or sandbox that withholds the capability (`capsh --print` shows what is left).",
    },
  );
}

/** Who runs our long-running parts here. @throws {VmmeshError} NO_SYSTEMD */
export async function openServices({
  host,
  paths: at,
}: Context): Promise<{ services: Services; owners: Owners }> {
  const foreground = (await host.files.stat(foregroundPaths(at).folder)) !== undefined;
  if (!foreground && (at.root !== "/" || !(await hasSystemd(host)))) {
    throw new VmmeshError(
      "NO_SYSTEMD",
      at.root === "/" ? "this machine is not run by systemd" : `nothing runs below ${at.root}`,
      {
        next: `Start \`vmmesh run --foreground${at.root === "/" ? "" : ` --root ${at.root}`}\` first; it stands in for systemd.`,
      },
    );
  }
  return {
    services: foreground ? foregroundServices(host, at) : systemdServices(host),
    owners: await readOwners(host, !foreground),
  };
}

/**
 * One vmmesh at a time may change the machine. Letting go removes the directory again if nothing was put into it: a join
 * that was refused leaves no trace.
 *
 * @throws {VmmeshError} BUSY
 */
export async function takeLock({ host, paths: at }: Context): Promise<AsyncDisposable> {
  await host.files.makeDir(at.hostState, { mode: 0o700 });
  const lock = await host.files.lock(at.lock);
  if (lock === undefined) {
    throw new VmmeshError("BUSY", "another vmmesh is changing this machine", {
      next: "Wait until it has ended, then run the same command again.",
    });
  }
  return {
    async [Symbol.asyncDispose]() {
      await lock[Symbol.asyncDispose]();
      if ((await host.files.list(at.hostState))?.length === 0) await host.files.remove(at.hostState);
    },
  };
}

/** Aborts on the first SIGINT or SIGTERM; the second ends the process at once. */
export function untilInterrupted(): AbortSignal {
  const scope = new AbortController();
  for (const name of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(name, () => {
      if (scope.signal.aborted) process.exit(130);
      scope.abort(
        new VmmeshError("COMMAND_FAILED", `interrupted by ${name}`, {
          next: "Run the same command again: it goes on where it stopped.",
        }),
      );
    });
  }
  return scope.signal;
}

export function text(options: Options, name: string): string | undefined {
  const value = options[name];
  return typeof value === "string" && value !== "" ? value : undefined;
}

export function list(options: Options, name: string): readonly string[] {
  const value = options[name];
  return Array.isArray(value) ? value : [];
}

export function number(options: Options, name: string): number {
  const value = options[name];
  return typeof value === "number" ? value : 0;
}

export const flag = (options: Options, name: string): boolean => options[name] === true;
export const wantsJson = (options: Options): boolean => options["output"] === "json";

/** An option whose items are port numbers. @throws {VmmeshError} USAGE naming the item */
export function ports(options: Options, name: string): number[] {
  return list(options, name).map((item) => {
    if (/^[1-9]\d{0,4}$/.test(item) && Number(item) <= 65535) return Number(item);
    throw new VmmeshError("USAGE", `--${name}: \`${item}\` is not a port`, {
      next: "Give a number from 1 to 65535.",
    });
  });
}

/** Progress for people on stderr, so that stdout holds the result alone. */
export function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

export function print(value: string | object): void {
  process.stdout.write(`${typeof value === "string" ? value : JSON.stringify(value, null, 2)}\n`);
}
