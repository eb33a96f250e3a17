import { describe, expect, test } from "vitest";
import { linuxHost } from "../platform/linux.ts";
import { Notifier } from "./notify.ts";

function recorded(
  env: Record<string, string>,
  code = 0,
): { notifier: Notifier; sent: string[]; failures: unknown[]; sleeps: number[] } {
  const sent: string[] = [];
  const failures: unknown[] = [];
  const sleeps: number[] = [];
  const host = {
    run: async (command: { argv: readonly string[] }) => {
      sent.push(command.argv.join(" "));
      return { code, stdout: "", stderr: "no socket" };
    },
    clock: {
      ...linuxHost().clock,
      sleep: async (ms: number) => {
        sleeps.push(ms);
      },
    },
  };
  return { notifier: new Notifier(host, env, (cause) => failures.push(cause)), sent, failures, sleeps };
}

describe("Notifier", () => {
  test("starts nothing outside systemd", async () => {
    const { notifier, sent } = recorded({ WATCHDOG_USEC: "1000000" });
    await notifier.tell({ ready: true });
    await notifier.keepAlive(() => true, new AbortController().signal);
    expect(sent).toEqual([]);
  });
  test("says everything in one call, a status in one line", async () => {
    const { notifier, sent } = recorded({ NOTIFY_SOCKET: "/run/x" });
    await notifier.tell({ ready: true, status: "serving\nREADY=0" });
    await notifier.tell({ stopping: true });
    expect(sent).toEqual(["systemd-notify READY=1 STATUS=serving READY=0", "systemd-notify STOPPING=1"]);
  });
  test.for([
    {
      name: "half of what systemd asks",
      env: { NOTIFY_SOCKET: "x", WATCHDOG_USEC: "60000000" },
      want: 30_000,
    },
    {
      name: "ours by pid",
      env: { NOTIFY_SOCKET: "x", WATCHDOG_USEC: "2000", WATCHDOG_PID: String(process.pid) },
      want: 1,
    },
    {
      name: "another process is watched",
      env: { NOTIFY_SOCKET: "x", WATCHDOG_USEC: "2000", WATCHDOG_PID: "1" },
      want: undefined,
    },
    { name: "no watchdog", env: { NOTIFY_SOCKET: "x" }, want: undefined },
    { name: "not a number", env: { NOTIFY_SOCKET: "x", WATCHDOG_USEC: "soon" }, want: undefined },
  ])("period: $name", ({ env, want }) => {
    expect(recorded(env as Record<string, string>).notifier.watchdogMs).toBe(want);
  });
  test("leaves a beat out while not alive", async () => {
    const { notifier, sent, sleeps } = recorded({ NOTIFY_SOCKET: "x", WATCHDOG_USEC: "60000000" });
    const scope = new AbortController();
    let round = 0;
    const alive = (): boolean => {
      round += 1;
      if (round === 3) scope.abort();
      return round !== 2;
    };
    await notifier.keepAlive(alive, scope.signal);
    expect(sent).toEqual(["systemd-notify WATCHDOG=1", "systemd-notify WATCHDOG=1"]);
    expect(sleeps).toEqual([30_000, 30_000, 30_000]);
  });
  test("a failure is told, not thrown", async () => {
    const { notifier, failures } = recorded({ NOTIFY_SOCKET: "x" }, 1);
    await notifier.tell({ ready: true });
    expect(failures).toHaveLength(1);
  });
});
