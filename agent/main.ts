#!/usr/bin/env node
import { describeError, VmmeshError } from "./core/errors.ts";

try {
  const { parse } = await import("./cli/parse.ts");
  const parsed = await parse(process.argv.slice(2));
  if ("print" in parsed) process.stdout.write(`${parsed.print}\n`);
  else process.exitCode = await (await parsed.command.load())(parsed.options);
} catch (thrown) {
  process.stderr.write(`${describeError(thrown)}\n`);
  process.exitCode = VmmeshError.from(thrown).exitCode;
}
