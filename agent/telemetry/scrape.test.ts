import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type RequestListener } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Duplex, Readable } from "node:stream";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import type { Listener } from "../platform/host.ts";
import { linuxHost } from "../platform/linux.ts";
import { parseAppTargets, type ScrapeDeps, serveScrape } from "./scrape.ts";

const machine = linuxHost();
let folder: string;
let stop: AbortController;
let cleanUp: AsyncDisposableStack;
beforeEach(async () => {
  stop = new AbortController();
  cleanUp = new AsyncDisposableStack();
  folder = await mkdtemp(join(tmpdir(), "vmmesh-"));
  cleanUp.defer(() => rm(folder, { recursive: true }));
});
afterEach(() => cleanUp.disposeAsync());

async function serve(
  listener: RequestListener,
  listen: (onConnection: (socket: Duplex) => void) => Promise<Listener>,
): Promise<number> {
  const server = createServer(listener);
  const listening = await listen((socket) => server.emit("connection", socket));
  cleanUp.use(listening);
  cleanUp.defer(() => server.closeAllConnections());
  return listening.port;
}

const envoyAt = (listener: RequestListener): Promise<number> =>
  serve(listener, (on) => machine.net.listenUnix(join(folder, "envoy.sock"), { mode: 0o600 }, on));
const appAt = (listener: RequestListener): Promise<number> =>
  serve(listener, (on) => machine.net.listenTcp("127.0.0.1", 0, on));

async function start(
  more: Partial<ScrapeDeps> = {},
  clock = machine.clock,
): Promise<{ base: string; port: number; failures: string[] }> {
  const failures: string[] = [];
  let port = 0;
  const listenTcp: typeof machine.net.listenTcp = async (address, wanted, on) => {
    const listening = await machine.net.listenTcp(address, wanted, on);
    port = listening.port;
    return listening;
  };
  await new Promise<void>((resolve, reject) => {
    const served = serveScrape(
      {
        host: { clock, net: { ...machine.net, listenTcp } },
        port: 0,
        agentMetrics: async () => "# TYPE vmmesh_up gauge\nvmmesh_up 1\n",
        envoyAdminSocket: join(folder, "envoy.sock"),
        app: [],
        waitingFor: () => [],
        onFailure: (part) => failures.push(part),
        onListening: resolve,
        ...more,
      },
      stop.signal,
    );
    served.catch(reject);
    cleanUp.defer(async () => {
      stop.abort();
      await served;
    });
  });
  return { base: `http://127.0.0.1:${port}`, port, failures };
}

