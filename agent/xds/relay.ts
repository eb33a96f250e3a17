import type { Duplex } from "node:stream";
import { backoff, uniformFrom } from "../core/backoff.ts";
import { messageOf, VmmeshError } from "../core/errors.ts";
import { aborted } from "../core/signals.ts";
import { SECOND_MS } from "../core/time.ts";
import {
  type ByteStream,
  type GrpcTarget,
  openStream,
  type ServedStream,
  serveStreams,
} from "../platform/grpc.ts";
import type { Host, Listener } from "../platform/host.ts";
import {
  type DeltaRequest,
  type DeltaResponse,
  type Resource,
  readDeltaRequest,
  readDeltaResponse,
  readSotwRequest,
  type SotwRequest,
  TYPE_URL,
  writeDeltaRequest,
  writeDeltaResponse,
  writeSotwResponse,
} from "../proto/discovery.ts";
import { type NameInfo, readNameTable } from "../proto/istio.ts";
import { type RpcStatus, readAny } from "../proto/wire.ts";
import { DeltaCache, type Dialect, type Effect, type TypeStatus } from "./cache.ts";
import { needleOf, workloadAt } from "./endpoints.ts";
import type { LastGoodFile, ResourceSet } from "./lastGood.ts";
import { type EnvoyNode, readNode } from "./node.ts";
import type { Refusal } from "./refusals.ts";
import { extensionsOf } from "./strip.ts";

const ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService";
const DELTA_ADS = `${ADS}/DeltaAggregatedResources`;
/** What an Envoy calls whose bootstrap says `GRPC` instead of `DELTA_GRPC`. */
const SOTW_ADS = `${ADS}/StreamAggregatedResources`;

/** How long istiod's stream stays when the last Envoy has gone: a restart of Envoy must not deregister the machine. */
const LINGER_MS = 30 * SECOND_MS;

/**
 * How long after the first listeners istiod may take to send the clusters of a machine that it has just registered.
 * Seen with istiod 1.31 in 16 of 40 first connections: the inbound listener comes, its cluster `inbound|PORT||` never
 * does, and peers get 503; a second stream heals it every time.
 */
const INBOUND_GRACE_MS = 1.5 * SECOND_MS;
const MAX_REOPENED = 3;

/** How long a control plane that is silent, rather than away, is waited for before Envoy gets what is on disk. */
const SILENCE_MS = 3 * SECOND_MS;
/** How often it is looked whether Envoy has accepted something new, and how long the disk has peace after a write: a big mesh never stands still. */
const SAVE_MS = { look: 3 * SECOND_MS, peace: 30 * SECOND_MS };

/** gRPC INTERNAL: what Istio's agent puts into an unhealthy report. */
const INTERNAL = 13;

export type Health = { readonly healthy: true } | { readonly healthy: false; readonly message: string };

export type RelayEvent =
  | { readonly kind: "connected"; readonly address: string }
  | { readonly kind: "disconnected"; readonly address: string; readonly reason: string }
  | { readonly kind: "unreachable"; readonly error: VmmeshError; readonly retryInMs: number }
  | { readonly kind: "rejected"; readonly typeUrl: string; readonly reason: string }
  /** All that is refused at this moment: by Envoys, and the table of names by us; said when it changes. */
  | { readonly kind: "refusals"; readonly standing: readonly Refusal[] }
  /** What Envoys do not get because they lack it, at this moment; said when it changes. */
  | { readonly kind: "stripped"; readonly names: readonly string[] }
  /** Envoy is served what it accepted at `savedAt`, because no control plane answers. */
  | { readonly kind: "restored"; readonly savedAt: Date }
  /** The control plane has answered for everything that was restored. */
  | { readonly kind: "fresh" }
  /** What was restored is not served any more: the certificate that it belongs to has ended. */
  | { readonly kind: "last-good-ended" }
  /** What could not be read or written has been written. */
  | { readonly kind: "last-good-saved" }
  | { readonly kind: "last-good-failed"; readonly error: VmmeshError }
  | { readonly kind: "reopened"; readonly missing: readonly string[] }
  /** istiod's stream is opened anew, in the name of another node; what was restored for the former is not served on. */
  | { readonly kind: "node-changed" }
  | { readonly kind: "envoy-connected" | "envoy-gone"; readonly streams: number };

