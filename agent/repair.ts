#!/usr/bin/env node
// What vmmesh-rules.service starts. Apart from main.ts, so that a repair loads neither the command-line parser nor the mesh's papers.
import { describeError, VmmeshError } from "./core/errors.ts";
import { paths } from "./core/paths.ts";
import { repairCapture } from "./daemon/repair.ts";
import { linuxHost } from "./platform/linux.ts";

try {
  await repairCapture(linuxHost(), paths(), (line) => process.stderr.write(`${line}\n`));
} catch (thrown) {
  process.stderr.write(`${describeError(thrown)}\n`);
  process.exitCode = VmmeshError.from(thrown).exitCode;
}
