import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { connect } from "node:http2";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { Client, type ClientDuplexStream, credentials, status } from "@grpc/grpc-js";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { encode, toStruct } from "../../test/controlplane/protos.ts";
import { type FakeIstiod, SERVER_NAME, startIstiod } from "../../test/fakes/istiod.ts";
import type { GrpcTarget, ServedStream } from "../platform/grpc.ts";
import { linuxHost } from "../platform/linux.ts";
import {
  type DeltaRequest,
  type DeltaResponse,
  readDeltaRequest,
  readDeltaResponse,
  TYPE_URL,
  writeDeltaRequest,
  writeDeltaResponse,
} from "../proto/discovery.ts";
import { BinaryWriter, put, readAny, writeAny } from "../proto/wire.ts";
import { LastGoodFile } from "./lastGood.ts";
import { AdsRelay, type RelayEvent } from "./relay.ts";

const ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const NODE = Buffer.from("a node, opaque to the relay");

const nodeWith = (metadata: Record<string, unknown>): Uint8Array =>
  encode("envoy.config.core.v3.Node", { id: "sidecar~10.0.0.9~vm.default~x", metadata: toStruct(metadata) });
const REDIRECT = nodeWith({ NAME: "vm", INTERCEPTION_MODE: "REDIRECT" });
const REDIRECT_TURNED = nodeWith({ INTERCEPTION_MODE: "REDIRECT", NAME: "vm" });
const TPROXY = nodeWith({ NAME: "vm", INTERCEPTION_MODE: "TPROXY" });

/** Values in the order of their coming; `next` waits. */
class Inbox<T> {
  readonly #values: T[] = [];
  readonly #waiting: ((value: T) => void)[] = [];
  put(value: T): void {
    const waiter = this.#waiting.shift();
    if (waiter === undefined) this.#values.push(value);
    else waiter(value);
  }
  next(): Promise<T> {
    const value = this.#values.shift();
    return value === undefined
      ? new Promise((resolve) => this.#waiting.push(resolve))
      : Promise.resolve(value);
  }
  get size(): number {
    return this.#values.length;
  }
}

function request(typeUrl: string, more: Partial<DeltaRequest> = {}): DeltaRequest {
  return { typeUrl, subscribe: [], unsubscribe: [], initialVersions: new Map(), responseNonce: "", ...more };
}

function response(
  typeUrl: string,
  nonce: string,
  names: readonly string[],
  content: Uint8Array = Buffer.from("x"),
): Uint8Array {
  return writeDeltaResponse({
    typeUrl,
    nonce,
    systemVersion: nonce,
    removed: [],
    resources: names.map((name) => ({ name, version: "", any: writeAny(typeUrl, content) })),
  });
}

class FakeEnvoy {
  readonly heard = new Inbox<DeltaResponse>();
  readonly ended = new Inbox<{ code: number; details: string }>();
  readonly call: ClientDuplexStream<Uint8Array, Buffer>;
  readonly #client: Client;
  constructor(socket: string) {
    this.#client = new Client(`unix:${socket}`, credentials.createInsecure(), {
      "grpc.max_receive_message_length": -1,
      "grpc.use_local_subchannel_pool": 1,
    });
    this.call = this.#client.makeBidiStreamRequest(
      ADS,
      (it: Uint8Array) => Buffer.from(it),
      (it: Buffer) => it,
    );
    this.call.on("error", () => undefined);
    this.call.on("status", (it) => this.ended.put(it));
    this.call.on("data", (it: Buffer) => this.heard.put(readDeltaResponse(it)));
  }
  send(it: DeltaRequest): void {
    this.call.write(writeDeltaRequest(it));
  }
  close(): void {
    this.call.cancel();
    this.#client.close();
  }
}

/** Sends one request and reads nothing. By HTTP/2 alone: grpc-js reads on whether or not anybody listens. */
function deafEnvoy(it: DeltaRequest): { close(): void } {
  const session = connect("http://vmmesh.local", { createConnection: () => createConnection(socket) });
  session.on("error", () => undefined);
  const stream = session.request({
    ":method": "POST",
    ":path": ADS,
    "content-type": "application/grpc",
    te: "trailers",
  });
  stream.on("error", () => undefined).pause();
  const message = writeDeltaRequest(it);
  const frame = Buffer.alloc(5 + message.length);
  frame.writeUInt32BE(message.length, 1);
  frame.set(message, 5);
  stream.write(frame);
  return { close: () => session.destroy() };
}