export interface RelayDeps {
  readonly host: Pick<Host, "clock" | "random">;
  /** Binds the socket that Envoy dials. */
  listen(onConnection: (socket: Duplex) => void): Promise<Listener>;
  /** Where to dial, with credentials of this moment; tried in order. */
  upstreams(): Promise<readonly GrpcTarget[]>;
  /**
   * Ask istiod for the mesh's names; each new table is handed over, one after the other. It is decoded as it is walked: the
   * error of a walk through what is no table is to be passed on, and istiod is told.
   */
  readonly onNameTable?: (table: Iterable<readonly [host: string, info: NameInfo]>) => Promise<void>;
  /** Ports that this workload serves: each has an inbound cluster once istiod has registered it and a Service selects it. */
  readonly inboundPorts?: readonly number[];
  /** What else Envoy may call on that socket: method path → what to do with a stream. */
  readonly alsoServed?: Readonly<Record<string, (stream: ServedStream) => void>>;
  /** Where what Envoy accepts is kept for a start without a control plane. */
  readonly lastGood?: LastGoodFile;
  onEvent(event: RelayEvent): void;
}

export interface RelayStatus {
  /** When the configuration was saved that Envoy is served, if it comes from disk. */
  readonly staleSince: Date | undefined;
  /** Address of the istiod that we are connected to. */
  readonly connectedTo: string | undefined;
  readonly since: Date | undefined;
  readonly lastError: string | undefined;
  readonly reconnects: number;
  /** Streams that Envoys hold to us. */
  readonly envoys: number;
  readonly types: readonly TypeStatus[];
}

interface Envoy {
  readonly stream: ServedStream;
  readonly dialect: Dialect;
  /** From its first request on. */
  place: Place | undefined;
}

/** A node and what istiod has sent for it. Until the first Envoy has come the node is not known. */
interface Place {
  node: EnvoyNode | undefined;
  readonly cache: DeltaCache;
}

/**
 * Envoy ⇄ agent ⇄ istiod: the effects around `DeltaCache`.
 *
 * istiod answers for one node: that of the Envoy that came last. One of another node that is still there keeps what it has,
 * in a cache of its own that hears nothing new, and is istiod's again when the later one has been gone for a while.
 */
export class AdsRelay {
  readonly #deps: RelayDeps;
  readonly #envoys = new Map<number, Envoy>();
  #place: Place = { node: undefined, cache: new DeltaCache() };
  /** Aborted: istiod answers for another place. */
  #replaced = new AbortController();
  #nextStream = 1;
  #upstream: ByteStream | undefined;
  #nodeSent = false;
  #listenersAsked = false;
  #health: Health | undefined;
  #wantsUpstream = Promise.withResolvers<void>();
  #withdrawn = false;
  /** Aborted: the pause before the next attempt is over. */
  #retry = new AbortController();
  #connectedTo: string | undefined;
  #since: Date | undefined;
  #lastError: string | undefined;
  #reconnects = 0;
  #reopened = 0;
  #stripped = "";
  /** Why the last table of names was not taken; the one before is in use. */
  #namesRefused: Refusal | undefined;
  /** What was said last, as text. */
  #refusals = "[]";
  #staleSince: Date | undefined;
  /** It could not be read or written, and has not been written since. */
  #lastGoodFailed = false;
  #names: Resource | undefined;
  #namesInUse: Promise<void> = Promise.resolve();
  #unreachable = Promise.withResolvers<void>();

  constructor(deps: RelayDeps) {
    this.#deps = deps;
  }

