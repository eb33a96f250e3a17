import { createServer, type RequestListener } from "node:http";
import { createServer as createHttp2, type ServerHttp2Stream } from "node:http2";
import type { Duplex } from "node:stream";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { linuxHost } from "../platform/linux.ts";
import { Conditions } from "./conditions.ts";
import {
  FIRST_STATE,
  type Health,
  localAddress,
  type ProbeDeps,
  type ProbeSpec,
  runProbe,
  step,
} from "./probes.ts";

const machine = linuxHost();
let cleanUp: AsyncDisposableStack;
beforeEach(() => {
  cleanUp = new AsyncDisposableStack();
});
afterEach(() => cleanUp.disposeAsync());

describe("step", () => {
  const thresholds = { successThreshold: 2, failureThreshold: 3 };
  const run = (results: string): string => {
    let state = FIRST_STATE;
    let out = "";
    for (const result of results) {
      const next = step(state, result === "+", thresholds);
      state = next.state;
      out += next.report === undefined ? "." : next.report === "healthy" ? "H" : "U";
    }
    return out;
  };
  test.for([
    { name: "healthy after the success threshold, once", results: "+++++", want: ".H..." },
    { name: "the first report may be unhealthy", results: "----", want: "..U." },
    { name: "one success between failures starts the count anew", results: "--+---", want: ".....U" },
    { name: "healthy, unhealthy, healthy", results: "++---++", want: ".H..U.H" },
    { name: "a flapping application changes nothing", results: "++-+--+-+", want: ".H......." },
  ])("$name", ({ results, want }) => {
    expect(run(results)).toBe(want);
  });
  test("reports always alternate", () => {
    fc.assert(
      fc.property(fc.string({ unit: fc.constantFrom("+", "-"), maxLength: 60 }), (results) => {
        expect(run(results).replaceAll(".", "")).toMatch(/^(H(UH)*U?|U(HU)*H?)?$/);
      }),
    );
  });
});

describe("localAddress", () => {
  test.for([
    { host: "localhost", want: "127.0.0.1" },
    { host: "127.9.9.9", want: "127.9.9.9" },
    { host: "10.0.0.5", want: "10.0.0.5" },
    { host: "[fd00:0::5]", want: "fd00:0::5" },
    { host: "10.0.0.6", want: undefined },
    { host: "169.254.169.254", want: undefined },
    { host: "metadata.internal", want: undefined },
  ])("$host → $want", ({ host, want }) => {
    const addresses = () => [
      { interface: "eth0", family: 4 as const, address: "10.0.0.5", bits: 24 },
      { interface: "eth0", family: 6 as const, address: "fd00::5", bits: 64 },
    ];
    expect(localAddress({ addresses }, host)).toBe(want);
  });
});

const base = {
  initialDelaySeconds: 0,
  timeoutSeconds: 1,
  periodSeconds: 1,
  successThreshold: 1,
  failureThreshold: 1,
};

/** The first report of a probe. */
async function firstReport(
  check: ProbeSpec["check"],
  more: Partial<ProbeDeps> & { timeoutSeconds?: number } = {},
): Promise<{ health: Health; conditions: string[] }> {
  const scope = new AbortController();
  const conditions = new Conditions(() => new Date(0));
  const deps = { host: machine, envoyReady: async () => undefined, conditions, ...more };
  let health: Health | undefined;
  const report = (it: Health): void => {
    health = it;
    scope.abort();
  };
  await runProbe(
    deps,
    { ...base, timeoutSeconds: more.timeoutSeconds ?? 1, check },
    undefined,
    report,
    scope.signal,
  );
  if (health === undefined) throw new Error("nothing was reported");
  return { health, conditions: conditions.list().map((it) => it.id) };
}

async function httpServer(listener: RequestListener): Promise<number> {
  const server = createServer(listener);
  const listening = await machine.net.listenTcp("127.0.0.1", 0, (socket) =>
    server.emit("connection", socket),
  );
  cleanUp.use(listening);
  cleanUp.defer(() => server.closeAllConnections());
  return listening.port;
}

const http = (port: number, more: object = {}): ProbeSpec["check"] =>
  ({ kind: "http", scheme: "http", port, path: "/ready", headers: [], ...more }) as const;

