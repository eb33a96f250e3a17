import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import { linuxHost } from "./linux.ts";

const { lock } = linuxHost().files;

function folder(): string {
  const root = mkdtempSync(join(tmpdir(), "vmmesh-"));
  onTestFinished(() => rmSync(root, { recursive: true }));
  return root;
}

test("of many that come at once exactly one gets the lock", async () => {
  const root = folder();
  for (let round = 0; round < 30; round += 1) {
    const path = join(root, "state", "lock");
    const got = (await Promise.all(Array.from({ length: 12 }, () => lock(path)))).filter(
      (it) => it !== undefined,
    );
    expect(got).toHaveLength(1);
    await got[0]?.[Symbol.asyncDispose]();
    expect(readdirSync(join(root, "state"))).toEqual([]);
  }
});

test("the lock of a process that was killed is taken over, by one", async () => {
  const root = folder();
  const path = join(root, "lock");
  // The pid is ours, the start time is not: it was another process.
  writeFileSync(path, `${process.pid} 1`);
  const got = (await Promise.all(Array.from({ length: 12 }, () => lock(path)))).filter(
    (it) => it !== undefined,
  );
  expect(got).toHaveLength(1);
  expect(readdirSync(root)).toEqual(["lock"]);
});