  /**
   * Serves Envoy and keeps the stream to istiod until `signal` aborts. A control plane that is away is no failure.
   * @param onListening the socket serves
   */
  async run(signal: AbortSignal, onListening: () => void = () => undefined): Promise<void> {
    const server = serveStreams({
      ...this.#deps.alsoServed,
      [DELTA_ADS]: (stream) =>
        this.#serve(stream, "delta", readDeltaRequest, (cache, id, it) => cache.fromEnvoy(id, it)),
      [SOTW_ADS]: (stream) =>
        this.#serve(stream, "sotw", readSotwRequest, (cache, id, it) => cache.fromSotwEnvoy(id, it)),
    });
    await using _listener = await this.#deps.listen((socket) => server.accept(socket));
    onListening();
    const { lastGood } = this.#deps;
    const kept =
      lastGood === undefined
        ? []
        : [this.#restoreWhereAlone(lastGood, signal), this.#keepLastGood(lastGood, signal)];
    try {
      await Promise.all([this.#keepUpstream(signal), ...kept]);
    } finally {
      this.#upstream?.close();
      server.close();
    }
  }

  /** Goes to istiod now, if it is there, and after every reconnect. */
  setHealth(health: Health): void {
    this.#health = health;
    if (this.#listenersAsked) this.#sendHealth();
  }

  /** Leaves the mesh: ends istiod's stream and opens no new one; Envoy keeps what it has. */
  withdraw(): void {
    this.#withdrawn = true;
    this.#upstream?.close();
  }

  /** Whoever waits for the next attempt waits no more: what istiod did not accept has changed. */
  retryNow(): void {
    this.#retry.abort();
  }

  /** Is `address` among the endpoints that istiod has told this machine of? */
  knowsEndpoint(address: string): boolean {
    return this.#place.cache.holds(TYPE_URL.endpoint, needleOf(address));
  }

  /** What istiod says of the workload at `address`, if it is an endpoint that this machine knows: see `workloadAt`. */
  workloadAt(address: string): string | undefined {
    for (const any of this.#place.cache.holding(TYPE_URL.endpoint, needleOf(address))) {
      const workload = workloadAt(any, address);
      if (workload !== undefined) return workload;
    }
    return undefined;
  }

  status(): RelayStatus {
    return {
      connectedTo: this.#connectedTo,
      since: this.#since,
      staleSince: this.#staleSince,
      lastError: this.#lastError,
      reconnects: this.#reconnects,
      envoys: this.#envoys.size,
      types: this.#place.cache.status(),
    };
  }

  async #restoreWhereAlone(lastGood: LastGoodFile, signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      const here = AbortSignal.any([signal, this.#replaced.signal]);
      const abort = aborted(here);
      await Promise.race([this.#wantsUpstream.promise, abort]);
      await this.#restoreIfAlone(lastGood, here);
      await abort;
    }
  }

  /** No control plane at the first question of a node's first Envoy: Envoy gets what it accepted last. */
  async #restoreIfAlone(lastGood: LastGoodFile, signal: AbortSignal): Promise<void> {
    const { clock } = this.#deps.host;
    const { cache, node } = this.#place;
    const abort = aborted(signal);
    await Promise.race([
      this.#unreachable.promise,
      clock.sleep(SILENCE_MS, signal).catch(() => undefined),
      abort,
    ]);
    if (signal.aborted || this.#connectedTo !== undefined) return;
    let found: Awaited<ReturnType<LastGoodFile["load"]>>;
    try {
      found = await lastGood.load();
    } catch (thrown) {
      this.#lastGoodFails(VmmeshError.from(thrown));
      return;
    }
    if (found === undefined || this.#connectedTo !== undefined || signal.aborted) return;
    if (found.mode !== node?.mode) {
      // It stays: the machine may go back to that mode before a control plane answers.
      this.#lastGoodFails(ofAnotherMode(found.mode, node?.mode));
      return;
    }
    this.#staleSince = found.savedAt;
    this.#deps.onEvent({ kind: "restored", savedAt: found.savedAt });
    const [names] = found.types.get(TYPE_URL.nameTable) ?? [];
    this.#carryOut(cache.restore(configurationOf(found.types)));
    if (names !== undefined) await this.#inTurn(() => this.#useNames(names));
    while (this.#staleSince !== undefined && !signal.aborted) {
      if (clock.now() >= found.notAfter) {
        cache.forgetRestored();
        this.#staleSince = undefined;
        this.#deps.onEvent({ kind: "last-good-ended" });
      }
      await clock.sleep(SECOND_MS, signal).catch(() => undefined);
    }
  }

  async #keepLastGood(lastGood: LastGoodFile, signal: AbortSignal): Promise<void> {
    let waitMs = SAVE_MS.look;
    while (!signal.aborted) {
      // Once more at the end: what was accepted just before a reboot is what the next start needs.
      await this.#deps.host.clock.sleep(waitMs, signal).catch(() => undefined);
      waitMs = SAVE_MS.look;
      const { cache, node } = this.#place;
      const { revision } = cache;
      if (lastGood.isSaved(revision)) continue;
      const types = cache.accepted();
      if (types === undefined || node === undefined) continue;
      waitMs = SAVE_MS.peace;
      const names = this.#names === undefined ? [] : [this.#names];
      try {
        await lastGood.save(new Map([...types, [TYPE_URL.nameTable, names]]), revision, node.mode);
        if (this.#lastGoodFailed) this.#deps.onEvent({ kind: "last-good-saved" });
        this.#lastGoodFailed = false;
      } catch (thrown) {
        this.#lastGoodFails(VmmeshError.from(thrown));
      }
    }
  }

  #lastGoodFails(error: VmmeshError): void {
    this.#lastGoodFailed = true;
    this.#deps.onEvent({ kind: "last-good-failed", error });
  }

  #serve<Request extends DeltaRequest | SotwRequest>(
    stream: ServedStream,
    dialect: Dialect,
    read: (message: Uint8Array) => Request,
    ask: (cache: DeltaCache, id: number, request: Request) => readonly Effect[],
  ): void {
    const id = this.#nextStream++;
    const envoy: Envoy = { stream, dialect, place: undefined };
    this.#envoys.set(id, envoy);
    this.#deps.onEvent({ kind: "envoy-connected", streams: this.#envoys.size });
    stream.onMessage((message) => {
      let request: Request;
      try {
        request = read(message);
      } catch (thrown) {
        stream.fail(`not a ${dialect} discovery request: ${messageOf(thrown)}`);
        return;
      }
      // The node is on the first request of a stream; an Envoy that says it again says the same.
      if (envoy.place === undefined) {
        if (request.node !== undefined) this.#isAt(readNode(request.node));
        envoy.place = this.#place;
        envoy.place.cache.envoyOpened(id, dialect);
        if (request.node !== undefined) {
          envoy.place.cache.envoyHas(id, extensionsOf(request.node));
          this.#wantsUpstream.resolve();
        }
      }
      if (request.error !== undefined) {
        this.#deps.onEvent({ kind: "rejected", typeUrl: request.typeUrl, reason: request.error.message });
      }
      this.#carryOut(ask(envoy.place.cache, id, request));
    });
    stream.onDrain(() => this.#upstream?.resume());
    stream.onClose(() => {
      this.#envoys.delete(id);
      this.#carryOut(envoy.place?.cache.envoyClosed(id) ?? []);
      // The pause may have been for this one's sake, and it will never drain.
      this.#upstream?.resume();
      this.#deps.onEvent({ kind: "envoy-gone", streams: this.#envoys.size });
    });
  }

  /** An Envoy of that node has come: is it the one that istiod answers for? */
  #isAt(node: EnvoyNode): void {
    const { node: former } = this.#place;
    if (former === undefined || former.key === node.key) {
      this.#place.node = node;
      return;
    }
    const known = [...this.#envoys.values()].find(({ place }) => place?.node?.key === node.key)?.place;
    const place = known ?? { node, cache: new DeltaCache() };
    place.node = node;
    this.#moveTo(place);
  }

  /** istiod's stream is for one node: another one needs another. */
  #moveTo(place: Place): void {
    // Not served on: nobody would look when its certificate ends.
    this.#place.cache.forgetRestored();
    this.#place.cache.upstreamClosed();
    this.#place = place;
    this.#staleSince = undefined;
    this.#reopened = 0;
    this.#unreachable = Promise.withResolvers();
    const replaced = this.#replaced;
    this.#replaced = new AbortController();
    replaced.abort();
    this.#deps.onEvent({ kind: "node-changed" });
    this.#retry.abort();
    this.#upstream?.close();
  }

  #carryOut(effects: readonly Effect[]): void {
    for (const effect of effects) {
      if (effect.to === "upstream") {
        this.#request(effect.request);
        continue;
      }
      const envoy = this.#envoys.get(effect.stream);
      if (envoy?.stream.send(WRITE[envoy.dialect](effect.response)) === false) this.#upstream?.pause();
    }
    if (this.#staleSince !== undefined && this.#connectedTo !== undefined && !this.#place.cache.stale) {
      this.#staleSince = undefined;
      // What nobody has asked for since is of no use any more.
      this.#place.cache.forgetRestored();
      this.#deps.onEvent({ kind: "fresh" });
    }
    this.#sayRefusals();
    // Without an Envoy nothing is known; the next one will most likely be the same.
    const names = this.#place.cache.stripped();
    if (names === undefined || names.join() === this.#stripped) return;
    this.#stripped = names.join();
    this.#deps.onEvent({ kind: "stripped", names });
  }

  /** istiod wants the node on the first request; names and health follow the first request for listeners. */
  #request(request: DeltaRequest): void {
    const upstream = this.#upstream;
    if (upstream === undefined) return;
    const node = this.#nodeSent ? undefined : this.#place.node?.bytes;
    upstream.send(writeDeltaRequest({ ...request, ...(node === undefined ? {} : { node }) }));
    this.#nodeSent = true;
    if (request.typeUrl !== TYPE_URL.listener || this.#listenersAsked) return;
    this.#listenersAsked = true;
    if (this.#deps.onNameTable !== undefined) upstream.send(writeDeltaRequest(plain(TYPE_URL.nameTable)));
    this.#sendHealth();
  }

  #sendHealth(): void {
    const health = this.#health;
    if (health === undefined) return;
    const error = health.healthy ? {} : { error: { code: INTERNAL, message: health.message } };
    this.#upstream?.send(writeDeltaRequest({ ...plain(TYPE_URL.health), ...error }));
  }

  async #keepUpstream(signal: AbortSignal): Promise<void> {
    const { clock, random } = this.#deps.host;
    const uniform = uniformFrom(random);
    let waits = backoff(uniform);
    // No race against a promise of the end: until then it would hold one reaction for every reconnect.
    signal.addEventListener("abort", () => this.#wantsUpstream.resolve(), { once: true });
    while (!signal.aborted) {
      await this.#wantsUpstream.promise;
      if (signal.aborted || this.#withdrawn) {
        await aborted(signal);
        return;
      }
      let failure: VmmeshError | undefined;
      let lived = false;
      try {
        for (const target of await this.#deps.upstreams()) {
          const startedMs = clock.monotonicMs();
          const place = this.#place;
          try {
            await this.#attend(target, signal);
            failure = undefined;
          } catch (thrown) {
            failure = VmmeshError.from(thrown);
          }
          // A stream that stood for a while was a good one: its end (istiod's maximum age, a restart) is no reason to wait.
          // Neither is another node a reason.
          lived = clock.monotonicMs() - startedMs > SECOND_MS || place !== this.#place;
          if (lived || signal.aborted || this.#withdrawn) break;
        }
      } catch (thrown) {
        failure = VmmeshError.from(thrown);
      }
      if (signal.aborted) return;
      if (lived) {
        waits = backoff(uniform);
        continue;
      }
      const retryInMs = waits.next().value;
      this.#retry = new AbortController();
      const pause = AbortSignal.any([signal, this.#retry.signal]);
      if (failure !== undefined && !this.#withdrawn) {
        this.#lastError = messageOf(failure);
        this.#deps.onEvent({ kind: "unreachable", error: failure, retryInMs });
        this.#unreachable.resolve();
      }
      await clock.sleep(retryInMs, pause).catch(() => undefined);
      if (this.#retry.signal.aborted) waits = backoff(uniform);
    }
  }

  /** One stream to istiod, from its opening to its end. */
  async #attend(target: GrpcTarget, signal: AbortSignal): Promise<void> {
    const scope = new AbortController();
    const place = this.#place;
    let broken: VmmeshError | undefined;
    const upstream = openStream(target, DELTA_ADS, (message) => {
      // What is on its way still was meant for the former node.
      if (place !== this.#place) return;
      if (this.#connectedTo === undefined) {
        this.#connectedTo = `${target.address}:${target.port}`;
        this.#since = this.#deps.host.clock.now();
        this.#lastError = undefined;
        this.#deps.onEvent({ kind: "connected", address: this.#connectedTo });
      }
      try {
        this.#receive(message);
      } catch (thrown) {
        broken = unreadable(target, thrown);
        upstream.close();
      }
    });
    signal.addEventListener("abort", () => upstream.close(), { once: true, signal: scope.signal });
    this.#upstream = upstream;
    this.#nodeSent = false;
    this.#listenersAsked = false;
    const inScope = AbortSignal.any([signal, scope.signal]);
    const watchdog = Promise.all([
      this.#leaveWhenEnvoyIsGone(upstream, inScope),
      this.#reopenIfIncomplete(upstream, inScope),
    ]);
    this.#carryOut(this.#place.cache.upstreamOpened());
    try {
      await upstream.done;
      throw new VmmeshError(
        "ISTIOD_UNREACHABLE",
        `istiod at ${target.address}:${target.port} ended the stream`,
      );
    } catch (thrown) {
      const cause = broken ?? thrown;
      if (this.#connectedTo !== undefined) {
        this.#reconnects += 1;
        this.#deps.onEvent({ kind: "disconnected", address: this.#connectedTo, reason: messageOf(cause) });
      }
      throw cause;
    } finally {
      scope.abort();
      await watchdog;
      place.cache.upstreamClosed();
      this.#upstream = undefined;
      this.#connectedTo = undefined;
      this.#since = undefined;
    }
  }

  /** For the newest of those that are left, if there is one: they may be of another node. */
  async #leaveWhenEnvoyIsGone(upstream: ByteStream, signal: AbortSignal): Promise<void> {
    const { clock } = this.#deps.host;
    let goneSinceMs: number | undefined;
    while (!signal.aborted) {
      await clock.sleep(SECOND_MS, signal).catch(() => undefined);
      const places = [...this.#envoys.values()].map(({ place }) => place ?? this.#place);
      if (places.includes(this.#place)) goneSinceMs = undefined;
      else goneSinceMs ??= clock.monotonicMs();
      if (goneSinceMs === undefined || clock.monotonicMs() - goneSinceMs < LINGER_MS) continue;
      const left = places.at(-1);
      if (left === undefined) {
        this.#wantsUpstream = Promise.withResolvers<void>();
        upstream.close();
      } else this.#moveTo(left);
      return;
    }
  }

  /** Is an inbound cluster missing although the listener that uses it has come? Then istiod gets a second chance. */
  async #reopenIfIncomplete(upstream: ByteStream, signal: AbortSignal): Promise<void> {
    await this.#deps.host.clock.sleep(INBOUND_GRACE_MS, signal).catch(() => undefined);
    if (signal.aborted || this.#connectedTo === undefined) return;
    const missing = (this.#deps.inboundPorts ?? [])
      .map((port) => `inbound|${port}||`)
      .filter(
        (cluster) =>
          !this.#place.cache.has(TYPE_URL.cluster, cluster) &&
          this.#place.cache.holds(TYPE_URL.listener, Buffer.from(cluster)),
      );
    if (missing.length === 0) this.#reopened = 0;
    else if (this.#reopened < MAX_REOPENED) {
      this.#reopened += 1;
      this.#deps.onEvent({ kind: "reopened", missing });
      upstream.close();
    }
  }

  #receive(message: Uint8Array): void {
    const response = readDeltaResponse(message);
    if (response.typeUrl === TYPE_URL.nameTable) {
      const upstream = this.#upstream;
      void this.#inTurn(async () => {
        const refusal = await this.#takeNames(response);
        if (this.#upstream === upstream) this.#carryOut(this.#place.cache.acknowledge(response, refusal));
      });
    } else if (response.typeUrl.startsWith("type.googleapis.com/envoy.")) {
      this.#carryOut(this.#place.cache.fromUpstream(response));
    }
  }

  #sayRefusals(): void {
    const standing = [
      ...this.#place.cache.refusals(),
      ...(this.#namesRefused === undefined ? [] : [this.#namesRefused]),
    ];
    const said = JSON.stringify(standing);
    if (said === this.#refusals) return;
    this.#refusals = said;
    this.#deps.onEvent({ kind: "refusals", standing });
  }

  /** Name tables in the order in which they came: a big one takes its time. */
  #inTurn(work: () => Promise<void>): Promise<void> {
    const done = this.#namesInUse.then(work);
    this.#namesInUse = done.catch(() => undefined);
    return done;
  }

  /** @throws {Error} if it is no name table; the one before stays in use */
  async #useNames(resource: Resource): Promise<void> {
    // A copy: the response is not kept for its sake.
    const any = new Uint8Array(resource.any);
    await this.#deps.onNameTable?.(readNameTable(readAny(any).value));
    this.#names = { ...resource, any };
  }

  /** @returns why the table is refused, if it is; the one before stays in use */
  async #takeNames(response: DeltaResponse): Promise<RpcStatus | undefined> {
    const [resource] = response.resources;
    if (resource === undefined) return undefined;
    try {
      await this.#useNames(resource);
      this.#namesRefused = undefined;
      this.#sayRefusals();
      return undefined;
    } catch (thrown) {
      const reason = messageOf(thrown);
      this.#namesRefused = { typeUrl: response.typeUrl, reason };
      this.#sayRefusals();
      this.#deps.onEvent({ kind: "rejected", typeUrl: response.typeUrl, reason });
      return { code: INTERNAL, message: reason };
    }
  }
}

const WRITE: Readonly<Record<Dialect, (response: DeltaResponse) => Uint8Array>> = {
  delta: writeDeltaResponse,
  sotw: ({ systemVersion, typeUrl, nonce, resources }) =>
    writeSotwResponse({
      version: systemVersion,
      typeUrl,
      nonce,
      resources: resources.map(({ any }) => any),
    }),
};

/** What an unreadable message means for the stream that it came on: nothing behind it can be trusted to be in order. */
function unreadable(target: GrpcTarget, cause: unknown): VmmeshError {
  return new VmmeshError(
    "ISTIOD_UNREACHABLE",
    `istiod at ${target.address}:${target.port} sent what is no discovery response`,
    { cause, next: "Is that address istiod's, and not that of a proxy in front of something else?" },
  );
}

function ofAnotherMode(saved = "not known", wanted = "not known"): VmmeshError {
  return new VmmeshError(
    "STATE_UNREADABLE",
    `the configuration on disk is not served: its mode is ${saved}, Envoy's is ${wanted}`,
    { next: "Envoy waits for the control plane; the file is replaced when Envoy has accepted another." },
  );
}

/** What Envoy is served; the names are the relay's own. */
function configurationOf(types: ResourceSet): ResourceSet {
  return new Map([...types].filter(([typeUrl]) => typeUrl !== TYPE_URL.nameTable));
}

function plain(typeUrl: string): DeltaRequest {
  return { typeUrl, responseNonce: "", subscribe: [], unsubscribe: [], initialVersions: new Map() };
}