/** Pushes until nothing moves any more: the relay has stopped reading because Envoy has. */
async function sendUntilBlocked(stream: ServedStream): Promise<void> {
  let drained = Promise.withResolvers<boolean>();
  stream.onDrain(() => drained.resolve(true));
  for (let count = 0; count < 1000; count += 1) {
    if (stream.send(response(TYPE_URL.cluster, String(count), ["a"], Buffer.alloc(256 * 1024, count))))
      continue;
    const moves = await Promise.race([drained.promise, setTimeout(500, false)]);
    if (!moves) return;
    drained = Promise.withResolvers<boolean>();
  }
  throw new Error("the relay takes whatever comes, though Envoy does not read");
}

let folder: string;
let socket: string;
let istiod: FakeIstiod;
let streams: Inbox<ServedStream>;
let asked: Inbox<DeltaRequest>;
let events: Inbox<RelayEvent>;
let relay: AdsRelay;
let stop: AbortController;
let running: Promise<void>;
const envoys: FakeEnvoy[] = [];
let names: Inbox<readonly string[]>;
let first: readonly GrpcTarget[];
/** No istiod answers, and who pauses, pauses for an hour. */
let away: boolean;
/** How much faster the relay's time runs. */
let haste: number;

function envoy(): FakeEnvoy {
  const it = new FakeEnvoy(socket);
  envoys.push(it);
  return it;
}

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "vmmesh-relay-"));
  socket = join(folder, "xds.sock");
  [streams, asked, events, names, first] = [new Inbox(), new Inbox(), new Inbox(), new Inbox(), []];
  [away, haste] = [false, 1];
  istiod = await startIstiod({
    [ADS]: (stream) => {
      streams.put(stream);
      stream.onMessage((message) => asked.put(readDeltaRequest(message)));
    },
  });
  const host = linuxHost();
  relay = new AdsRelay({
    host: {
      ...host,
      clock: {
        ...host.clock,
        monotonicMs: () => host.clock.monotonicMs() * haste,
        sleep: (ms, signal) => host.clock.sleep(away ? 3_600_000 : ms / haste, signal),
      },
    },
    listen: (onConnection) => host.net.listenUnix(socket, { mode: 0o600 }, onConnection),
    upstreams: async () => [
      ...first,
      {
        address: "127.0.0.1",
        port: away ? 1 : istiod.port,
        serverName: SERVER_NAME,
        rootCert: istiod.authority.rootPem,
        metadata: { clusterid: "Kubernetes" },
      },
    ],
    inboundPorts: [],
    onNameTable: async (table) => names.put([...table].map(([host]) => host)),
    onEvent: (event) => events.put(event),
  });
  stop = new AbortController();
  await new Promise<void>((resolve) => {
    running = relay.run(stop.signal, resolve);
  });
});

afterEach(async () => {
  for (const it of envoys.splice(0)) it.close();
  stop.abort();
  await running;
  await istiod[Symbol.asyncDispose]();
  await rm(folder, { recursive: true });
});

async function event(kind: RelayEvent["kind"]): Promise<RelayEvent> {
  for (;;) {
    const it = await events.next();
    if (it.kind === kind) return it;
  }
}

test("what an Envoy says that it lacks is taken out for it, and said once", async () => {
  const extension = new BinaryWriter();
  put(extension, 6, "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy");
  const node = new BinaryWriter();
  put(node, 9, extension.finish());
  const filter = new BinaryWriter();
  put(filter, 2, writeAny("type.googleapis.com/stats.PluginConfig", Buffer.from("x")));
  const cluster = new BinaryWriter();
  put(cluster, 1, "a");
  put(cluster, 40, filter.finish());

  const one = envoy();
  one.send(request(TYPE_URL.cluster, { node: Buffer.from(node.finish()) }));
  const stream = await streams.next();
  stream.send(response(TYPE_URL.cluster, "1", ["a"], cluster.finish()));
  const [got] = (await one.heard.next()).resources;
  expect(Buffer.from(readAny(got?.any ?? Buffer.of()).value)).toEqual(Buffer.from("\x0a\x01a"));
  expect(await event("stripped")).toEqual({ kind: "stripped", names: ["istio.stats"] });
  stream.send(response(TYPE_URL.cluster, "2", ["b"], cluster.finish()));
  await one.heard.next();
  one.close();
  await event("envoy-gone");
  expect(events.size).toBe(0);
});

