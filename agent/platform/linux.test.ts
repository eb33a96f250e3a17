import { mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { linuxHost } from "./linux.ts";

test("a directory's mode is its own: parents that are missing can be entered by every user", async () => {
  const root = mkdtempSync(join(tmpdir(), "vmmesh-"));
  onTestFinished(() => rmSync(root, { recursive: true }));

  await linuxHost().files.makeDir(join(root, "var/lib/vmmesh-host"), { mode: 0o700 });

  const modeOf = (path: string): number => statSync(join(root, path)).mode & 0o777;
  expect([modeOf("var"), modeOf("var/lib"), modeOf("var/lib/vmmesh-host")]).toEqual([0o755, 0o755, 0o700]);
});
