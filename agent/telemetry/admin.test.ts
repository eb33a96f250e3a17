import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { VmmeshError } from "../core/errors.ts";
import { linuxHost } from "../platform/linux.ts";
import { type AdminHandlers, adminClient, serveAdmin } from "./admin.ts";
import { fetchOver } from "./http.ts";

const machine = linuxHost();
let path: string;
let cleanUp: AsyncDisposableStack;
beforeEach(async () => {
  cleanUp = new AsyncDisposableStack();
  const folder = await mkdtemp(join(tmpdir(), "vmmesh-"));
  cleanUp.defer(() => rm(folder, { recursive: true }));
  path = join(folder, "admin.sock");
});
afterEach(() => cleanUp.disposeAsync());

async function serve(handlers: Partial<AdminHandlers>): Promise<void> {
  const stop = new AbortController();
  const idle: AdminHandlers = {
    status: async () => ({ version: "1" }) as never,
    unhealthy: async () => undefined,
    drain: async () => undefined,
  };
  await new Promise<void>((resolve, reject) => {
    const served = serveAdmin(
      {
        clock: machine.clock,
        listen: (on) => machine.net.listenUnix(path, { mode: 0o600 }, on),
        handlers: { ...idle, ...handlers },
        onListening: resolve,
      },
      stop.signal,
    );
    served.catch(reject);
    cleanUp.defer(async () => {
      stop.abort();
      await served;
    });
  });
}

const client = (clock = machine.clock) => adminClient(machine.net, path, clock);

describe("the admin socket", () => {
  test("status, unhealthy with its reason, drain", async () => {
    const done: string[] = [];
    await serve({
      unhealthy: async (reason) => void done.push(reason),
      drain: async () => void done.push("drained"),
    });
    expect(await client().status()).toEqual({ version: "1" });
    await client().unhealthy("leaving the mesh");
    await client().drain();
    expect(done).toEqual(["leaving the mesh", "drained"]);
  });
  test("the handler's own sentence and advice arrive", async () => {
    await serve({
      drain: () => Promise.reject(new VmmeshError("NOT_READY", "Envoy is gone", { next: "Start it." })),
    });
    await expect(client().drain()).rejects.toMatchObject({
      code: "UNIT_FAILED",
      message: "Envoy is gone",
      next: "Start it.",
    });
  });
  test("an escape sequence from a broken agent does not reach root's terminal", async () => {
    await serve({
      status: async () => ({ version: "1\u001b]0;x\u0007\u009b2J" }) as never,
      drain: () => Promise.reject(new VmmeshError("NOT_READY", "gone\u001b[2J")),
    });
    expect(await client().status()).toEqual({ version: "1 ]0;x 2J" });
    await expect(client().drain()).rejects.toMatchObject({ message: "gone [2J" });
  });
  test.for([
    { method: "POST" as const, path: "/status", body: undefined, want: 404 },
    { method: "GET" as const, path: "/drain", body: undefined, want: 404 },
    { method: "POST" as const, path: "/health/unhealthy", body: "{", want: 400 },
    {
      method: "POST" as const,
      path: "/health/unhealthy",
      body: JSON.stringify({ reason: "x".repeat(5000) }),
      want: 400,
    },
  ])("$method $path $body → $want", async ({ method, path: url, body, want }) => {
    await serve({});
    const socket = await machine.net.connectUnix(path, { timeoutMs: 1000 });
    const text = body === undefined ? {} : { body };
    const response = await fetchOver(socket, { method, path: url, headers: { host: "localhost" }, ...text });
    expect(response.statusCode).toBe(want);
    socket.destroy();
  });
  test("forwarded to a port, it answers this machine's own names at any port", async () => {
    await serve({});
    const asked = async (host: string) => {
      const socket = await machine.net.connectUnix(path, { timeoutMs: 1000 });
      const response = await fetchOver(socket, { method: "GET", path: "/status", headers: { host } });
      socket.destroy();
      return response.statusCode;
    };
    for (const host of ["vmmesh", "localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]", "[::1]:65535"])
      expect([host, await asked(host)]).toEqual([host, 200]);
    for (const host of [
      "rebind.example",
      "rebind.example:8080",
      "localhost.rebind.example",
      "127.0.0.1.rebind.example",
      "192.0.2.1",
      "[::2]",
      "localhost:",
    ])
      expect([host, await asked(host)]).toEqual([host, 421]);
  });
  test("a page whose name was made to resolve here gives no order, and is told why", async () => {
    const done: string[] = [];
    await serve({ drain: async () => void done.push("drained") });
    const socket = await machine.net.connectUnix(path, { timeoutMs: 1000 });
    const headers = { host: "rebind.example:8080" };
    const response = await fetchOver(socket, { method: "POST", path: "/drain", headers });
    expect(response.statusCode).toBe(421);
    const [body] = await response.setEncoding("utf8").toArray();
    expect(JSON.parse(body)).toEqual({
      error: 'this is not the server of "rebind.example:8080": ask for localhost',
    });
    expect(done).toEqual([]);
    socket.destroy();
  });
});

describe("the client's own failures", () => {
  test("no agent", async () => {
    await expect(client().status()).rejects.toMatchObject({
      code: "UNIT_FAILED",
      message: "the agent does not run",
    });
  });
  test("not allowed", async () => {
    const connectUnix = () => Promise.reject(Object.assign(new Error("EACCES"), { code: "EACCES" }));
    await expect(adminClient({ connectUnix }, path, machine.clock).status()).rejects.toMatchObject({
      code: "NOT_ROOT",
    });
  });
  test("an agent that is stuck", async () => {
    await serve({ status: () => new Promise(() => undefined) });
    const clock = {
      ...machine.clock,
      sleep: (ms: number, signal?: AbortSignal) => machine.clock.sleep(ms / 100, signal),
    };
    await expect(client(clock).status()).rejects.toMatchObject({
      code: "UNIT_FAILED",
      message: "the agent did not answer within 5 s",
    });
  });
});
