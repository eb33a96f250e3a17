import { once } from "node:events";
import type { IncomingMessage } from "node:http";
import { Agent, request } from "node:https";
import { connect } from "node:tls";
import { afterEach, beforeAll, beforeEach, expect, test } from "vitest";
import { Authority } from "../../test/controlplane/authority.ts";
import { linuxHost } from "../platform/linux.ts";
import { serveScrape } from "./scrape.ts";
import { type KeyPair, TlsDoor } from "./tls.ts";

const machine = linuxHost();
let own: Authority;
let first: KeyPair;
let second: KeyPair;
let cleanUp: AsyncDisposableStack;

const pairOf = async (authority: Authority): Promise<KeyPair> => {
  const { key, cert } = await authority.server(["vm.example"], ["127.0.0.1"]);
  return { key, chain: cert };
};

beforeAll(async () => {
  own = await Authority.create("example");
  [first, second] = await Promise.all([pairOf(own), pairOf(own)]);
});
beforeEach(() => {
  cleanUp = new AsyncDisposableStack();
});
afterEach(() => cleanUp.disposeAsync());

/** The real metrics port; `served.pair` is what lies in the folder. */
async function start(pair: KeyPair | undefined, clock = machine.clock) {
  const served = { pair, port: 0, troubles: [] as unknown[] };
  const stop = new AbortController();
  const listenTcp: typeof machine.net.listenTcp = async (...args) => {
    const listening = await machine.net.listenTcp(...args);
    served.port = listening.port;
    return listening;
  };
  const tls = new TlsDoor(
    async () => served.pair ?? Promise.reject(new Error("no such file")),
    (trouble) => served.troubles.push(trouble),
  );
  await new Promise<void>((resolve, reject) => {
    const running = serveScrape(
      {
        host: { clock, net: { ...machine.net, listenTcp } },
        port: 0,
        agentMetrics: async () => "vmmesh_up 1\n",
        tls,
        envoyAdminSocket: undefined,
        app: [],
        waitingFor: () => [],
        onListening: resolve,
      },
      stop.signal,
    );
    running.catch(reject);
    cleanUp.defer(async () => {
      stop.abort();
      await running;
    });
  });
  return served;
}

/** As Prometheus with `scheme: https`, `ca_file` and `server_name` asks. */
async function scrape(port: number, ca: string, servername = "vm.example") {
  const agent = new Agent({ keepAlive: false });
  const asked = request({ host: "127.0.0.1", port, path: "/metrics", ca, servername, agent });
  asked.end();
  const [response] = (await once(asked, "response")) as [IncomingMessage];
  const socket = response.socket as import("node:tls").TLSSocket;
  const serial = socket.getPeerCertificate().serialNumber;
  return {
    serial,
    version: socket.getProtocol(),
    text: (await response.setEncoding("utf8").toArray()).join(""),
  };
}

test("a scraper that verifies chain and name gets the metrics", async () => {
  const { port } = await start(first);
  expect(await scrape(port, own.rootPem)).toMatchObject({ version: "TLSv1.3", text: "vmmesh_up 1\n" });
});

test("one with another root, or for another name, refuses the port", async () => {
  const { port } = await start(first);
  const other = await Authority.create("example");
  await expect(scrape(port, other.rootPem)).rejects.toThrow();
  await expect(scrape(port, own.rootPem, "other.example")).rejects.toThrow(/altnames/);
});

test("in plain text metrics are refused in words, and readiness is answered", async () => {
  const { port } = await start(first);
  const metrics = await fetch(`http://127.0.0.1:${port}/stats/prometheus`);
  expect([metrics.status, await metrics.text()]).toEqual([
    403,
    "metrics are served by TLS here: scrape with `scheme: https`\n",
  ]);
  expect((await fetch(`http://127.0.0.1:${port}/healthz/ready`)).status).toBe(200);
});

test("a renewed pair counts at the next connection; half of one does not, and is told", async () => {
  const served = await start(first);
  const before = (await scrape(served.port, own.rootPem)).serial;
  served.pair = { chain: second.chain, key: first.key };
  expect((await scrape(served.port, own.rootPem)).serial).toBe(before);
  expect(served.troubles.at(-1)).toMatchObject({ message: expect.stringMatching(/key values mismatch/) });
  served.pair = undefined;
  expect((await scrape(served.port, own.rootPem)).serial).toBe(before);
  served.pair = second;
  expect((await scrape(served.port, own.rootPem)).serial).not.toBe(before);
  expect(served.troubles.at(-1)).toBeUndefined();
});

test("without a pair the connection is closed, and a later one is served", async () => {
  const served = await start(undefined);
  await expect(scrape(served.port, own.rootPem)).rejects.toThrow();
  expect(served.troubles).toMatchObject([{ message: "no such file" }]);
  served.pair = first;
  expect((await scrape(served.port, own.rootPem)).text).toBe("vmmesh_up 1\n");
});

test("what is no TLS after its first byte, or too old, is closed and costs no more than itself", async () => {
  const { port } = await start(first);
  const garbage = await machine.net.connectTcp("127.0.0.1", port, { timeoutMs: 1000 });
  const closed = once(
    garbage.resume().on("error", () => undefined),
    "close",
  );
  garbage.write(Buffer.from([0x16, ...new Array(64).fill(0xff)]));
  await closed;
  const old = connect({
    port,
    host: "127.0.0.1",
    rejectUnauthorized: false,
    maxVersion: "TLSv1.1",
    minVersion: "TLSv1",
  });
  await expect(once(old, "secureConnect")).rejects.toThrow();
  expect((await scrape(port, own.rootPem)).text).toBe("vmmesh_up 1\n");
});

test("a connection that has ended makes room for another: 200 scrapes one by one, the bound is 64 at once", async () => {
  const { port } = await start(first);
  for (let count = 0; count < 200; count += 1)
    expect((await scrape(port, own.rootPem)).text).toBe("vmmesh_up 1\n");
});

test("who opens with TLS and says no more is cut off", async () => {
  const sleep = (ms: number, signal?: AbortSignal) => machine.clock.sleep(ms / 100, signal);
  const { port } = await start(first, { ...machine.clock, sleep });
  const slow = await machine.net.connectTcp("127.0.0.1", port, { timeoutMs: 1000 });
  const closed = once(
    slow.resume().on("error", () => undefined),
    "close",
  );
  slow.write(Buffer.from([0x16]));
  await closed;
});
