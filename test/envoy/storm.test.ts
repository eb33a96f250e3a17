import { mkdtemp, rm } from "node:fs/promises";
import { type ClientHttp2Session, type ClientHttp2Stream, connect } from "node:http2";
import { createConnection, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { Latest } from "../../agent/core/signals.ts";
import { LEASE_NAME, TYPE } from "../../agent/dns/answer.ts";
import { serveDns } from "../../agent/dns/server.ts";
import { Upstreams } from "../../agent/dns/upstream.ts";
import { frame as dnsFrame, writeQuery } from "../../agent/dns/wire.ts";
import type { Svid } from "../../agent/identity/svid.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import {
  readDeltaRequest,
  TYPE_URL,
  writeDeltaRequest,
  writeDeltaResponse,
} from "../../agent/proto/discovery.ts";
import { writeAny } from "../../agent/proto/wire.ts";
import { serveSds } from "../../agent/sds/serve.ts";
import { ACCESS_LOG_SERVICE, countAccessLog } from "../../agent/telemetry/accessLog.ts";
import { AdsRelay } from "../../agent/xds/relay.ts";
import { SERVER_NAME, startIstiod } from "../fakes/istiod.ts";
import { expectNoGrowth } from "./growth.ts";

const ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const SDS = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets";
const ROUNDS = 1000;
const WARM_UP = 200;
const MIB = 1024 * 1024;
/** What each Envoy asks for: a leaked stream costs its names, 1,000 of them are far over the bound. */
const HELD = Array.from({ length: 200 }, (_, at) => `outbound|80||s${at}.default`);
/** Of 1,000 rounds. The heap's own settling, code that was compiled meanwhile above all, is some hundred KiB. */
const MAX_GROWTH = { heap: 4 * MIB, promises: 100, descriptors: 4 };
const TIMEOUT_MS = 120_000;
const host = linuxHost();

/** A message as gRPC carries it. */
function frameOf(message: Uint8Array): Buffer {
  const frame = Buffer.alloc(5 + message.length);
  frame.writeUInt32BE(message.length, 1);
  frame.set(message, 5);
  return frame;
}

const subscription = (typeUrl: string, subscribe: readonly string[]): Buffer =>
  frameOf(
    writeDeltaRequest({
      node: Buffer.from("node"),
      typeUrl,
      subscribe,
      unsubscribe: [],
      initialVersions: new Map(),
      responseNonce: "",
    }),
  );
const CLUSTERS = subscription(TYPE_URL.cluster, ["*", ...HELD]);

/** Opens a stream as Envoy does and sends its first message. */
function call(socket: string, path: string, frame: Buffer): [ClientHttp2Session, ClientHttp2Stream] {
  const session = connect("http://vmmesh.local", { createConnection: () => createConnection(socket) });
  const stream = session.request({
    ":method": "POST",
    ":path": path,
    "content-type": "application/grpc",
    te: "trailers",
  });
  stream.on("error", () => undefined);
  stream.write(frame);
  return [session, stream];
}

/** Until it is gone, without a word to the other side. */
async function cut(connection: ClientHttp2Session | Socket): Promise<void> {
  const closed = new Promise<void>((resolve) => connection.once("close", () => resolve()));
  connection.destroy();
  await closed;
}

/** A stream that is cut when the first bytes of its answer have come. */
async function comeAndGo(socket: string, path: string, frame: Buffer): Promise<void> {
  const [session, stream] = call(socket, path, frame);
  await new Promise<void>((resolve, reject) => {
    session.once("error", reject);
    stream.once("data", () => resolve());
  });
  await cut(session);
}

async function storm(round: () => Promise<void>, settled: () => Promise<void>): Promise<void> {
  for (let at = 0; at < WARM_UP; at += 1) await round();
  await settled();
  await expectNoGrowth(MAX_GROWTH, async () => {
    for (let at = 0; at < ROUNDS; at += 1) await round();
    await settled();
  });
}

