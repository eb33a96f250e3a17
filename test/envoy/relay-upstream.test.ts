import { mkdtemp, rm } from "node:fs/promises";
import { connect } from "node:http2";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { istiodTarget } from "../../agent/daemon/workloadFiles.ts";
import type { GrpcTarget } from "../../agent/platform/grpc.ts";
import type { Clock } from "../../agent/platform/host.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { TYPE_URL, writeDeltaRequest } from "../../agent/proto/discovery.ts";
import { AdsRelay, type RelayEvent } from "../../agent/xds/relay.ts";
import { encode, toStruct } from "../controlplane/protos.ts";
import type { MeshService } from "../controlplane/resources.ts";
import { type ControlPlane, startControlPlane } from "../controlplane/server.ts";
import { expectNoGrowth } from "./growth.ts";

const ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const MIB = 1024 * 1024;
const GROUP = { name: "vm", namespace: "default", serviceAccount: "vm", labels: { app: "vm" } };

function services(count: number): MeshService[] {
  return Array.from({ length: count }, (_, at) => ({
    name: `s${at}`,
    namespace: "default",
    vip: `10.96.${at >> 8}.${at & 255}`,
    ports: [{ name: "http", port: 80, targetPort: 9080, protocol: "http" as const }],
    selector: { app: "vm" },
  }));
}

const startPlane = (address: string, port: number, count = 1): Promise<ControlPlane> =>
  startControlPlane({ address, port, services: services(count), groups: [GROUP] });

function targetOf(plane: ControlPlane, address: string): GrpcTarget {
  const token = plane.mintToken({ namespace: "default", serviceAccount: "vm" });
  return {
    address,
    port: plane.port,
    serverName: plane.serverName,
    rootCert: plane.rootCert,
    metadata: { clusterid: "Kubernetes", authorization: `Bearer ${token}` },
  };
}

/** Asks for clusters and listeners as an Envoy does, and reads what comes. */
function standIn(socket: string): { close(): void } {
  const session = connect("http://vmmesh.local", { createConnection: () => createConnection(socket) });
  session.on("error", () => undefined);
  const headers = { ":method": "POST", ":path": ADS, "content-type": "application/grpc", te: "trailers" };
  const stream = session.request(headers);
  stream.on("error", () => undefined).resume();
  const metadata = { NAMESPACE: "default", SERVICE_ACCOUNT: "vm", INSTANCE_IPS: "10.0.0.9" };
  const node = encode("envoy.config.core.v3.Node", {
    id: "sidecar~10.0.0.9~vm.default~default.svc.cluster.local",
    metadata: toStruct({ ...metadata, AUTO_REGISTER_GROUP: "vm" }),
  });
  const none = {
    subscribe: [],
    unsubscribe: [],
    initialVersions: new Map<string, string>(),
    responseNonce: "",
  };
  for (const typeUrl of [TYPE_URL.cluster, TYPE_URL.listener]) {
    const message = writeDeltaRequest({ ...none, node, typeUrl });
    const frame = Buffer.alloc(5 + message.length);
    frame.writeUInt32BE(message.length, 1);
    frame.set(message, 5);
    stream.write(frame);
  }
  return { close: () => session.destroy() };
}

/** A relay with one stand-in for an Envoy on it; both end with the scope. */
async function startRelay(
  upstreams: () => Promise<readonly GrpcTarget[]>,
  onEvent: (event: RelayEvent) => void = () => undefined,
  clock?: Clock,
): Promise<AsyncDisposable & { readonly relay: AdsRelay }> {
  const folder = await mkdtemp(join(tmpdir(), "vmmesh-upstream-"));
  const socket = join(folder, "xds.sock");
  const host = linuxHost();
  const relay = new AdsRelay({
    host: { random: host.random, clock: clock ?? host.clock },
    listen: (onConnection) => host.net.listenUnix(socket, { mode: 0o600 }, onConnection),
    upstreams,
    onNameTable: async () => undefined,
    onEvent,
  });
  relay.setHealth({ healthy: true });
  const stop = new AbortController();
  const listening = Promise.withResolvers<void>();
  const running = relay.run(stop.signal, listening.resolve);
  await listening.promise;
  const envoy = standIn(socket);
  return {
    relay,
    async [Symbol.asyncDispose]() {
      envoy.close();
      stop.abort();
      await running;
      await rm(folder, { recursive: true });
    },
  };
}

