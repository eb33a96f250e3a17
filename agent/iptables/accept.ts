import type { Command, CommandResult, Host } from "../platform/host.ts";
import { lackOf } from "./lack.ts";
import { tryRun } from "./read.ts";

/** Of what the kernel lacks, iptables only warns. */
export function accepted({ code, stderr }: CommandResult): boolean {
  return code === 0 && lackOf(stderr) === undefined;
}

/**
 * Does an empty network namespace, which ends with the program, take the text? For tables that are not there yet it is the
 * same kernel in the same state, and it takes them in a few milliseconds; `--test` gives each table back, and for that the
 * kernel waits a grace period (13 ms at 250 Hz). A "no" may come from a container that may make no namespaces.
 */
export async function acceptedElsewhere(
  host: Pick<Host, "run">,
  command: Command["argv"],
  input: string,
): Promise<boolean> {
  const result = await tryRun(host, { argv: ["unshare", "--net", ...command], input });
  return result !== undefined && accepted(result);
}