describe("towards istiod", () => {
  test("the node goes unchanged on the first request; names and health follow the first request for listeners", async () => {
    relay.setHealth({ healthy: false, message: "GET / answered 503" });
    const one = envoy();
    one.send(request(TYPE_URL.cluster, { node: NODE }));
    expect(await asked.next()).toEqual(request(TYPE_URL.cluster, { node: NODE }));
    one.send(request(TYPE_URL.listener));
    expect(await asked.next()).toEqual(request(TYPE_URL.listener));
    expect(await asked.next()).toEqual(request(TYPE_URL.nameTable));
    const error = { code: status.INTERNAL, message: "GET / answered 503" };
    expect(await asked.next()).toEqual(request(TYPE_URL.health, { error }));
    relay.setHealth({ healthy: true });
    expect(await asked.next()).toEqual(request(TYPE_URL.health));
  });

  test("a cut stream is opened again with the node, what is held, names and health; Envoy notices nothing", async () => {
    relay.setHealth({ healthy: true });
    const one = envoy();
    one.send(request(TYPE_URL.listener, { node: NODE }));
    const stream = await streams.next();
    stream.send(response(TYPE_URL.listener, "1", ["virtualInbound"]));
    await one.heard.next();
    for (const typeUrl of [TYPE_URL.listener, TYPE_URL.nameTable, TYPE_URL.health])
      expect((await asked.next()).typeUrl).toBe(typeUrl);
    istiod.drop();
    await streams.next();
    expect(await asked.next()).toEqual(
      request(TYPE_URL.listener, { node: NODE, initialVersions: new Map([["virtualInbound", ""]]) }),
    );
    expect((await asked.next()).typeUrl).toBe(TYPE_URL.nameTable);
    expect(await asked.next()).toEqual(request(TYPE_URL.health));
    expect(await event("disconnected")).toMatchObject({ address: `127.0.0.1:${istiod.port}` });
    expect([one.ended.size, one.heard.size]).toEqual([0, 0]);
  });

  test("an upstream that does not answer is passed over for the next", async () => {
    first = [
      {
        address: "127.0.0.1",
        port: 1,
        serverName: SERVER_NAME,
        rootCert: istiod.authority.rootPem,
        metadata: {},
      },
    ];
    envoy().send(request(TYPE_URL.cluster, { node: NODE }));
    const stream = await streams.next();
    stream.send(response(TYPE_URL.cluster, "1", ["a"]));
    expect(await event("connected")).toMatchObject({ address: `127.0.0.1:${istiod.port}` });
  });

  test("with a new credential the next attempt is at once, however long it would have been put off", async () => {
    away = true;
    envoy().send(request(TYPE_URL.cluster, { node: NODE }));
    await event("unreachable");
    away = false;
    relay.retryNow();
    (await streams.next()).send(response(TYPE_URL.cluster, "1", ["a"]));
    expect(await event("connected")).toMatchObject({ address: `127.0.0.1:${istiod.port}` });
  });
});

describe("what istiod sends", () => {
  test("the name table is taken out, acknowledged and not passed on", async () => {
    const one = envoy();
    one.send(request(TYPE_URL.listener, { node: NODE }));
    const stream = await streams.next();
    const entry = new BinaryWriter();
    put(entry, 1, "details.default.svc.cluster.local");
    const table = new BinaryWriter();
    put(table, 1, entry.finish());
    stream.send(response(TYPE_URL.nameTable, "n1", ["table"], table.finish()));
    expect(await names.next()).toEqual(["details.default.svc.cluster.local"]);
    let ack = await asked.next();
    while (ack.responseNonce === "") ack = await asked.next();
    expect(ack).toEqual(request(TYPE_URL.nameTable, { responseNonce: "n1" }));
    stream.send(response(TYPE_URL.listener, "l1", ["virtualInbound"]));
    expect((await one.heard.next()).typeUrl).toBe(TYPE_URL.listener);
  });

  // A throw in a stream's listener would end the whole agent, DNS and certificates with it.
  test("a name table that cannot be read is refused in words, and the stream goes on", async () => {
    const one = envoy();
    one.send(request(TYPE_URL.listener, { node: NODE }));
    const stream = await streams.next();
    stream.send(response(TYPE_URL.nameTable, "n1", ["table"], Buffer.from([0x0a, 0x7f])));
    let nack = await asked.next();
    while (nack.responseNonce === "") nack = await asked.next();
    expect(nack).toMatchObject({ responseNonce: "n1", error: { code: status.INTERNAL } });
    stream.send(response(TYPE_URL.listener, "l1", ["virtualInbound"]));
    expect((await one.heard.next()).resources.map(({ name }) => name)).toEqual(["virtualInbound"]);
  });

  test("bytes that are no response end the stream to istiod, and it is opened again", async () => {
    const one = envoy();
    one.send(request(TYPE_URL.cluster, { node: NODE }));
    (await streams.next()).send(Buffer.from([0x12, 0x7f, 0x01]));
    (await streams.next()).send(response(TYPE_URL.cluster, "1", ["a"]));
    expect((await one.heard.next()).resources.map(({ name }) => name)).toEqual(["a"]);
  });

  test("types that are not Envoy's are left out", async () => {
    const one = envoy();
    one.send(request(TYPE_URL.cluster, { node: NODE }));
    const stream = await streams.next();
    stream.send(response("type.googleapis.com/istio.workload.Workload", "1", ["w"]));
    stream.send(response(TYPE_URL.cluster, "2", ["a"]));
    expect((await one.heard.next()).typeUrl).toBe(TYPE_URL.cluster);
  });
});