describe("the merged metrics", () => {
  test("agent, Envoy, application, in this order, as one valid text", async () => {
    const seen: unknown[] = [];
    await envoyAt((request, response) => {
      seen.push(request.url);
      response.end("# TYPE envoy_up gauge\nenvoy_up 1\n");
    });
    const port = await appAt((request, response) => {
      seen.push(request.url, request.headers["user-agent"]);
      response.end("# TYPE envoy_up gauge\napp_up 1\n# EOF\n");
    });
    const { base, failures } = await start({ app: [{ port, path: "/m" }] });
    const response = await fetch(`${base}/stats/prometheus?usedonly&evil=1`, {
      headers: { "user-agent": "Prometheus/3" },
    });
    expect(response.headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
    expect(await response.text()).toBe(
      "# TYPE vmmesh_up gauge\nvmmesh_up 1\n# TYPE envoy_up gauge\nenvoy_up 1\napp_up 1\n",
    );
    expect(seen.sort()).toEqual(["/m", "/stats/prometheus?usedonly=", "Prometheus/3"]);
    expect(failures).toEqual([]);
  });

  test("what cannot be had is left out and counted", async () => {
    const port = await appAt((_, response) => response.writeHead(500).end("no"));
    const { base, failures } = await start({
      app: [
        { port, path: "/m" },
        { port: 1, path: "/" },
      ],
    });
    expect(await (await fetch(`${base}/metrics`)).text()).toBe("# TYPE vmmesh_up gauge\nvmmesh_up 1\n");
    expect(failures).toEqual(["envoy", "application", "application"]);
  });

  test("a part that hangs or breaks off costs only itself, and no half line is served", async () => {
    await envoyAt((_, response) => {
      response.write("envoy_a 1\nenvoy_b");
    });
    const port = await appAt((_, response) => response.end("app_up 1\n"));
    const { base, failures } = await start({ app: [{ port, path: "/" }] });
    const text = await (
      await fetch(`${base}/metrics`, { headers: { "x-prometheus-scrape-timeout-seconds": "0.2" } })
    ).text();
    expect(text).toContain("envoy_a 1\n");
    expect(text).not.toContain("envoy_b");
    expect(failures).toContain("envoy");
  });

  test("an application that says too much is cut off at a whole line", async () => {
    const line = `app{x="${"y".repeat(1000)}"} 1\n`;
    const port = await appAt((_, response) => response.end(line.repeat(12_000)));
    const { base, failures } = await start({ envoyAdminSocket: undefined, app: [{ port, path: "/" }] });
    const text = await (await fetch(`${base}/metrics`)).text();
    expect(text.length).toBeLessThan(10.1 * 1024 * 1024);
    expect(text.length).toBeGreaterThan(9.9 * 1024 * 1024);
    expect(text.endsWith(line)).toBe(true);
    expect(failures).toEqual(["application"]);
  });

  // istio #32386: merging 97,038 lines blew the agent's memory up.
  test("Envoy is read no faster than the scraper reads", async () => {
    let written = 0;
    const chunk = Buffer.from("envoy_x 1\n".repeat(6500));
    function* endless(): Generator<Buffer> {
      for (let round = 0; round < 1000; round += 1) {
        written += chunk.length;
        yield chunk;
      }
    }
    await envoyAt((_, response) => {
      Readable.from(endless(), { objectMode: false }).pipe(response);
    });
    const { port } = await start();
    const socket = await machine.net.connectTcp("127.0.0.1", port, { timeoutMs: 1000 });
    socket.pause();
    socket.write("GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n");
    // Until the writer has been held back for a while.
    for (let before = -1; before !== written || written === 0; await machine.clock.sleep(100))
      before = written;
    expect(written).toBeLessThan(32 * 1024 * 1024);
    socket.destroy();
  });
});

describe("what the network may ask", () => {
  test("readiness lists what is awaited", async () => {
    const waiting = ["control plane", "dns"];
    const { base } = await start({ waitingFor: () => waiting });
    const response = await fetch(`${base}/healthz/ready`);
    expect([response.status, await response.text()]).toEqual([
      503,
      "waiting for control plane\nwaiting for dns\n",
    ]);
    waiting.length = 0;
    expect((await fetch(`${base}/healthz/ready`)).status).toBe(200);
  });
  test.for([
    { name: "another path", line: "GET /quitquitquit HTTP/1.1\r\nhost: a", want: 404 },
    { name: "another method", line: "POST /metrics HTTP/1.1\r\nhost: a\r\ncontent-length: 0", want: 405 },
    { name: "no host", line: "GET /metrics HTTP/1.1", want: 400 },
    { name: "a host that is none", line: "GET /metrics HTTP/1.1\r\nhost: a/../b", want: 400 },
    { name: "a very long path", line: `GET /metrics?${"x".repeat(3000)} HTTP/1.1\r\nhost: a`, want: 414 },
    {
      name: "very long headers",
      line: `GET /metrics HTTP/1.1\r\nhost: a\r\nx: ${"x".repeat(20_000)}`,
      want: 431,
    },
    { name: "no HTTP at all", line: "\x16\x03\x01\x02", want: 400 },
  ])("$name → $want", async ({ line, want }) => {
    const { port } = await start();
    const socket = await machine.net.connectTcp("127.0.0.1", port, { timeoutMs: 1000 });
    cleanUp.defer(() => {
      socket.destroy();
    });
    const head = new Promise<string>((resolve) =>
      socket.once("data", (chunk: Buffer) => resolve(chunk.toString())),
    );
    socket.write(`${line}\r\n\r\n`);
    expect(Number((await head).split(" ")[1])).toBe(want);
  });
  test("of 65 connections at once the last is closed, and a later one is served", async () => {
    const { port } = await start();
    const open = () => machine.net.connectTcp("127.0.0.1", port, { timeoutMs: 1000 });
    const sockets: Duplex[] = [];
    for (let count = 0; count < 64; count += 1) sockets.push((await open()).on("error", () => undefined));
    cleanUp.defer(() => {
      for (const socket of sockets) socket.destroy();
    });
    const ready = async (): Promise<string | undefined> => {
      const socket = (await open()).on("error", () => undefined);
      const text = new Promise<string | undefined>((resolve) => {
        socket.once("data", (chunk: Buffer) => resolve(chunk.toString()));
        socket.once("close", () => resolve(undefined));
      });
      socket.write("GET /healthz/ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
      return text;
    };
    expect(await ready()).toBeUndefined();
    sockets.shift()?.destroy();
    await expect.poll(ready).toMatch(/^HTTP\/1.1 200/);
  });

  test("of five scrapes at once the last is refused in words", async () => {
    let asked = 0;
    const four = Promise.withResolvers<void>();
    const go = Promise.withResolvers<string>();
    const { base } = await start({
      envoyAdminSocket: undefined,
      agentMetrics: () => {
        asked += 1;
        if (asked === 4) four.resolve();
        return go.promise;
      },
    });
    const running = [1, 2, 3, 4].map(() => fetch(`${base}/metrics`).then((it) => it.text()));
    await four.promise;
    const fifth = await fetch(`${base}/metrics`);
    expect([fifth.status, await fifth.text()]).toEqual([503, "too many scrapes at once\n"]);
    go.resolve("a 1\n");
    expect(await Promise.all(running)).toEqual(Array(4).fill("a 1\n"));
  });

  test("a client that never ends its request is cut off", async () => {
    const clock = {
      ...machine.clock,
      sleep: (ms: number, signal?: AbortSignal) => machine.clock.sleep(ms / 100, signal),
    };
    const { port } = await start({}, clock);
    const socket = await machine.net.connectTcp("127.0.0.1", port, { timeoutMs: 1000 });
    const closed = new Promise((resolve) => socket.once("close", resolve));
    socket.resume().write("GET /metrics HTTP/1.1\r\nhost:");
    await closed;
  });
});

describe("parseAppTargets", () => {
  test.for([
    { name: "nothing", json: undefined, want: [] },
    { name: "switched off", json: '{"scrape":"false","port":"9090"}', want: [] },
    { name: "defaults", json: "{}", want: [{ port: 80, path: "/metrics" }] },
    {
      name: "port and path",
      json: '{"scrape":"true","port":"9090","path":"stats"}',
      want: [{ port: 9090, path: "/stats" }],
    },
    {
      name: "targets",
      json: '{"targets":[{"port":"1"},{"port":"2","path":"/b"}]}',
      want: [
        { port: 1, path: "/metrics" },
        { port: 2, path: "/b" },
      ],
    },
  ])("$name", ({ json, want }) => {
    expect(parseAppTargets(json)).toEqual(want);
  });
  test.for([
    { json: "{", why: "is not JSON" },
    { json: "[]", why: "is not an object" },
    { json: '{"port":"x"}', why: "is not a port" },
    { json: '{"port":"15090"}', why: "belongs to the mesh itself" },
    { json: '{"path":"/a b"}', why: "is not a path" },
    { json: '{"scrape":{"toString":1}}', why: "`scrape` is not a text" },
    { json: '{"port":{"toString":1}}', why: "`port` is not a text" },
    { json: '{"targets":[{"path":["a"]}]}', why: "`path` is not a text" },
  ])("$json: $why", ({ json, why }) => {
    expect(() => parseAppTargets(json)).toThrow(why);
  });
});
