import { fileURLToPath } from "node:url";
import { runAgent } from "../daemon/run.ts";
import { readOwners } from "../platform/users.ts";
import { type Level, openLog } from "../telemetry/log.ts";
import type { Options } from "./commands.ts";
import { flag, openContext, requireRoot, text, untilInterrupted } from "./context.ts";

export async function run(options: Options): Promise<number> {
  const { host, paths } = openContext(options);
  const level = text(options, "log-level") ?? "info";
  const log = await openLog(
    host,
    {
      level: (level === "warn" ? "warning" : level) as Level,
      format: options["log-format"] === "json" ? "json" : "auto",
      journalStream: process.env["JOURNAL_STREAM"],
    },
    (line) => process.stderr.write(line),
  );
  const signal = untilInterrupted();
  const foreground = flag(options, "foreground");
  const owners = await readOwners(host, paths.root === "/" && !foreground);
  if (foreground) {
    requireRoot("vmmesh run --foreground");
    const { runForeground } = await import("../daemon/foreground.ts");
    const main = process.argv[1] ?? fileURLToPath(new URL("../main.ts", import.meta.url));
    await runForeground(
      {
        host,
        paths,
        owners,
        log,
        agentArgv: [process.execPath, main, "run", "--root", paths.root, "--log-level", level],
      },
      signal,
    );
  } else {
    await runAgent({ host, paths, owners, log, env: process.env }, signal);
  }
  return 0;
}
