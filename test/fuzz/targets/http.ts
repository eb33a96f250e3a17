import { type Duplex, duplexPair } from "node:stream";
import { setImmediate } from "node:timers/promises";
import { serveAdmin } from "../../../agent/telemetry/admin.ts";
import { serveScrape } from "../../../agent/telemetry/scrape.ts";
import type { Target } from "../target.ts";

type Connect = (socket: Duplex) => void;
const NEVER = new AbortController().signal;
/** Nothing times out: what does not end by itself is a finding. */
const clock = {
  now: () => new Date(0),
  monotonicMs: () => 0,
  sleep: (_ms: number, signal?: AbortSignal) =>
    new Promise<void>((_, reject) => {
      signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
    }),
};
const listener = { port: 0, [Symbol.asyncDispose]: async () => undefined };
const orders: string[] = [];

const metrics = await new Promise<Connect>((resolve) => {
  const listenTcp = async (_address: string, _port: number, onConnection: Connect) => {
    resolve(onConnection);
    return listener;
  };
  const net = { listenTcp } as unknown as Parameters<typeof serveScrape>[0]["host"]["net"];
  void serveScrape(
    {
      host: { clock, net },
      port: 15020,
      agentMetrics: async () => "a 1\n",
      envoyAdminSocket: undefined,
      app: [],
      waitingFor: () => ["a"],
    },
    NEVER,
  );
});

const admin = await new Promise<Connect>((resolve) => {
  void serveAdmin(
    {
      clock,
      listen: async (onConnection) => {
        resolve(onConnection);
        return listener;
      },
      handlers: {
        status: async () => ({}) as never,
        unhealthy: async () => void orders.push("/health/unhealthy"),
        drain: async () => void orders.push("/drain"),
      },
    },
    NEVER,
  );
});

/** node:http sets timers and options on sockets; an in-memory pair has none. */
const socketOf = (stream: Duplex): Duplex =>
  Object.assign(stream, { setTimeout: () => stream, setNoDelay: () => stream, setKeepAlive: () => stream });

/** All that a server says to a client that sends these bytes, until it has closed the connection; the client ends a little later. */
async function said(connect: Connect, bytes: Uint8Array): Promise<string> {
  const [ours, theirs] = duplexPair();
  const chunks: Buffer[] = [];
  const closed = new Promise<void>((resolve) => {
    ours.on("data", (chunk: Buffer) => chunks.push(chunk));
    ours
      .on("error", () => resolve())
      .on("end", resolve)
      .on("close", resolve);
    theirs.on("close", resolve);
  });
  connect(socketOf(theirs));
  ours.write(bytes);
  for (let turn = 0; turn < 4 && !theirs.destroyed; turn += 1) await setImmediate();
  ours.end();
  await closed;
  ours.destroy();
  theirs.destroy();
  return Buffer.concat(chunks).toString("latin1");
}

const OWN_HOST = /^host:[ \t]*(vmmesh|localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?[ \t]*\r?$/im;
const HEAD = /^HTTP\/1\.1 (\d{3}) /;

export const target: Target = {
  about:
    "both HTTP servers answer any bytes in HTTP and close; who names another host gives the admin socket no order; the next client is served",
  covers: /\/agent\/telemetry\/(http|scrape|admin)\.ts/,
  seeds: [
    "GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n",
    "GET /healthz/ready HTTP/1.1\r\nhost: [::1]:15020\r\nconnection: close\r\n\r\n",
    "GET /stats/prometheus?usedonly HTTP/1.1\r\nhost: a\r\nx-prometheus-scrape-timeout-seconds: 1\r\n\r\n",
    "GET /status HTTP/1.1\r\nhost: vmmesh\r\n\r\n",
    "POST /drain HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n",
    // Node takes a request line without a version, too.
    "POST /drain\nhost:vmmesh\r\nh:\r\n\r\n",
    'POST /health/unhealthy HTTP/1.1\r\nhost: vmmesh\r\ncontent-length: 14\r\n\r\n{"reason":"a"}',
    "POST /drain HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
  ],
  words: [
    "host: localhost\r\n",
    "content-length: ",
    "transfer-encoding: chunked\r\n",
    "expect: 100-continue\r\n",
    "upgrade: h2c\r\n",
    "\r\n\r\n",
    "CONNECT ",
    "OPTIONS * ",
  ],
  async run(bytes) {
    for (const [name, server] of Object.entries({ metrics, admin })) {
      orders.length = 0;
      const answer = await said(server, bytes);
      if (answer !== "" && !HEAD.test(answer)) throw new Error(`${name}: not HTTP: ${answer.slice(0, 80)}`);
      if (/^HTTP\/1\.1 500 /m.test(answer) && name === "metrics") throw new Error("metrics: a fault of ours");
      const text = Buffer.from(bytes).toString("latin1");
      for (const order of orders)
        if (!new RegExp(String.raw`POST +${order}[ ?\r\n]`).test(text) || !OWN_HOST.test(text))
          throw new Error(`${order} was done for who did not ask for it`);
    }
    const next = "HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    if (!(await said(metrics, Buffer.from(`GET /metrics ${next}`))).endsWith("a 1\n\r\n0\r\n\r\n"))
      throw new Error("metrics: the next client is not served");
    if (!(await said(admin, Buffer.from(`GET /status ${next}`))).startsWith("HTTP/1.1 200 "))
      throw new Error("admin: the next client is not served");
  },
};
