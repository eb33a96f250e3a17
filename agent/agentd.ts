#!/usr/bin/env node
// What systemd starts. Apart from main.ts so that the resident process never loads the command-line parser.
import { run } from "./cli/run.ts";
import { describeError, VmmeshError } from "./core/errors.ts";

try {
  process.exitCode = await run({
    root: "/",
    "log-level": process.env["VMMESH_LOG_LEVEL"] ?? "info",
    "log-format": "auto",
  });
} catch (thrown) {
  process.stderr.write(`${describeError(thrown)}\n`);
  process.exitCode = VmmeshError.from(thrown).exitCode;
}
