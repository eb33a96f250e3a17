import { VmmeshError } from "../core/errors.ts";
import type { CommandResult, Host } from "../platform/host.ts";
import { type Lack, lackOf } from "./lack.ts";

interface Asks extends Pick<Host, "run"> {
  readonly files: Pick<Host["files"], "readText">;
}

/** Rules that were refused because this machine has not the extension of iptables that they need. */
export class Lacking extends VmmeshError {
  readonly extension: string | undefined;

  constructor(lack: Lack, cause: Error) {
    super("RULES_REJECTED", lack.sentence, { cause, next: lack.next });
    this.extension = lack.extension;
  }
}

/** A refusal of the kernel as an error that says what to do. @see iptables(8) exit codes; 4 is resource, permission or lock */
export function refused(result: CommandResult, what: string): VmmeshError {
  const cause = causeOf(result);
  if (/permission denied|not permitted|must be root|can't open lock file/i.test(cause.message)) {
    return new VmmeshError("RULES_PRIVILEGE", `\`${what}\` is not allowed here`, {
      cause,
      next: "Run the command as root, in the network namespace of the machine itself.",
    });
  }
  const lack = lackOf(result.stderr);
  if (lack !== undefined) return new Lacking(lack, cause);
  return new VmmeshError("RULES_REJECTED", `\`${what}\` was refused by the kernel`, {
    cause,
    next: "Run `vmmesh iptables audit` to see which tables are in force, then send its output with the bug report.",
  });
}

/** The same for a program that waits for the lock of iptables-legacy: who holds it is looked up now. */
export async function refusal(host: Asks, result: CommandResult, what: string): Promise<VmmeshError> {
  // Both lines are of iptables since 1.6.2.
  const lock = /Can't lock (\S+):/.exec(result.stderr)?.[1];
  if (lock === undefined || !result.stderr.includes("holding the xtables lock")) return refused(result, what);
  const holder = await holderOf(host, lock);
  return new VmmeshError(
    "RULES_REJECTED",
    `\`${what}\` waited in vain for the lock of iptables, which ${holder === undefined ? "another program" : `${holder.name} (pid ${holder.pid})`} holds`,
    {
      cause: causeOf(result),
      next: `${holder === undefined ? `Run \`fuser -v ${lock}\` to see which program it is` : `Run \`ps -fp ${holder.pid}\` to see what it does`}; when it has ended, run the command again.`,
    },
  );
}

/**
 * Who holds flock(2) on a file. The kernel knows the file by its inode.
 *
 * @returns undefined: nobody any more, or a process that is not visible from here (another PID namespace)
 * @see proc_locks(5)
 */
async function holderOf(host: Asks, file: string): Promise<{ pid: string; name: string } | undefined> {
  const inode = (await host.run({ argv: ["stat", "-L", "-c", "%i", file] })).stdout.trim();
  const locks = (await host.files.readText("/proc/locks")) ?? "";
  for (const [, pid = "", held] of locks.matchAll(
    /^\d+: FLOCK +\S+ +WRITE (\d+) [\da-f]+:[\da-f]+:(\d+) /gm,
  )) {
    if (held !== inode) continue;
    const name = (await host.files.readText(`/proc/${pid}/comm`))?.trim();
    // Whoever took the lock may have left it to a child.
    return { pid, name: name ?? "a process that has ended" };
  }
  return undefined;
}

function causeOf({ code, stderr }: CommandResult): Error {
  const reason = stderr
    .trim()
    .split("\n")
    .filter((line) => !line.startsWith("#"))
    .slice(0, 3)
    .join("; ");
  return new Error(reason === "" ? `exit code ${code}` : reason);
}