describe("runProbe over http", () => {
  test("comes from 127.0.0.6 with the probe's name, path and headers", async () => {
    const seen: unknown[] = [];
    const port = await httpServer((request, response) => {
      seen.push(
        request.socket.remoteAddress,
        request.url,
        request.headers.host,
        request.headers["user-agent"],
        request.headers["x-one"],
      );
      response.end("ok");
    });
    const headers = [
      { name: "X-One", value: "1" },
      { name: "Host", value: "app.test" },
    ];
    expect((await firstReport(http(port, { headers }))).health).toEqual({ healthy: true });
    expect(seen).toEqual(["127.0.0.6", "/ready", "app.test", "istio-probe/1.0", "1"]);
  });
  test.for([
    { name: "204 is well", status: 204, location: undefined, want: true },
    { name: "404 is not", status: 404, location: undefined, want: false },
    { name: "503 is not", status: 503, location: undefined, want: false },
    {
      name: "a redirect on the same host is followed to its end",
      status: 302,
      location: "/broken",
      want: false,
    },
    {
      name: "a redirect elsewhere is not followed and counts as well",
      status: 302,
      location: "http://192.0.2.1/broken",
      want: true,
    },
  ])("$name", async ({ status, location, want }) => {
    const port = await httpServer((request, response) => {
      if (request.url === "/broken") response.writeHead(500).end();
      else response.writeHead(status, location === undefined ? {} : { location }).end();
    });
    expect((await firstReport(http(port))).health.healthy).toBe(want);
  });
  test("an endless redirect is unhealthy", async () => {
    const port = await httpServer((_, response) => response.writeHead(301, { location: "/ready" }).end());
    expect((await firstReport(http(port))).health).toEqual({
      healthy: false,
      message: "stopped after 10 redirects",
    });
  });
  test("silence is unhealthy after the timeout", async () => {
    const port = await httpServer(() => undefined);
    const { health } = await firstReport(http(port), { timeoutSeconds: 0.05 });
    expect(health).toEqual({ healthy: false, message: "no answer within 0.05 s" });
  });
  test("a host that is not this machine is never asked", async () => {
    const { health, conditions } = await firstReport(http(80, { host: "169.254.169.254" }));
    expect(health).toEqual({
      healthy: false,
      message: "its host 169.254.169.254 is not an address of this machine",
    });
    expect(conditions).toEqual(["probe-refused"]);
  });
  test("Envoy comes first", async () => {
    const { health } = await firstReport(http(1), { envoyReady: async () => "Envoy is draining" });
    expect(health).toEqual({ healthy: false, message: "Envoy is draining" });
  });
});

describe("runProbe over tcp, exec and gRPC", () => {
  test("tcp: an open port is well, a closed one is not", async () => {
    const port = await httpServer(() => undefined);
    expect((await firstReport({ kind: "tcp", port })).health).toEqual({ healthy: true });
    const { health } = await firstReport({ kind: "tcp", port: 1 });
    expect(health).toMatchObject({ healthy: false, message: expect.stringContaining("ECONNREFUSED") });
  });
  test("exec: refused unless the machine's own configuration allows it", async () => {
    const check = { kind: "exec", argv: ["true"] } as const;
    expect(await firstReport(check)).toMatchObject({
      health: { healthy: false },
      conditions: ["probe-refused"],
    });
    expect((await firstReport(check, { exec: async () => 0 })).health).toEqual({ healthy: true });
    expect((await firstReport(check, { exec: async () => 3 })).health).toEqual({
      healthy: false,
      message: "the probe command ended with exit status 3",
    });
  });
  test.for([
    { name: "SERVING is well", reply: [8, 1], status: 0, want: { healthy: true } },
    {
      name: "NOT_SERVING is not",
      reply: [8, 2],
      status: 0,
      want: { healthy: false, message: "service not serving" },
    },
    {
      name: "an unknown service is not",
      reply: undefined,
      status: 5,
      want: { healthy: false, message: "the gRPC health service answered with status 5: unknown service" },
    },
  ])("gRPC: $name", async ({ reply, status, want }) => {
    let asked = Buffer.alloc(0);
    const server = createHttp2();
    server.on("stream", (stream: ServerHttp2Stream) => {
      stream.on("data", (chunk: Buffer) => {
        asked = Buffer.concat([asked, chunk]);
      });
      stream.on("end", () => {
        const trailers = { "grpc-status": String(status), "grpc-message": "unknown service" };
        if (reply === undefined) return stream.respond({ ":status": 200, ...trailers }, { endStream: true });
        stream.respond({ ":status": 200, "content-type": "application/grpc" }, { waitForTrailers: true });
        stream.on("wantTrailers", () =>
          stream.sendTrailers(status === 0 ? { "grpc-status": "0" } : trailers),
        );
        stream.end(Buffer.from([0, 0, 0, 0, reply.length, ...reply]));
      });
    });
    const sockets: Duplex[] = [];
    const listening = await machine.net.listenTcp("127.0.0.1", 0, (socket) => {
      sockets.push(socket);
      server.emit("connection", socket);
    });
    cleanUp.use(listening);
    cleanUp.defer(() => {
      for (const socket of sockets) socket.destroy();
    });
    expect((await firstReport({ kind: "grpc", port: listening.port, service: "app" })).health).toEqual(want);
    expect([...asked]).toEqual([0, 0, 0, 0, 5, 0x0a, 3, ...Buffer.from("app")]);
  });
});