describe("when Envoys have different nodes", () => {
  const namesIn = async (it: FakeEnvoy): Promise<string[]> =>
    (await it.heard.next()).resources.map(({ name }) => name);
  const listeners = (node: Uint8Array): DeltaRequest => request(TYPE_URL.listener, { node });

  /** The next first request for listeners on a new stream. */
  async function opening(): Promise<DeltaRequest> {
    for (;;) {
      const it = await asked.next();
      if (it.typeUrl === TYPE_URL.listener && it.node !== undefined) return it;
    }
  }

  /** An Envoy of REDIRECT that has its listener. */
  async function served(): Promise<{ one: FakeEnvoy; stream: ServedStream }> {
    const one = envoy();
    one.send(listeners(REDIRECT));
    const stream = await streams.next();
    expect((await opening()).node).toEqual(Buffer.from(REDIRECT));
    stream.send(response(TYPE_URL.listener, "1", ["of REDIRECT"]));
    expect(await namesIn(one)).toEqual(["of REDIRECT"]);
    return { one, stream };
  }

  test("after one of another mode istiod is asked anew in the next one's name, and that one gets nothing of the former", async () => {
    const { one } = await served();
    one.close();
    await event("envoy-gone");
    const next = envoy();
    next.send(listeners(TPROXY));
    const stream = await streams.next();
    expect(await opening()).toEqual(listeners(Buffer.from(TPROXY)));
    stream.send(response(TYPE_URL.listener, "1", ["of TPROXY"]));
    expect(await namesIn(next)).toEqual(["of TPROXY"]);
    expect(next.heard.size).toBe(0);
  });

  test("both at once: the newest is istiod's, the other keeps what it has, and is istiod's again when it is left alone", async () => {
    const { one } = await served();
    const next = envoy();
    next.send(listeners(TPROXY));
    const second = await streams.next();
    expect((await opening()).node).toEqual(Buffer.from(TPROXY));
    second.send(response(TYPE_URL.listener, "1", ["of TPROXY"]));
    expect(await namesIn(next)).toEqual(["of TPROXY"]);
    expect([one.heard.size, one.ended.size]).toEqual([0, 0]);

    haste = 100;
    next.close();
    const third = await streams.next();
    expect(await opening()).toEqual({
      ...listeners(Buffer.from(REDIRECT)),
      initialVersions: new Map([["of REDIRECT", ""]]),
    });
    third.send(response(TYPE_URL.listener, "1", ["new of REDIRECT"]));
    expect(await namesIn(one)).toEqual(["new of REDIRECT"]);
  });

  test("two of one node, whatever the order of its metadata: one stream to istiod serves both", async () => {
    const { one, stream } = await served();
    const next = envoy();
    next.send(listeners(REDIRECT_TURNED));
    expect(await namesIn(next)).toEqual(["of REDIRECT"]);
    stream.send(response(TYPE_URL.listener, "2", ["more"]));
    expect([await namesIn(one), await namesIn(next)]).toEqual([["more"], ["more"]]);
    expect([istiod.accepted(), relay.status().reconnects]).toEqual([1, 0]);
  });

  test("a change within a second of the opening waits for no backoff and is no failure", async () => {
    envoy().send(listeners(REDIRECT));
    await streams.next();
    await opening();
    envoy().send(listeners(TPROXY));
    await streams.next();
    expect((await opening()).node).toEqual(Buffer.from(TPROXY));
    const kinds: string[] = [];
    while (events.size > 0) kinds.push((await events.next()).kind);
    expect(kinds).toContain("node-changed");
    expect(kinds).not.toContain("unreachable");
  });
});