test("every address is tried in turn, and the name is asked anew at each attempt: a control plane that has moved is found", async () => {
  const first = await startPlane("127.0.0.1", 0);
  const second = await startPlane("127.0.0.3", first.port);
  const planes = new Map([
    ["127.0.0.1", first],
    ["127.0.0.3", second],
  ]);
  // On 127.0.0.2 nobody listens; at first it is all that the name has.
  const answers = [["127.0.0.2"], ["127.0.0.2", "127.0.0.1"]];
  const lookup = async (): Promise<string[]> => (answers.length > 1 ? answers.shift() : answers[0]) ?? [];
  const workload = {
    discoveryAddress: `${first.serverName}:${first.port}`,
    istiodAddresses: ["lb.example"],
    clusterId: "Kubernetes",
  };
  const events: RelayEvent[] = [];
  const upstreams = async (): Promise<readonly GrpcTarget[]> => {
    const { addresses } = await istiodTarget({ net: { lookup } }, workload, "");
    return addresses.map((address) => targetOf(planes.get(address) ?? first, address));
  };
  try {
    await using running = await startRelay(upstreams, (event) => events.push(event));
    const connected = () => running.relay.status().connectedTo;
    const soon = { timeout: 20_000, interval: 20 };
    await expect.poll(connected, soon).toBe(`127.0.0.1:${first.port}`);
    expect(events.find(({ kind }) => kind === "unreachable")).toMatchObject({
      error: { message: expect.stringContaining(`127.0.0.2:${first.port}`) },
    });
    await expect.poll(() => first.workloads().map(({ connected }) => connected)).toEqual([true]);

    answers.splice(0, answers.length, ["127.0.0.2", "127.0.0.3"]);
    await first.stop();
    await expect.poll(connected, soon).toBe(`127.0.0.3:${first.port}`);
    await expect.poll(() => second.workloads().map(({ connected }) => connected)).toEqual([true]);
  } finally {
    await second.stop();
  }
});

/** A stream that is not let go of was seen to cost 30 kB (with a listener left on the abort signal): 60 MB of 2,000. */
const RECONNECTS = { warmUp: 300, measured: 2000 };
const MAX_GROWTH = { heap: 6 * MIB, promises: 100, descriptors: 4 };
/** How much faster the relay's time runs, so that 2,000 reconnects do not wait for their backoff. */
const HASTE = 1000;

test("2,000 reconnects to the control plane leave heap and descriptors as they were", async () => {
  const plane = await startPlane("127.0.0.1", 0, 50);
  const target = targetOf(plane, "127.0.0.1");
  const { clock } = linuxHost();
  const hasty: Clock = {
    now: () => clock.now(),
    monotonicMs: () => clock.monotonicMs() * HASTE,
    sleep: (ms, signal) => clock.sleep(ms / HASTE, signal),
  };
  try {
    let left = 0;
    let done = Promise.withResolvers<void>();
    const onEvent = ({ kind }: RelayEvent): void => {
      if (kind === "connected" && left > 0) plane.dropConnections();
      if (kind !== "disconnected" || left === 0) return;
      left -= 1;
      if (left === 0) done.resolve();
    };
    await using running = await startRelay(async () => [target], onEvent, hasty);
    const { relay } = running;
    const connected = () => expect.poll(() => relay.status().connectedTo).not.toBe(undefined);
    const reconnect = async (count: number): Promise<void> => {
      await connected();
      done = Promise.withResolvers<void>();
      left = count;
      plane.dropConnections();
      await done.promise;
      await connected();
    };
    await reconnect(RECONNECTS.warmUp);
    await expectNoGrowth(MAX_GROWTH, () => reconnect(RECONNECTS.measured));
  } finally {
    await plane.stop();
  }
}, 300_000);
