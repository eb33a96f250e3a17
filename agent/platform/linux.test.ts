import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, onTestFinished, test } from "vitest";
import { linuxHost } from "./linux.ts";

test("a directory's mode is its own: parents that are missing can be entered by every user", async () => {
  const root = mkdtempSync(join(tmpdir(), "vmmesh-"));
  onTestFinished(() => rmSync(root, { recursive: true }));

  await linuxHost().files.makeDir(join(root, "var/lib/vmmesh-host"), { mode: 0o700 });

  const modeOf = (path: string): number => statSync(join(root, path)).mode & 0o777;
  expect([modeOf("var"), modeOf("var/lib"), modeOf("var/lib/vmmesh-host")]).toEqual([0o755, 0o755, 0o700]);
});

describe("programs", () => {
  const { run } = linuxHost();

  test("input, output and exit code go through as they are", async () => {
    expect(await run({ argv: ["sh", "-c", "cat; echo oops >&2; exit 3"], input: "in\n" })).toEqual({
      code: 3,
      stdout: "in\n",
      stderr: "oops\n",
    });
  });

  test("the environment is added to, not replaced", async () => {
    const { stdout } = await run({
      argv: ["sh", "-c", 'test -n "$PATH" && echo "$ONE path"'],
      env: { ONE: "1" },
    });
    expect(stdout).toBe("1 path\n");
  });

  test("a program that does not read its input is judged by its exit code", async () => {
    expect((await run({ argv: ["true"], input: "x".repeat(1 << 20) })).code).toBe(0);
  });

  test.for([
    {
      name: "is not there",
      argv: ["/no/such/program"] as const,
      code: "COMMAND_MISSING",
      says: "/no/such/program",
    },
    {
      name: "takes too long",
      argv: ["sleep", "60"] as const,
      timeoutMs: 50,
      code: "COMMAND_FAILED",
      says: "0.05 s",
    },
    { name: "is killed", argv: ["sh", "-c", "kill -9 $$"] as const, code: "COMMAND_FAILED", says: "SIGKILL" },
  ])("a program that $name", async ({ argv, timeoutMs, code, says }) => {
    const failure = run({ argv, ...(timeoutMs === undefined ? {} : { timeoutMs }) });
    await expect(failure).rejects.toMatchObject({ code, message: expect.stringContaining(says) as string });
  });

  // The child of a killed shell held the pipe, and the caller waited for as long as it lived.
  test.for([
    { name: "takes too long", script: "sleep 60 & sleep 60", timeoutMs: 200, says: "did not end" },
    { name: "prints without end", script: "yes & wait", timeoutMs: 60_000, says: "more than 1000 bytes" },
    { name: "complains without end", script: "yes >&2", timeoutMs: 60_000, says: "more than 1000 bytes" },
  ])(
    "somebody else's program that $name is killed with all that it started",
    async ({ script, timeoutMs, says }) => {
      const mark = `vmmesh-${process.pid}-${performance.now()}`;
      const failure = run({
        argv: ["sh", "-c", script],
        env: { VMMESH_TEST: mark },
        timeoutMs,
        maxOutputBytes: 1000,
      });
      await expect(failure).rejects.toMatchObject({
        code: "COMMAND_FAILED",
        message: expect.stringContaining(says) as string,
      });
      const { stdout } = await run({
        argv: ["sh", "-c", `grep -lz "$WANTED" /proc/[0-9]*/environ 2>/dev/null; true`],
        env: { WANTED: `^VMMESH_TEST=${mark}$` },
      });
      expect(stdout).toBe("");
    },
  );

  test("a signal ends it, with the signal's own reason", async () => {
    const scope = new AbortController();
    const running = run({ argv: ["sleep", "60"], timeoutMs: 0 }, scope.signal);
    scope.abort(new Error("enough"));
    await expect(running).rejects.toThrow("enough");
  });
});

test("lines of a FIFO come whole, from one writer after another, until the signal", async () => {
  const root = mkdtempSync(join(tmpdir(), "vmmesh-"));
  onTestFinished(() => rmSync(root, { recursive: true }));
  const fifo = join(root, "fifo");
  execFileSync("mkfifo", [fifo]);
  const scope = new AbortController();
  const seen: string[] = [];
  const reading = (async () => {
    for await (const line of linuxHost().files.lines(fifo, scope.signal)) {
      seen.push(line);
      if (line === "one") writeFileSync(fifo, "wo\nthree\n");
      if (line === "three") scope.abort();
    }
  })();
  writeFileSync(fifo, "one\nt");
  await reading;
  expect(seen).toEqual(["one", "two", "three"]);
});