describe("towards Envoy", () => {
  test("a request that cannot be read ends that stream and no other", async () => {
    const [bad, good] = [envoy(), envoy()];
    bad.call.write(Buffer.from([0x0a, 0x7f]));
    expect((await bad.ended.next()).details).toContain("not a delta discovery request");
    good.send(request(TYPE_URL.cluster, { node: NODE }));
    (await streams.next()).send(response(TYPE_URL.cluster, "1", ["a"]));
    expect((await good.heard.next()).resources).toHaveLength(1);
  });

  test("an Envoy that stopped reading and then died does not hold up the next one", async () => {
    const slow = deafEnvoy(request(TYPE_URL.cluster, { node: NODE }));
    const stream = await streams.next();
    await sendUntilBlocked(stream);
    slow.close();
    await event("envoy-gone");
    const next = envoy();
    next.send(request(TYPE_URL.listener, { node: NODE }));
    stream.send(response(TYPE_URL.listener, "l1", ["virtualInbound"]));
    expect((await next.heard.next()).typeUrl).toBe(TYPE_URL.listener);
  });

  test("a socket that speaks something else is closed without harm", async () => {
    const raw = createConnection(socket);
    raw.on("error", () => undefined).resume();
    raw.write("GET / HTTP/1.1\r\n\r\n");
    await new Promise((resolve) => raw.once("close", resolve));
    envoy().send(request(TYPE_URL.cluster, { node: NODE }));
    expect((await asked.next()).typeUrl).toBe(TYPE_URL.cluster);
  });
});