/** A relay between a fake istiod with one cluster of 64 KiB and the socket that Envoy dials, and what is called on that else. */
async function startRelay(alsoServed: ConstructorParameters<typeof AdsRelay>[0]["alsoServed"] = {}) {
  await using stack = new AsyncDisposableStack();
  const folder = await mkdtemp(join(tmpdir(), "vmmesh-storm-"));
  stack.defer(() => rm(folder, { recursive: true }));
  const socket = join(folder, "xds.sock");
  const istiod = stack.use(
    await startIstiod({
      [ADS]: (stream) =>
        stream.onMessage((message) => {
          const { typeUrl, responseNonce } = readDeltaRequest(message);
          if (typeUrl !== TYPE_URL.cluster || responseNonce !== "") return;
          const resources = [{ name: "a", version: "", any: writeAny(typeUrl, Buffer.alloc(64 * 1024)) }];
          stream.send(
            writeDeltaResponse({ systemVersion: "1", typeUrl, nonce: "1", removed: [], resources }),
          );
        }),
    }),
  );
  const relay = new AdsRelay({
    host,
    alsoServed,
    listen: (onConnection) => host.net.listenUnix(socket, { mode: 0o600 }, onConnection),
    upstreams: async () => [
      {
        address: "127.0.0.1",
        port: istiod.port,
        serverName: SERVER_NAME,
        rootCert: istiod.authority.rootPem,
        metadata: {},
      },
    ],
    onEvent: () => undefined,
  });
  const stop = new AbortController();
  const listening = Promise.withResolvers<void>();
  const running = relay.run(stop.signal, listening.resolve);
  stack.defer(async () => {
    stop.abort();
    await running;
  });
  await listening.promise;
  const all = stack.move();
  return { socket, relay, [Symbol.asyncDispose]: () => all.disposeAsync() };
}

test(
  "1,000 connections of Envoys that come and are cut leave no memory and no descriptor behind",
  async () => {
    await using running = await startRelay();
    await storm(
      () => comeAndGo(running.socket, ADS, CLUSTERS),
      () => expect.poll(() => running.relay.status().envoys).toBe(0),
    );
  },
  TIMEOUT_MS,
);

test(
  "1,000 streams of the access log that come and are cut leave no memory and no descriptor behind",
  async () => {
    const connection = [0x1a, 2, 0x0a, 0];
    const frame = frameOf(Buffer.from([0x0a, 9, 0x12, 7, ...Buffer.from("inbound"), ...connection]));
    let [arrived, open] = [Promise.withResolvers<void>(), 0];
    await using running = await startRelay({
      [ACCESS_LOG_SERVICE]: (served) => {
        open += 1;
        served.onClose(() => {
          open -= 1;
        });
        countAccessLog(served, { request: () => undefined, connection: () => arrived.resolve() });
      },
    });
    await storm(
      async () => {
        arrived = Promise.withResolvers();
        const [session] = call(running.socket, ACCESS_LOG_SERVICE, frame);
        await arrived.promise;
        await cut(session);
      },
      () => expect.poll(() => open).toBe(0),
    );
  },
  TIMEOUT_MS,
);

test(
  "1,000 streams of secrets that come and are cut leave no memory and no descriptor behind",
  async () => {
    const folder = await mkdtemp(join(tmpdir(), "vmmesh-storm-"));
    const socket = join(folder, "sds.sock");
    const svids = new Latest<Svid>();
    const text = "x".repeat(4096);
    const dates = { notBefore: new Date(0), notAfter: new Date(1) };
    svids.set({ key: text, chain: text, roots: text, serial: "1", spiffe: "spiffe://a/ns/b/sa/c", ...dates });
    const stop = new AbortController();
    const listening = Promise.withResolvers<void>();
    const running = serveSds(
      {
        listen: (onConnection) => host.net.listenUnix(socket, { mode: 0o600 }, onConnection),
        onListening: listening.resolve,
        onRejected: () => undefined,
      },
      svids,
      stop.signal,
    );
    await listening.promise;
    const frame = subscription(TYPE_URL.secret, ["default", "ROOTCA"]);
    await storm(
      () => comeAndGo(socket, SDS, frame),
      async () => undefined,
    );
    stop.abort();
    await running;
    await rm(folder, { recursive: true });
  },
  TIMEOUT_MS,
);

test(
  "1,000 TCP connections to the DNS server that are cut leave no memory and no descriptor behind",
  async () => {
    // UDP and TCP share it, so it lies below those that the kernel hands out by itself.
    const port = 20_000 + (process.pid % 10_000);
    const files = { ...host.files, readText: async () => "" };
    const upstreams = new Upstreams({ host: { ...host, files }, resolvConf: "/etc/resolv.conf" });
    const stop = new AbortController();
    const listening = Promise.withResolvers<void>();
    const running = serveDns(
      { host, port, table: new Latest(), upstreams, onListening: listening.resolve },
      stop.signal,
    );
    await listening.promise;
    const query = dnsFrame(writeQuery(1, LEASE_NAME, TYPE.A));
    await storm(
      async () => {
        const socket = createConnection(port, "127.0.0.1");
        await new Promise<void>((resolve, reject) => {
          socket.once("error", reject).once("data", () => resolve());
          socket.write(query);
        });
        await cut(socket);
      },
      async () => undefined,
    );
    stop.abort();
    await running;
  },
  TIMEOUT_MS,
);
