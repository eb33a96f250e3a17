import { mkdtemp, rm } from "node:fs/promises";
import { connect } from "node:http2";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { linuxHost } from "../../agent/platform/linux.ts";
import {
  readDeltaRequest,
  TYPE_URL,
  writeDeltaRequest,
  writeDeltaResponse,
} from "../../agent/proto/discovery.ts";
import { writeAny } from "../../agent/proto/wire.ts";
import { AdsRelay } from "../../agent/xds/relay.ts";
import { SERVER_NAME, startIstiod } from "../fakes/istiod.ts";
import { expectNoGrowth } from "./growth.ts";

const ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const ROUNDS = 2000;
const WARM_UP = 300;
const MIB = 1024 * 1024;
/** What each Envoy asks for: a leaked stream costs its names, 2,000 of them are far over the bound. */
const HELD = Array.from({ length: 200 }, (_, at) => `outbound|80||s${at}.default`);
const MAX_GROWTH = { heap: 4 * MIB, descriptors: 4 };

/** A connection that asks for clusters, waits for the first bytes of the answer and is cut without a word. */
async function comeAndGo(socket: string, frame: Buffer): Promise<void> {
  const session = connect("http://vmmesh.local", { createConnection: () => createConnection(socket) });
  const stream = session.request({
    ":method": "POST",
    ":path": ADS,
    "content-type": "application/grpc",
    te: "trailers",
  });
  stream.on("error", () => undefined);
  stream.write(frame);
  await new Promise<void>((resolve, reject) => {
    session.once("error", reject);
    stream.once("data", () => resolve());
  });
  const closed = new Promise<void>((resolve) => session.once("close", () => resolve()));
  session.destroy();
  await closed;
}

test("2,000 connections of Envoys that come and are cut leave heap and descriptors as they were", async () => {
  const folder = await mkdtemp(join(tmpdir(), "vmmesh-storm-"));
  const socket = join(folder, "xds.sock");
  await using istiod = await startIstiod({
    [ADS]: (stream) =>
      stream.onMessage((message) => {
        const { typeUrl, responseNonce } = readDeltaRequest(message);
        if (typeUrl !== TYPE_URL.cluster || responseNonce !== "") return;
        const resources = [{ name: "a", version: "", any: writeAny(typeUrl, Buffer.alloc(64 * 1024)) }];
        stream.send(writeDeltaResponse({ systemVersion: "1", typeUrl, nonce: "1", removed: [], resources }));
      }),
  });
  const host = linuxHost();
  const relay = new AdsRelay({
    host,
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
  await listening.promise;
  const message = writeDeltaRequest({
    node: Buffer.from("node"),
    typeUrl: TYPE_URL.cluster,
    subscribe: ["*", ...HELD],
    unsubscribe: [],
    initialVersions: new Map(),
    responseNonce: "",
  });
  const frame = Buffer.alloc(5 + message.length);
  frame.writeUInt32BE(message.length, 1);
  frame.set(message, 5);

  for (let round = 0; round < WARM_UP; round += 1) await comeAndGo(socket, frame);
  await expect.poll(() => relay.status().envoys).toBe(0);
  await expectNoGrowth(MAX_GROWTH, async () => {
    for (let round = 0; round < ROUNDS; round += 1) await comeAndGo(socket, frame);
    await expect.poll(() => relay.status().envoys).toBe(0);
  });
  stop.abort();
  await running;
  await rm(folder, { recursive: true });
}, 60_000);
