import { hash } from "node:crypto";
import {
  type DeltaRequest,
  type DeltaResponse,
  type Resource,
  type SotwRequest,
  TYPE_URL,
} from "../proto/discovery.ts";
import { BinaryWriter, put, type RpcStatus, readAny, readMessage, writeAny } from "../proto/wire.ts";
import type { ResourceSet } from "./lastGood.ts";
import { type Refusal, Refusals } from "./refusals.ts";
import { type HasExtension, nameOf, strip } from "./strip.ts";

/** What a client wants of one type. */
export interface Watch {
  /** Everything of the type (CDS and LDS); with the text that asked for it, `*` or nothing at all. */
  readonly wildcard: "none" | "legacy" | "star";
  readonly names: ReadonlySet<string>;
}

/** The two variants of ADS: what changed, or (clusters and listeners) always all of it. */
export type Dialect = "delta" | "sotw";

/** Where to send what. `upstream` is istiod; a number is one Envoy stream. */
export type Effect =
  | { readonly to: "upstream"; readonly request: DeltaRequest }
  | { readonly to: "envoy"; readonly stream: number; readonly response: DeltaResponse };

interface EnvoyWatch {
  wildcard: boolean;
  readonly names: Set<string>;
  /** Name → digest of what Envoy holds. */
  readonly sent: Map<string, string>;
  /** Something of the type went to this stream, be it nothing at all. */
  answered: boolean;
  /** It came with resources that it held already. */
  readonly warm: boolean;
  /** State of the world: the version of all of it that it came with; empty if it had none, or has been answered. */
  held: string;
}

interface Downstream {
  readonly dialect: Dialect;
  /** What this Envoy can load; until it has said, all. */
  has: HasExtension;
  readonly watches: Map<string, EnvoyWatch>;
  /** Endpoints that must follow a cluster that was pushed, whether or not their bytes changed (see `#push`). */
  readonly awaitedEndpoints: Set<string>;
  /** Our nonces that Envoy has not answered → the upstream nonce they stand for, if they stand for one. */
  readonly outstanding: Map<string, Outstanding>;
  /** Type → why it refused the last that it answered of it. */
  readonly refused: Map<string, RpcStatus>;
  /** What it refused and has not accepted since. */
  readonly refusals: Refusals;
}

interface Outstanding {
  readonly typeUrl: string;
  upstreamNonce: string | undefined;
  /** What it brought or took away. */
  readonly names: readonly string[];
  /** Whether it is all there is of the type. */
  readonly whole: boolean;
}

/** A resource with two versions: istiod's (often empty), and ours, which is a digest of the bytes. */
interface Held extends Resource {
  readonly digest: string;
  /** Types of the extensions in it that only Istio's own Envoy has. */
  readonly istioOnly: readonly string[];
}

interface TypeState {
  readonly resources: Map<string, Held>;
  /** Names that upstream was asked for and said not to exist. */
  readonly absent: Set<string>;
  /** What upstream has been asked for on its present stream. */
  asked: { wildcard: Watch["wildcard"]; names: Set<string> } | undefined;
  /** Upstream has answered at least once: for a wildcard type the resources are complete. */
  complete: boolean;
  /** What is held comes from disk: upstream has not said anything yet. */
  restored: boolean;
  version: string;
  acked: string | undefined;
}

export interface TypeStatus {
  readonly typeUrl: string;
  readonly resources: number;
  /** The upstream's version that every Envoy has accepted last. */
  readonly acked: string | undefined;
  /** The words of an Envoy that refused the last one it got. */
  readonly lastNack: string | undefined;
}

const EMPTY: ReadonlyMap<string, string> = new Map();

/** Of all caches of this process: what one has heard has no number that another had. */
let revisions = 0;

