import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { type Duplex, duplexPair } from "node:stream";
import { describe, expect, test } from "vitest";
import { EnvoyAdmin } from "./admin.ts";

/** An Envoy's admin that answers from a table of path → text; what is not in it is 404. */
function admin(
  answers: Record<string, string | { status: number; text: string }>,
  asked: string[] = [],
): EnvoyAdmin {
  const server = createServer((request: IncomingMessage, response: ServerResponse) => {
    const path = (request.url ?? "").split("?")[0] ?? "";
    asked.push(`${request.method} ${request.url}`);
    const answer = answers[path];
    const { status, text } =
      typeof answer === "object" ? answer : { status: answer === undefined ? 404 : 200, text: answer ?? "" };
    response.writeHead(status).end(text);
  });
  return new EnvoyAdmin(
    {
      connectUnix: async () => {
        const [ours, theirs] = duplexPair();
        server.emit("connection", asSocket(theirs));
        return asSocket(ours);
      },
    },
    "/run/envoy.sock",
  );
}

/** node:http sets timers and options on sockets; an in-memory pair has none. */
function asSocket(stream: Duplex): Duplex {
  return Object.assign(stream, {
    setTimeout: () => stream,
    setNoDelay: () => stream,
    setKeepAlive: () => stream,
    ref: () => stream,
    unref: () => stream,
  });
}

const stats = (cds: [number, number], lds: [number, number], workers: number): string =>
  [
    `cluster_manager.cds.update_success: ${cds[0]}`,
    `cluster_manager.cds.update_rejected: ${cds[1]}`,
    `listener_manager.lds.update_success: ${lds[0]}`,
    `listener_manager.lds.update_rejected: ${lds[1]}`,
    `listener_manager.workers_started: ${workers}`,
    "",
  ].join("\n");

const REFUSED = JSON.stringify({
  configs: [
    { name: "0.0.0.0_80" },
    {
      name: "virtualOutbound",
      error_state: { details: "unable to open file '/dev/stdout'", version_info: "v7" },
    },
    { name: "virtualInbound", error_state: { details: "unable to open file '/dev/stdout'" } },
  ],
});

describe("readiness", () => {
  test.for([
    { name: "all there", answers: { "/stats": stats([1, 0], [1, 0], 1), "/ready": "LIVE\n" }, want: "ready" },
    {
      name: "nothing from the control plane",
      answers: { "/stats": stats([0, 0], [0, 0], 0) },
      want: "config not received from the control plane",
    },
    {
      name: "clusters only",
      answers: { "/stats": stats([1, 0], [0, 0], 0) },
      want: "clusters received from the control plane, listeners not yet",
    },
    {
      name: "clusters refused",
      answers: { "/stats": stats([0, 2], [0, 0], 0) },
      want: "clusters rejected: see Envoy's log for the reason",
    },
    {
      // A mesh with accessLogFile /dev/stdout and an Envoy whose stdout is the journal.
      name: "listeners refused: the first is told in Envoy's words",
      answers: { "/stats": stats([1, 0], [0, 1], 0), "/config_dump": REFUSED },
      want: "rejected: listener virtualOutbound: unable to open file '/dev/stdout' (and 1 more)",
    },
    {
      name: "a later refusal leaves it ready",
      answers: { "/stats": stats([3, 1], [2, 4], 1), "/ready": "LIVE\n" },
      want: "ready",
    },
    {
      name: "config there, workers not",
      answers: { "/stats": stats([1, 0], [1, 0], 0), "/ready": "LIVE\n" },
      want: "Envoy's workers have not started",
    },
    {
      name: "waiting for its first certificate",
      answers: { "/stats": stats([1, 0], [1, 0], 0), "/ready": { status: 503, text: "PRE_INITIALIZING\n" } },
      want: "Envoy is pre-initializing",
    },
    {
      name: "draining",
      answers: { "/stats": stats([1, 0], [1, 0], 1), "/ready": { status: 503, text: "DRAINING\n" } },
      want: "Envoy is draining",
    },
  ])("$name", async ({ answers, want }) => {
    const state = await admin(answers as Record<string, string>).readiness();
    expect(state.ready ? "ready" : state.reason).toBe(want);
  });

  test("an Envoy that is not there is not ready, and that is no exception", async () => {
    const connectUnix = () => Promise.reject(new Error("connect ENOENT /run/envoy.sock"));
    const state = await new EnvoyAdmin({ connectUnix }, "/run/envoy.sock").readiness();
    expect(state).toEqual({ ready: false, reason: "Envoy does not answer: connect ENOENT /run/envoy.sock" });
  });

  test("an Envoy whose main thread is stuck is not ready when the time is over", async () => {
    const connectUnix = async () => asSocket(duplexPair()[0]);
    const state = await new EnvoyAdmin({ connectUnix }, "/run/envoy.sock", 20).readiness();
    expect(state).toMatchObject({ ready: false, reason: expect.stringContaining("Envoy does not answer") });
  });
});

describe("the other questions", () => {
  test("rejected listeners carry name, reason and version", async () => {
    expect(await admin({ "/config_dump": REFUSED }).rejectedListeners()).toEqual([
      { name: "virtualOutbound", reason: "unable to open file '/dev/stdout'", version: "v7" },
      { name: "virtualInbound", reason: "unable to open file '/dev/stdout'", version: "" },
    ]);
  });

  test("active connections leave out workers, admin and Envoy's own ports", async () => {
    const text = [
      "listener.0.0.0.0_15006.downstream_cx_active: 3",
      "listener.0.0.0.0_15006.worker_0.downstream_cx_active: 3",
      "listener.0.0.0.0_15001.downstream_cx_active: 2",
      "listener.0.0.0.0_15090.downstream_cx_active: 1",
      "listener.0.0.0.0_15021.downstream_cx_active: 1",
      "listener.admin.downstream_cx_active: 1",
      "listener.admin.main_thread.downstream_cx_active: 1",
    ].join("\n");
    expect(await admin({ "/stats": text }).activeConnections()).toBe(5);
  });

  test("the version is taken from server_info", async () => {
    const answer = JSON.stringify({ version: "9e55/1.40.0/Clean/RELEASE/BoringSSL", state: "LIVE" });
    expect((await admin({ "/server_info": answer }).version()).text).toBe("1.40.0");
  });

  test("draining is a POST of inbound listeners only", async () => {
    const asked: string[] = [];
    await admin({ "/drain_listeners": "OK\n" }, asked).drainInbound();
    expect(asked).toEqual(["POST /drain_listeners?inboundonly&graceful"]);
  });

  test("statistics come as a stream, with the query handed on", async () => {
    const asked: string[] = [];
    const body = await admin({ "/stats/prometheus": "a 1\nb 2\n" }, asked).prometheus({ query: "usedonly" });
    const text = Buffer.concat((await body.toArray()) as Buffer[]).toString();
    expect([text, asked]).toEqual(["a 1\nb 2\n", ["GET /stats/prometheus?usedonly"]]);
  });

  test("an unexpected status is an error that says where to look", async () => {
    await expect(admin({}).prometheus()).rejects.toMatchObject({
      code: "NOT_READY",
      message: expect.stringContaining("status 404"),
    });
  });
});

test("an answer of more than 16 MiB is not kept", async () => {
  const envoy = admin({ "/server_info": "x".repeat(16 * 1024 * 1024 + 1) });
  await expect(envoy.version()).rejects.toThrow("more than 16777216 bytes");
});
