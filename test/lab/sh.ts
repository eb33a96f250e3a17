import { readdirSync, readFileSync } from "node:fs";
import { execa } from "execa";

export interface Output {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface ShOptions {
  readonly input?: string;
  /** Then the program and all that it has started is killed; 0: as long as it takes. */
  readonly timeoutMs?: number;
  readonly env?: Readonly<Record<string, string>>;
  readonly cwd?: string;
  /** Resolve for every exit status instead of throwing. */
  readonly allowFail?: boolean;
  /** Give the program this process's own input and output; the texts of the answer are empty then. */
  readonly direct?: boolean;
}

/** Runs a program without a shell. @throws {Error} with its last words, unless `allowFail` */
export async function sh(argv: readonly string[], options: ShOptions = {}): Promise<Output> {
  const [program = "", ...args] = argv;
  const child = execa(program, args, {
    reject: false,
    ...(options.direct === true
      ? { stdio: "inherit" as const }
      : options.input === undefined
        ? { stdin: "ignore" as const }
        : { input: options.input }),
    ...(options.env === undefined ? {} : { env: options.env }),
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  });
  let timedOut = false;
  const timeoutMs = options.timeoutMs ?? 600_000;
  const expire = (): void => {
    timedOut = true;
    // nsenter passes no signal on to what it runs in a machine, so that ending it alone would leave that running. It has
    // to reap that, too: an orphan of it falls to this machine's PID 1, and until that reaps it no reboot gets done.
    if (child.pid !== undefined) for (const started of childrenOf(child.pid)) killTree(started);
    setTimeout(() => child.kill("SIGKILL"), 100);
    // What went to the background in a machine is no child any more, and may hold these open.
    child.stdout?.destroy();
    child.stderr?.destroy();
  };
  const timer = timeoutMs === 0 ? undefined : setTimeout(expire, timeoutMs);
  const result = await child.finally(() => clearTimeout(timer));
  const output: Output = {
    code: result.exitCode ?? 255,
    stdout: String(result.stdout ?? ""),
    stderr: String(result.stderr ?? ""),
  };
  if (output.code === 0 || options.allowFail === true) return output;
  const words = `${output.stderr}\n${output.stdout}`.trim().split("\n").slice(-8).join("\n");
  throw new Error(
    `${argv.join(" ").slice(0, 300)} ended with ${timedOut ? "a time-out" : output.code}:\n${words}`,
  );
}

/** Children of a process in any PID namespace, as this machine numbers them; none if there is no such process. */
export function childrenOf(pid: number): number[] {
  try {
    return readdirSync(`/proc/${pid}/task`).flatMap((task) =>
      readFileSync(`/proc/${pid}/task/${task}/children`, "utf8").split(" ").filter(Boolean).map(Number),
    );
  } catch {
    return [];
  }
}

function killTree(pid: number): void {
  const children = childrenOf(pid);
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It has ended.
  }
  for (const child of children) killTree(child);
}

const started = performance.now();

/** Progress with elapsed seconds, on stderr. */
export function say(line: string): void {
  process.stderr.write(`[${((performance.now() - started) / 1000).toFixed(1).padStart(6)} s] ${line}\n`);
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** When a process began, in the kernel's ticks since boot (proc(5), field 22 of stat); undefined if none of this pid runs. */
export function startTimeOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    // A zombie has ended; whoever adopted it may take seconds to notice.
    return fields[0] === "Z" || fields[0] === "X" ? undefined : fields[19];
  } catch {
    return undefined;
  }
}

/** Asks until the answer is not undefined. @throws {Error} naming what did not come, with the last failure */
export async function waitFor<T>(
  what: string,
  ask: () => Promise<T | undefined>,
  timeoutMs = 30_000,
  everyMs = 200,
): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  let last: unknown;
  for (;;) {
    try {
      const answer = await ask();
      if (answer !== undefined) return answer;
    } catch (thrown) {
      last = thrown;
    }
    if (performance.now() > deadline) {
      throw new Error(
        `${what}: not within ${timeoutMs / 1000} s`,
        last === undefined ? undefined : { cause: last },
      );
    }
    await sleep(everyMs);
  }
}