/**
 * A terminating xDS cache: Envoy's streams on one side, delta or state of the world, one delta stream to istiod on the
 * other, own nonces towards Envoy. Pure: each call returns what is to be sent. Resources are opaque bytes.
 *
 * What istiod sends is kept, so that an Envoy that comes (back) is served at once, and on a reconnect istiod is told
 * what is held already; only bytes that changed go on to Envoy. istiod hears ACK when the last Envoy that got a response
 * has said it, NACK when the first one has.
 *
 * What is kept is what istiod sent. What an Envoy cannot load is taken out on the way to that one (`strip`); the version
 * that it hears stays that of istiod's bytes.
 */
export class DeltaCache {
  readonly #types = new Map<string, TypeState>();
  readonly #downstreams = new Map<number, Downstream>();
  #upstreamOpen = false;
  #nonce = 0;
  #revision = 0;

  /** A fresh stream to istiod: asks again for all that is wanted, naming what is held. The caller puts the node on the first. */
  upstreamOpened(): Effect[] {
    this.#upstreamOpen = true;
    return [...this.#types.keys()].sort(byPushOrder).flatMap((typeUrl) => {
      const state = this.#type(typeUrl);
      state.asked = undefined;
      return this.#ask(typeUrl, state);
    });
  }

  upstreamClosed(): void {
    this.#upstreamOpen = false;
    for (const state of this.#types.values()) state.asked = undefined;
    for (const downstream of this.#downstreams.values()) {
      // Nonces of the dead stream mean nothing to the next one.
      for (const entry of downstream.outstanding.values()) entry.upstreamNonce = undefined;
    }
  }

  envoyOpened(stream: number, dialect: Dialect = "delta"): void {
    this.#downstreams.set(stream, {
      dialect,
      has: () => true,
      watches: new Map(),
      awaitedEndpoints: new Set(),
      outstanding: new Map(),
      refused: new Map(),
      refusals: new Refusals(),
    });
  }

  /** To be said before its first request: what was sent is not sent again. */
  envoyHas(stream: number, has: HasExtension): void {
    const downstream = this.#downstreams.get(stream);
    if (downstream !== undefined) downstream.has = has;
  }

  envoyClosed(stream: number): Effect[] {
    const downstream = this.#downstreams.get(stream);
    this.#downstreams.delete(stream);
    if (downstream === undefined || this.#downstreams.size === 0) return [];
    return [
      // The others have accepted what only this one had not answered.
      ...[...downstream.outstanding.values()].flatMap(({ typeUrl, upstreamNonce }) =>
        this.#answer(typeUrl, upstreamNonce, undefined),
      ),
      ...[...downstream.watches.keys()].flatMap((typeUrl) => this.#forgetUnwanted(typeUrl)),
    ];
  }

  /** A request of an Envoy that speaks state of the world: it names all that it wants each time. */
  fromSotwEnvoy(stream: number, request: SotwRequest): Effect[] {
    const { typeUrl, version, responseNonce, error } = request;
    const known = this.#downstreams.get(stream)?.watches.get(typeUrl);
    const names = new Set(request.names.filter((name) => name !== "*"));
    // Naming nothing means everything, for clusters and listeners and as long as nothing was named.
    const legacy = names.size === 0 && WHOLE.includes(typeUrl) && (known === undefined || known.wildcard);
    const wildcard = legacy || request.names.includes("*");
    if (known === undefined && !wildcard && names.size === 0) return [];
    const star = wildcard !== (known?.wildcard ?? legacy) ? ["*"] : [];
    const fresh = [...names].filter((name) => known?.names.has(name) !== true);
    const given = [...(known?.names ?? [])].filter((name) => !names.has(name));
    return this.#fromEnvoy(
      stream,
      {
        typeUrl,
        responseNonce,
        subscribe: wildcard ? [...star, ...fresh] : fresh,
        unsubscribe: wildcard ? given : [...star, ...given],
        // It has something under each name, and does not say what.
        initialVersions: new Map(version === "" ? [] : [...names].map((name) => [name, ""])),
        ...(error === undefined ? {} : { error }),
      },
      version,
    );
  }

  /** A request of an Envoy: subscription, ACK or NACK, or all at once. */
  fromEnvoy(stream: number, request: DeltaRequest): Effect[] {
    return this.#fromEnvoy(stream, request, "");
  }

  #fromEnvoy(stream: number, request: DeltaRequest, held: string): Effect[] {
    const downstream = this.#downstreams.get(stream);
    if (downstream === undefined) return [];
    const { typeUrl } = request;
    const state = this.#type(typeUrl);
    const effects: Effect[] = [];

    const answered = downstream.outstanding.get(request.responseNonce);
    if (answered !== undefined) {
      downstream.outstanding.delete(request.responseNonce);
      if (request.error === undefined) downstream.refused.delete(typeUrl);
      else downstream.refused.set(typeUrl, request.error);
      downstream.refusals.answered(typeUrl, answered.names, answered.whole, request.error?.message);
      effects.push(...this.#answer(typeUrl, answered.upstreamNonce, request.error));
    }

    const known = downstream.watches.get(typeUrl);
    const watch: EnvoyWatch = known ?? {
      wildcard: false,
      names: new Set(),
      sent: new Map(request.initialVersions),
      answered: false,
      warm: request.initialVersions.size > 0 || held !== "",
      held,
    };
    if (known === undefined) downstream.watches.set(typeUrl, watch);
    // Legacy wildcard: a first request that names nothing (xDS protocol, "How the client specifies what resources to return").
    const wildcardNow =
      request.subscribe.includes("*") || (known === undefined && request.subscribe.length === 0);
    watch.wildcard ||= wildcardNow;
    if (request.unsubscribe.includes("*")) watch.wildcard = false;
    const fresh = request.subscribe.filter((name) => name !== "*");
    for (const name of fresh) {
      watch.names.add(name);
      // A client that subscribes again wants the resource again, even if it has it.
      if (known !== undefined) watch.sent.delete(name);
    }
    for (const name of request.unsubscribe) {
      watch.names.delete(name);
      watch.sent.delete(name);
    }

    if (request.unsubscribe.length > 0) {
      const rest = watch.wildcard || watch.names.size > 0;
      downstream.refusals.unwanted(typeUrl, request.unsubscribe, rest);
      effects.push(...this.#forgetUnwanted(typeUrl));
    }
    effects.push(
      ...this.#ask(typeUrl, state, wildcardNow && !request.subscribe.includes("*") ? "legacy" : "star"),
    );
    if (known === undefined || wildcardNow || fresh.length > 0) {
      const gone = new Set(fresh.filter((name) => state.absent.has(name)));
      effects.push(...this.#push(stream, downstream, typeUrl, { nonce: undefined, gone }));
    }
    return effects;
  }

  /** A response of istiod. */
  fromUpstream(response: DeltaResponse): Effect[] {
    const { typeUrl } = response;
    const state = this.#type(typeUrl);
    this.#revision = ++revisions;
    state.restored = false;
    for (const resource of response.resources) {
      state.resources.set(resource.name, hold(typeUrl, resource));
      state.absent.delete(resource.name);
    }
    for (const name of response.removed) {
      state.resources.delete(name);
      if (state.asked?.names.has(name) === true) state.absent.add(name);
    }
    state.complete = true;
    state.version = response.systemVersion;
    const gone = new Set(response.removed);
    const pushes = [...this.#downstreams].flatMap(([stream, downstream]) =>
      this.#push(stream, downstream, typeUrl, { nonce: response.nonce, gone }),
    );
    // Nothing of it is news to an Envoy: nobody else will answer it. What was refused before still is.
    return pushes.length > 0 ? pushes : this.#answer(typeUrl, response.nonce, this.#refusal(typeUrl));
  }

  /** Another one each time that upstream has said something. */
  get revision(): number {
    return this.#revision;
  }

  /** An Envoy uses, or would get, what was restored from disk. */
  get stale(): boolean {
    return [...this.#types].some(
      ([typeUrl, { restored }]) => restored && (OWED.includes(typeUrl) || this.#isWatched(typeUrl)),
    );
  }

  /**
   * What every Envoy has accepted, as a consistent set: nothing on its way, nothing refused, nothing asked for and not
   * answered, nothing stale. Secrets are never in it.
   * @returns undefined while there is no such set
   */
  accepted(): ResourceSet | undefined {
    if (this.#downstreams.size === 0 || this.stale) return undefined;
    for (const { outstanding } of this.#downstreams.values()) if (outstanding.size > 0) return undefined;
    const set = new Map<string, readonly Resource[]>();
    for (const [typeUrl, state] of this.#types) {
      const wanted = this.#wanted(typeUrl);
      if (typeUrl === TYPE_URL.secret || (!wanted.wildcard && wanted.names.size === 0)) continue;
      if (this.#refusal(typeUrl) !== undefined || (wanted.wildcard && !state.complete)) return undefined;
      for (const name of wanted.names)
        if (!state.resources.has(name) && !state.absent.has(name)) return undefined;
      set.set(
        typeUrl,
        [...state.resources.values()].filter(({ name }) => wanted.wildcard || wanted.names.has(name)),
      );
    }
    return set.has(TYPE_URL.listener) && set.has(TYPE_URL.cluster) ? set : undefined;
  }

  /** Serves a set from disk, type by type, until upstream has answered for the type; what upstream has said is left alone. */
  restore(set: ResourceSet): Effect[] {
    for (const [typeUrl, resources] of set) {
      const state = this.#type(typeUrl);
      if (state.complete || typeUrl === TYPE_URL.secret) continue;
      for (const resource of resources) state.resources.set(resource.name, hold(typeUrl, resource));
      state.complete = true;
      state.restored = true;
    }
    return [...set.keys()]
      .sort(byPushOrder)
      .flatMap((typeUrl) =>
        [...this.#downstreams].flatMap(([stream, downstream]) =>
          this.#push(stream, downstream, typeUrl, { nonce: undefined, gone: new Set() }),
        ),
      );
  }

  /** Serves no more of what is still from disk. An Envoy keeps what it has. */
  forgetRestored(): void {
    for (const state of this.#types.values()) {
      if (!state.restored) continue;
      state.resources.clear();
      state.complete = false;
      state.restored = false;
    }
  }

  /** ACKs a response that the relay itself consumes, or refuses it. */
  acknowledge(response: DeltaResponse, error?: RpcStatus): Effect[] {
    this.#revision = ++revisions;
    const request = { ...bare(response.typeUrl, response.nonce), ...(error === undefined ? {} : { error }) };
    return [{ to: "upstream", request }];
  }

  status(): TypeStatus[] {
    return [...this.#types]
      .sort(([a], [b]) => byPushOrder(a, b))
      .map(([typeUrl, { resources, acked }]) => ({
        typeUrl,
        resources: resources.size,
        acked,
        lastNack: this.#refusal(typeUrl)?.message,
      }));
  }

  /** Names of the extensions that one Envoy or another does not get, sorted; undefined while there is no Envoy. */
  stripped(): readonly string[] | undefined {
    if (this.#downstreams.size === 0) return undefined;
    const types = new Set<string>();
    for (const { resources } of this.#types.values())
      for (const { istioOnly } of resources.values()) for (const type of istioOnly) types.add(type);
    const lacking = [...types].filter((type) =>
      [...this.#downstreams.values()].some(({ has }) => !has(type)),
    );
    return [...new Set(lacking.map(nameOf))].sort();
  }

  has(typeUrl: string, name: string): boolean {
    return this.#types.get(typeUrl)?.resources.has(name) ?? false;
  }

  /** Does any cached resource of the type hold these bytes? */
  holds(typeUrl: string, needle: Uint8Array): boolean {
    return this.holding(typeUrl, needle).next().done !== true;
  }

  /** The cached resources of the type (google.protobuf.Any) that hold these bytes. */
  *holding(typeUrl: string, needle: Uint8Array): Generator<Uint8Array, undefined> {
    for (const { any } of this.#types.get(typeUrl)?.resources.values() ?? [])
      if (Buffer.from(any.buffer, any.byteOffset, any.byteLength).includes(needle)) yield any;
    return undefined;
  }

  #type(typeUrl: string): TypeState {
    const known = this.#types.get(typeUrl);
    if (known !== undefined) return known;
    const state: TypeState = {
      resources: new Map(),
      absent: new Set(),
      asked: undefined,
      complete: false,
      restored: false,
      version: "",
      acked: undefined,
    };
    this.#types.set(typeUrl, state);
    return state;
  }

  /** Tells istiod of its response: a refusal at once, an ACK when no Envoy is left that has to answer. */
  #answer(typeUrl: string, upstreamNonce: string | undefined, error: RpcStatus | undefined): Effect[] {
    const waiting = [...this.#downstreams.values()]
      .flatMap(({ outstanding }) => [...outstanding.values()])
      .filter((it) => it.typeUrl === typeUrl);
    const state = this.#type(typeUrl);
    if (waiting.length === 0 && this.#refusal(typeUrl) === undefined) state.acked = state.version;
    if (upstreamNonce === undefined || !this.#upstreamOpen) return [];
    const same = waiting.filter((it) => it.upstreamNonce === upstreamNonce);
    if (error === undefined && same.length > 0) return [];
    for (const entry of same) entry.upstreamNonce = undefined;
    const request = { ...bare(typeUrl, upstreamNonce), ...(error === undefined ? {} : { error }) };
    return [{ to: "upstream", request }];
  }

  /** What Envoys have refused and not accepted since. */
  refusals(): Refusal[] {
    return [...this.#downstreams.values()].flatMap(({ refusals }) => refusals.list());
  }

  /** Why an Envoy refused the last that it answered of the type. */
  #refusal(typeUrl: string): RpcStatus | undefined {
    for (const { refused } of this.#downstreams.values()) {
      const error = refused.get(typeUrl);
      if (error !== undefined) return error;
    }
    return undefined;
  }

  #isWatched(typeUrl: string): boolean {
    return [...this.#downstreams.values()].some(({ watches }) => watches.has(typeUrl));
  }

  /** Union over all Envoys. */
  #wanted(typeUrl: string): { wildcard: boolean; names: Set<string> } {
    const names = new Set<string>();
    let wildcard = false;
    for (const { watches } of this.#downstreams.values()) {
      const watch = watches.get(typeUrl);
      wildcard ||= watch?.wildcard ?? false;
      for (const name of watch?.names ?? []) names.add(name);
    }
    return { wildcard, names };
  }

  /** Asks istiod for what is wanted and not yet asked for on its present stream. */
  #ask(typeUrl: string, state: TypeState, wildcardAs: "legacy" | "star" = "legacy"): Effect[] {
    if (!this.#upstreamOpen) return [];
    const wanted = this.#wanted(typeUrl);
    if (state.asked === undefined) {
      if (!wanted.wildcard && wanted.names.size === 0) return [];
      // Nothing at all means everything; beside names, everything must be said.
      const how = wanted.names.size > 0 ? "star" : wildcardAs;
      state.asked = { wildcard: wanted.wildcard ? how : "none", names: new Set(wanted.names) };
      const initialVersions = new Map(
        [...state.resources.values()]
          .filter(({ name }) => wanted.wildcard || wanted.names.has(name))
          .map(({ name, version }) => [name, version]),
      );
      const subscribe = [...(wanted.wildcard && how === "star" ? ["*"] : []), ...wanted.names];
      return [{ to: "upstream", request: { ...bare(typeUrl, ""), subscribe, initialVersions } }];
    }
    const fresh = [...wanted.names].filter((name) => !state.asked?.names.has(name));
    const star = wanted.wildcard && state.asked.wildcard === "none" ? ["*"] : [];
    if (fresh.length + star.length === 0) return [];
    for (const name of fresh) state.asked.names.add(name);
    if (star.length > 0) state.asked.wildcard = "star";
    return [{ to: "upstream", request: { ...bare(typeUrl, ""), subscribe: [...star, ...fresh] } }];
  }

  /** Names that no Envoy wants any more are taken back from istiod and dropped. */
  #forgetUnwanted(typeUrl: string): Effect[] {
    const state = this.#type(typeUrl);
    const wanted = this.#wanted(typeUrl);
    if (wanted.wildcard) return [];
    for (const name of [...state.resources.keys()]) if (!wanted.names.has(name)) state.resources.delete(name);
    for (const name of state.absent) if (!wanted.names.has(name)) state.absent.delete(name);
    const stale = [...(state.asked?.names ?? [])].filter((name) => !wanted.names.has(name));
    if (stale.length === 0 || !this.#upstreamOpen) return [];
    for (const name of stale) state.asked?.names.delete(name);
    return [{ to: "upstream", request: { ...bare(typeUrl, ""), unsubscribe: stale } }];
  }

  /**
   * What this Envoy lacks, or holds and should not.
   *
   * Endpoints go with their cluster even if they are the same: a changed cluster waits for them before it is used, but
   * Envoy has subscribed to the name already and does not ask again (seen with 1.40: it stays in warming for ever).
   *
   * @param cause nonce of the upstream response that brought it about, if one did; names that are known not to exist
   */
  #push(
    stream: number,
    downstream: Downstream,
    typeUrl: string,
    cause: { readonly nonce: string | undefined; readonly gone: ReadonlySet<string> },
  ): Effect[] {
    const watch = downstream.watches.get(typeUrl);
    if (watch === undefined) return [];
    const state = this.#type(typeUrl);
    const sotw = downstream.dialect === "sotw";
    const whole = sotw && WHOLE.includes(typeUrl);
    const wants = (name: string): boolean => watch.wildcard || watch.names.has(name);
    const awaited = typeUrl === TYPE_URL.endpoint ? downstream.awaitedEndpoints : undefined;
    // What an Envoy brought along is not older than what is on disk: only a name that it lacks is taken from there.
    const outdated = state.restored && watch.warm;
    const lacks = (name: string, digest: string): boolean =>
      outdated ? watch.names.has(name) && !watch.sent.has(name) : watch.sent.get(name) !== digest;
    const resources = [...state.resources.values()].filter(
      ({ name, digest }) => wants(name) && (lacks(name, digest) || awaited?.has(name) === true),
    );
    const removed = [...watch.sent.keys()].filter(
      (name) =>
        state.complete &&
        !state.restored &&
        !state.resources.has(name) &&
        (watch.wildcard || cause.gone.has(name)),
    );
    // Envoy waits for a named resource until it comes or is said not to exist.
    for (const name of cause.gone) if (watch.names.has(name) && !removed.includes(name)) removed.push(name);
    // The first answer to a wildcard is owed even when it is empty: Envoy's initialisation waits for it.
    const owed = watch.wildcard && state.complete && !watch.answered && watch.sent.size === 0 && !outdated;
    if (resources.length + removed.length === 0 && !owed) return [];
    const sending = whole ? [...state.resources.values()].filter(({ name }) => wants(name)) : resources;
    const version = sotw ? versionOf(sending) : state.version;
    // An agent that has just restarted: all of it is what this Envoy holds.
    const same = whole && version === watch.held;
    watch.held = "";
    watch.answered = true;
    for (const { name, digest } of resources) {
      watch.sent.set(name, digest);
      awaited?.delete(name);
    }
    for (const name of removed) watch.sent.delete(name);
    // Among endpoints and routes state of the world has no word for what does not exist.
    const unsaid = sotw && !whole && typeUrl !== TYPE_URL.endpoint;
    if (same || (unsaid && sending.length === 0)) return [];
    this.#nonce += 1;
    const nonce = String(this.#nonce);
    downstream.outstanding.set(nonce, {
      typeUrl,
      upstreamNonce: cause.nonce,
      names: [...sending.map(({ name }) => name), ...removed],
      whole,
    });
    return [
      {
        to: "envoy",
        stream,
        response: {
          systemVersion: version,
          typeUrl,
          resources: [
            ...sending.map(({ name, digest, any, istioOnly }) => ({
              name,
              version: digest,
              any: istioOnly.length === 0 ? any : strip(typeUrl, any, downstream.has).any,
            })),
            ...(sotw && typeUrl === TYPE_URL.endpoint ? removed.map(noEndpoints) : []),
          ],
          removed: sotw ? [] : removed,
          nonce,
        },
      },
      ...(typeUrl === TYPE_URL.cluster ? this.#pushEndpointsOf(stream, downstream, resources) : []),
    ];
  }

  #pushEndpointsOf(stream: number, downstream: Downstream, clusters: readonly Resource[]): Effect[] {
    for (const { any } of clusters) {
      const name = endpointsOf(any);
      if (name !== undefined) downstream.awaitedEndpoints.add(name);
    }
    return this.#push(stream, downstream, TYPE_URL.endpoint, { nonce: undefined, gone: new Set() });
  }
}

/**
 * The name under which a cluster asks for its endpoints: `eds_cluster_config.service_name` (3, 2), else its own (1).
 * @returns undefined if it gets them another way, or if the bytes are no cluster
 */
function endpointsOf(any: Uint8Array): string | undefined {
  let [name, serviceName, byDiscovery] = ["", "", false];
  try {
    readMessage(readAny(any).value, (field, reader) => {
      if (field === 1) name = reader.string();
      else if (field === 3) {
        byDiscovery = true;
        readMessage(reader.bytes(), (inner, config) => {
          if (inner !== 2) return false;
          serviceName = config.string();
          return true;
        });
      } else return false;
      return true;
    });
  } catch {
    return undefined;
  }
  return byDiscovery ? serviceName || name : undefined;
}

/** Said of a cluster that istiod knows no endpoints of, as istiod itself does in state of the world: Envoy waits for it. */
function noEndpoints(name: string): Resource {
  const assignment = new BinaryWriter();
  put(assignment, 1, name);
  return { name, version: "", any: writeAny(TYPE_URL.endpoint, assignment.finish()) };
}

/** Of the same resources the same, whoever was up in between. */
function versionOf(resources: readonly Held[]): string {
  const parts = resources.map(({ name, digest }) => `${digest} ${name}`).sort();
  return hash("sha256", parts.join("\n"), "base64url").slice(0, 16);
}

function bare(typeUrl: string, responseNonce: string): DeltaRequest {
  return { typeUrl, responseNonce, subscribe: [], unsubscribe: [], initialVersions: EMPTY };
}

/**
 * Towards Envoy a version is a digest: equal bytes are never pushed again, also not by an agent that has just restarted
 * and is told by Envoy what it holds. The copy frees the response that the bytes are a view into.
 */
function hold(typeUrl: string, resource: Resource): Held {
  return {
    ...resource,
    any: Uint8Array.from(resource.any),
    digest: hash("sha256", resource.any, "base64url").slice(0, 16),
    istioOnly: strip(typeUrl, resource.any, () => false).removed,
  };
}

/** What every Envoy asks for. */
const OWED: readonly string[] = [TYPE_URL.cluster, TYPE_URL.listener];
/** Of these a state-of-the-world response is all there is: what it leaves out is removed. */
const WHOLE = OWED;
const ORDER: readonly string[] = [TYPE_URL.cluster, TYPE_URL.endpoint, TYPE_URL.listener, TYPE_URL.route];
/** Clusters before endpoints before listeners before routes: the make-before-break order of the xDS protocol. */
function byPushOrder(a: string, b: string): number {
  const rank = (typeUrl: string): number => (ORDER.includes(typeUrl) ? ORDER.indexOf(typeUrl) : ORDER.length);
  return rank(a) - rank(b);
}