describe("a start without a control plane", () => {
  const OWNER = { spiffe: "spiffe://a", node: "n", cluster: "c", discovery: "d:1" };
  const host = linuxHost();

  /** Another relay on the same file, as after a reboot; `reaches` says whether istiod is there. */
  async function another(reaches: () => boolean, notAfter: Date) {
    const stopIt = new AbortController();
    const heard = new Inbox<RelayEvent>();
    const tables = new Inbox<readonly string[]>();
    const at = join(folder, "another.sock");
    const second = new AdsRelay({
      host,
      listen: (onConnection) => host.net.listenUnix(at, { mode: 0o600 }, onConnection),
      upstreams: async () => [
        {
          address: "127.0.0.1",
          port: reaches() ? istiod.port : 1,
          serverName: SERVER_NAME,
          rootCert: istiod.authority.rootPem,
          metadata: {},
        },
      ],
      onNameTable: async (table) => tables.put([...table].map(([host]) => host)),
      lastGood: new LastGoodFile({
        host,
        path: join(folder, "last-good"),
        owner: OWNER,
        notAfter: () => notAfter,
      }),
      onEvent: (it) => heard.put(it),
    });
    const ended = Promise.withResolvers<void>();
    await new Promise<void>((resolve) => {
      void second.run(stopIt.signal, resolve).then(ended.resolve, ended.reject);
    });
    const client = new FakeEnvoy(at);
    envoys.push(client);
    return {
      client,
      status: () => second.status(),
      tables,
      async event(kind: RelayEvent["kind"]): Promise<RelayEvent> {
        for (;;) {
          const it = await heard.next();
          if (it.kind === kind) return it;
        }
      },
      async stop(): Promise<void> {
        stopIt.abort();
        await ended.promise;
        client.close();
      },
    };
  }

  const nameTable = (): Uint8Array => {
    const info = new BinaryWriter();
    put(info, 1, "10.0.0.1");
    const entry = new BinaryWriter();
    put(entry, 1, "reviews.default");
    put(entry, 2, info.finish());
    const table = new BinaryWriter();
    put(table, 1, entry.finish());
    return response(TYPE_URL.nameTable, "n", [""], table.finish());
  };

  /** A relay whose Envoy has accepted one cluster and one listener. */
  async function accepted(notAfter: Date) {
    const it = await another(() => true, notAfter);
    for (const typeUrl of [TYPE_URL.cluster, TYPE_URL.listener])
      it.client.send(request(typeUrl, { node: NODE }));
    const stream = await streams.next();
    stream.send(response(TYPE_URL.cluster, "1", ["a"]));
    stream.send(response(TYPE_URL.listener, "2", ["l"]));
    stream.send(nameTable());
    for (const typeUrl of [TYPE_URL.cluster, TYPE_URL.listener])
      it.client.send(request(typeUrl, { responseNonce: (await it.client.heard.next()).nonce }));
    await it.tables.next();
    await expect
      .poll(() => it.status().types.filter(({ acked }) => acked !== undefined).length)
      .toBeGreaterThanOrEqual(2);
    return it;
  }

  async function saved(notAfter: Date): Promise<void> {
    await (await accepted(notAfter)).stop();
  }

  test("Envoy and DNS get what was accepted last, it is said, and istiod's same answer brings no push", async () => {
    await saved(new Date(Date.now() + 60_000));
    let up = false;
    const it = await another(() => up, new Date(Date.now() + 60_000));
    for (const typeUrl of [TYPE_URL.cluster, TYPE_URL.listener])
      it.client.send(request(typeUrl, { node: NODE }));
    const got = [await it.client.heard.next(), await it.client.heard.next()];
    expect(got.flatMap(({ resources }) => resources.map(({ name }) => name)).sort()).toEqual(["a", "l"]);
    expect(await it.tables.next()).toEqual(["reviews.default"]);
    expect(await it.event("restored")).toMatchObject({ savedAt: it.status().staleSince });
    for (const { typeUrl, nonce } of got) it.client.send(request(typeUrl, { responseNonce: nonce }));

    up = true;
    const stream = await streams.next();
    stream.send(response(TYPE_URL.cluster, "8", ["a"]));
    stream.send(response(TYPE_URL.listener, "9", ["l"]));
    await it.event("fresh");
    expect([it.status().staleSince, it.client.heard.size]).toEqual([undefined, 0]);
    await it.stop();
  });

  test("what ends with its certificate while it is served is served to no Envoy after that", async () => {
    await saved(new Date(Date.now() + 4_000));
    const it = await another(() => false, new Date(0));
    it.client.send(request(TYPE_URL.cluster, { node: NODE }));
    await it.client.heard.next();
    await it.event("last-good-ended");
    expect(it.status().staleSince).toBeUndefined();
    const late = new FakeEnvoy(join(folder, "another.sock"));
    envoys.push(late);
    late.send(request(TYPE_URL.cluster, { node: NODE }));
    await it.event("envoy-connected");
    expect(it.status().types.map(({ resources }) => resources)).toEqual(it.status().types.map(() => 0));
    await it.stop();
  });

  test("what could not be written is told, and when it could", async () => {
    const it = await accepted(new Date(Date.now() + 60_000));
    // Nothing can take a folder's place.
    await mkdir(join(folder, "last-good"));
    await it.event("last-good-failed");
    await rm(join(folder, "last-good"), { recursive: true });
    await it.stop();
    await it.event("last-good-saved");
    expect(await host.files.read(join(folder, "last-good"))).toBeDefined();
  });

  test("an Envoy of another mode gets nothing of it; it stays for one of its own mode", async () => {
    await saved(new Date(Date.now() + 60_000));
    const it = await another(() => false, new Date(Date.now() + 60_000));
    it.client.send(request(TYPE_URL.cluster, { node: TPROXY }));
    expect(await it.event("last-good-failed")).toMatchObject({
      error: { message: expect.stringContaining("its mode is REDIRECT, Envoy's is TPROXY") },
    });
    const back = new FakeEnvoy(join(folder, "another.sock"));
    envoys.push(back);
    back.send(request(TYPE_URL.cluster, { node: REDIRECT }));
    expect((await back.heard.next()).resources.map(({ name }) => name)).toEqual(["a"]);
    expect(it.client.heard.size).toBe(0);
    await it.stop();
  });

  test("a damaged file is told once, and Envoy waits for istiod", async () => {
    await saved(new Date(Date.now() + 60_000));
    await host.files.writeAtomic(join(folder, "last-good"), "damaged", { mode: 0o600 });
    const it = await another(() => false, new Date(Date.now() + 60_000));
    it.client.send(request(TYPE_URL.cluster, { node: NODE }));
    expect(await it.event("last-good-failed")).toMatchObject({ error: { code: "STATE_UNREADABLE" } });
    expect([await host.files.read(join(folder, "last-good")), it.client.heard.size]).toEqual([undefined, 0]);
    await it.stop();
  });
});
