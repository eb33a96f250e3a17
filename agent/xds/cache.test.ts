import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type DeltaRequest, type DeltaResponse, type SotwRequest, TYPE_URL } from "../proto/discovery.ts";
import { BinaryWriter, put, writeAny } from "../proto/wire.ts";
import { DeltaCache, type Effect } from "./cache.ts";
import type { ResourceSet } from "./lastGood.ts";

const CDS = TYPE_URL.cluster;
const EDS = TYPE_URL.endpoint;

function request(typeUrl: string, more: Partial<DeltaRequest> = {}): DeltaRequest {
  return { typeUrl, subscribe: [], unsubscribe: [], initialVersions: new Map(), responseNonce: "", ...more };
}

/** Name in field 1 and an empty `eds_cluster_config` in field 3: what is read of a cluster; the rest is opaque. */
function bytesOf(typeUrl: string, name: string, content: string): Uint8Array {
  const text = (field: number, value: string): Buffer =>
    Buffer.concat([Buffer.from([field * 8 + 2, value.length]), Buffer.from(value)]);
  return writeAny(typeUrl, Buffer.concat([text(1, name), text(3, ""), text(15, content)]));
}

function response(
  typeUrl: string,
  nonce: string,
  resources: Readonly<Record<string, string>>,
  removed: readonly string[] = [],
): DeltaResponse {
  return {
    typeUrl,
    nonce,
    systemVersion: `v${nonce}`,
    // istiod leaves the version of a resource empty.
    resources: Object.entries(resources).map(([name, content]) => ({
      name,
      version: "",
      any: bytesOf(typeUrl, name, content),
    })),
    removed,
  };
}

const toEnvoy = (effects: readonly Effect[], stream = 1): DeltaResponse[] =>
  effects.flatMap((it) => (it.to === "envoy" && it.stream === stream ? [it.response] : []));
const toIstiod = (effects: readonly Effect[]): DeltaRequest[] =>
  effects.flatMap((it) => (it.to === "upstream" ? [it.request] : []));
const names = (responses: readonly DeltaResponse[]): string[] =>
  responses.flatMap((it) => it.resources.map(({ name }) => name));

function connected(): DeltaCache {
  const cache = new DeltaCache();
  cache.envoyOpened(1);
  cache.upstreamOpened();
  return cache;
}

describe("one Envoy", () => {
  test("its wildcard goes up, the answer comes down with a nonce of ours, and its ACK goes up with istiod's", () => {
    const cache = connected();
    expect(toIstiod(cache.fromEnvoy(1, request(CDS)))).toEqual([request(CDS)]);
    const [pushed] = toEnvoy(cache.fromUpstream(response(CDS, "up-1", { a: "1" })));
    expect(pushed?.resources.map(({ name, any }) => [name, any])).toEqual([["a", bytesOf(CDS, "a", "1")]]);
    expect(pushed?.nonce).not.toBe("up-1");
    expect(toIstiod(cache.fromEnvoy(1, request(CDS, { responseNonce: pushed?.nonce ?? "" })))).toEqual([
      request(CDS, { responseNonce: "up-1" }),
    ]);
  });

  test("a NACK goes up in Envoy's words, and the refused bytes are not pushed again", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    const [pushed] = toEnvoy(cache.fromUpstream(response(CDS, "up-1", { a: "1" })));
    const error = { code: 13, message: "no such filter" };
    const effects = cache.fromEnvoy(1, request(CDS, { responseNonce: pushed?.nonce ?? "", error }));
    expect(effects).toEqual([{ to: "upstream", request: request(CDS, { responseNonce: "up-1", error }) }]);
    expect(cache.status()).toMatchObject([{ typeUrl: CDS, resources: 1, lastNack: "no such filter" }]);
  });

  test("a refusal stands until that resource is accepted, taken back or not wanted any more", () => {
    const cache = connected();
    const stand = (): string[] => cache.refusals().map(({ reason }) => reason);
    const error = { code: 13, message: "a: no such filter" };
    const answer = (effects: readonly Effect[], more: Partial<DeltaRequest> = {}): void => {
      const [pushed] = toEnvoy(effects);
      cache.fromEnvoy(1, request(EDS, { responseNonce: pushed?.nonce ?? "", ...more }));
    };
    cache.fromEnvoy(1, request(EDS, { subscribe: ["a", "b"] }));
    answer(cache.fromUpstream(response(EDS, "up-1", { a: "1" })), { error });
    answer(cache.fromUpstream(response(EDS, "up-2", { b: "1" })));
    expect(stand()).toEqual(["a: no such filter"]);
    answer(cache.fromUpstream(response(EDS, "up-3", { a: "2" })));
    expect(stand()).toEqual([]);
    answer(cache.fromUpstream(response(EDS, "up-4", { a: "3" })), { error });
    answer(cache.fromUpstream(response(EDS, "up-5", {}, ["a"])));
    expect(stand()).toEqual([]);
    answer(cache.fromUpstream(response(EDS, "up-6", { a: "4" })), { error });
    expect(stand()).toEqual(["a: no such filter"]);
    cache.fromEnvoy(1, request(EDS, { unsubscribe: ["a"] }));
    expect(stand()).toEqual([]);
    answer(cache.fromUpstream(response(EDS, "up-7", { b: "2" })), { error });
    cache.envoyClosed(1);
    expect(stand()).toEqual([]);
  });

  test("equal bytes are acknowledged at once and not pushed", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    cache.fromUpstream(response(CDS, "up-1", { a: "1" }));
    expect(cache.fromUpstream(response(CDS, "up-2", { a: "1" }))).toEqual([
      { to: "upstream", request: request(CDS, { responseNonce: "up-2" }) },
    ]);
  });

  test("an empty first answer to a wildcard is passed on: Envoy's start waits for it", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(TYPE_URL.listener));
    expect(toEnvoy(cache.fromUpstream(response(TYPE_URL.listener, "up-1", {})))).toHaveLength(1);
  });

  test("after an agent restart, an Envoy that says what it holds is sent only what differs", () => {
    const before = connected();
    before.fromEnvoy(1, request(CDS));
    const [first] = toEnvoy(before.fromUpstream(response(CDS, "up-1", { a: "1", b: "1", c: "1" })));
    const held = new Map(first?.resources.map(({ name, version }) => [name, version]));

    const after = connected();
    after.fromEnvoy(1, request(CDS, { initialVersions: held }));
    const [again] = toEnvoy(after.fromUpstream(response(CDS, "up-1", { a: "1", b: "2" })));
    expect(again?.resources.map(({ name }) => name)).toEqual(["b"]);
    expect(again?.removed).toEqual(["c"]);
  });

  // Envoy's new version of a cluster waits for endpoints, but its mux holds the name already and does not ask again; with
  // Istio's initial_fetch_timeout of 0 it waits for ever. istiod knows that and sends equal endpoints after each cluster.
  test("a changed cluster is followed by its endpoints, even if their bytes did not change", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    cache.fromUpstream(response(CDS, "c1", { a: "1", b: "1" }));
    cache.fromEnvoy(1, request(EDS, { subscribe: ["a", "b"] }));
    cache.fromUpstream(response(EDS, "e1", { a: "ep", b: "ep" }));
    const effects = [
      ...cache.fromUpstream(response(CDS, "c2", { a: "2", b: "1" })),
      ...cache.fromUpstream(response(EDS, "e2", { a: "ep", b: "ep" })),
    ];
    expect(toEnvoy(effects).map((it) => [it.typeUrl, it.resources.map(({ name }) => name)])).toEqual([
      [CDS, ["a"]],
      [EDS, ["a"]],
    ]);
  });
});

test("a cluster that changed while Envoy was away is followed by its endpoints, which Envoy holds already", () => {
  const cache = connected();
  cache.fromEnvoy(1, request(CDS));
  const [clusters] = toEnvoy(cache.fromUpstream(response(CDS, "c1", { a: "1", b: "1" })));
  cache.fromEnvoy(1, request(EDS, { subscribe: ["a", "b"] }));
  const [endpoints] = toEnvoy(cache.fromUpstream(response(EDS, "e1", { a: "ep", b: "ep" })));
  cache.envoyClosed(1);
  cache.fromUpstream(response(CDS, "c2", { a: "2" }));
  const heldOf = (it: DeltaResponse | undefined): Map<string, string> =>
    new Map(it?.resources.map(({ name, version }) => [name, version]));
  cache.envoyOpened(2);
  expect(names(toEnvoy(cache.fromEnvoy(2, request(CDS, { initialVersions: heldOf(clusters) })), 2))).toEqual([
    "a",
  ]);
  const again = request(EDS, { subscribe: ["a", "b"], initialVersions: heldOf(endpoints) });
  expect(names(toEnvoy(cache.fromEnvoy(2, again), 2))).toEqual(["a"]);
});

describe("the stream to istiod breaks", () => {
  test("the next one is told what is wanted and held, clusters first", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(EDS, { subscribe: ["a"] }));
    cache.fromEnvoy(1, request(CDS));
    cache.fromUpstream(response(CDS, "c1", { a: "1" }));
    cache.upstreamClosed();
    expect(toIstiod(cache.upstreamOpened())).toEqual([
      request(CDS, { initialVersions: new Map([["a", ""]]) }),
      request(EDS, { subscribe: ["a"] }),
    ]);
  });

  test("a wildcard beside names stays a wildcard", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    cache.fromEnvoy(1, request(CDS, { subscribe: ["extra"] }));
    cache.upstreamClosed();
    const [again] = toIstiod(cache.upstreamOpened());
    expect(again?.subscribe.toSorted()).toEqual(["*", "extra"]);
  });

  test("an ACK for a push of the dead stream is not sent into the new one", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    const [pushed] = toEnvoy(cache.fromUpstream(response(CDS, "c1", { a: "1" })));
    cache.upstreamClosed();
    cache.upstreamOpened();
    expect(cache.fromEnvoy(1, request(CDS, { responseNonce: pushed?.nonce ?? "" }))).toEqual([]);
  });

  test("an Envoy that comes meanwhile is served from what is held", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    cache.fromUpstream(response(CDS, "c1", { a: "1" }));
    cache.upstreamClosed();
    cache.envoyClosed(1);
    cache.envoyOpened(2);
    expect(names(toEnvoy(cache.fromEnvoy(2, request(CDS)), 2))).toEqual(["a"]);
  });
});

describe("a second Envoy", () => {
  test("is answered from the cache, and istiod is asked only for what the first did not want", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(EDS, { subscribe: ["a"] }));
    cache.fromUpstream(response(EDS, "e1", { a: "1" }));
    cache.envoyOpened(2);
    const effects = cache.fromEnvoy(2, request(EDS, { subscribe: ["a", "b"] }));
    expect(names(toEnvoy(effects, 2))).toEqual(["a"]);
    expect(toIstiod(effects)).toEqual([request(EDS, { subscribe: ["b"] })]);
  });

  test("is told at once of a name that istiod has said not to exist", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(EDS, { subscribe: ["gone"] }));
    expect(toEnvoy(cache.fromUpstream(response(EDS, "e1", {}, ["gone"])))[0]?.removed).toEqual(["gone"]);
    cache.envoyOpened(2);
    expect(toEnvoy(cache.fromEnvoy(2, request(EDS, { subscribe: ["gone"] })), 2)[0]?.removed).toEqual([
      "gone",
    ]);
  });

  test("gets an empty answer to a wildcard of which there is nothing", () => {
    const cache = connected();
    cache.fromEnvoy(1, request(TYPE_URL.listener));
    cache.fromUpstream(response(TYPE_URL.listener, "l1", {}));
    cache.envoyOpened(2);
    expect(toEnvoy(cache.fromEnvoy(2, request(TYPE_URL.listener)), 2)).toHaveLength(1);
  });

  test("keeps a name alive that the first gives up; when both have, istiod is told", () => {
    const cache = connected();
    cache.envoyOpened(2);
    cache.fromEnvoy(1, request(EDS, { subscribe: ["a"] }));
    cache.fromEnvoy(2, request(EDS, { subscribe: ["a"] }));
    expect(toIstiod(cache.fromEnvoy(1, request(EDS, { unsubscribe: ["a"] })))).toEqual([]);
    expect(toIstiod(cache.fromEnvoy(2, request(EDS, { unsubscribe: ["a"] })))).toEqual([
      request(EDS, { unsubscribe: ["a"] }),
    ]);
  });
});

describe("two Envoys that judge differently", () => {
  const error = { code: 13, message: "no such filter" };
  const lastNack = (cache: DeltaCache) => cache.status()[0]?.lastNack;

  /** Both have the response up-1 and have not answered. */
  function waiting() {
    const cache = connected();
    cache.envoyOpened(2, "sotw");
    cache.fromEnvoy(1, request(CDS));
    cache.fromSotwEnvoy(2, sotw(CDS));
    const effects = cache.fromUpstream(response(CDS, "up-1", { a: "1" }));
    const [one, two] = [1, 2].map((stream) => toEnvoy(effects, stream)[0]?.nonce ?? "");
    return { cache, one: one ?? "", two: two ?? "" };
  }

  test("istiod hears the ACK when the last of them has said it", () => {
    const { cache, one, two } = waiting();
    expect(toIstiod(cache.fromEnvoy(1, request(CDS, { responseNonce: one })))).toEqual([]);
    expect(cache.status()[0]?.acked).toBe(undefined);
    expect(toIstiod(cache.fromSotwEnvoy(2, sotw(CDS, { responseNonce: two })))).toEqual([
      request(CDS, { responseNonce: "up-1" }),
    ]);
    expect(cache.status()[0]?.acked).toBe("vup-1");
  });

  test("the NACK of one goes up at once, and the other's ACK does not hide it, whichever is first", () => {
    for (const nackFirst of [true, false]) {
      const { cache, one, two } = waiting();
      const ack = () => toIstiod(cache.fromEnvoy(1, request(CDS, { responseNonce: one })));
      const nack = () => toIstiod(cache.fromSotwEnvoy(2, sotw(CDS, { responseNonce: two, error })));
      const said = nackFirst ? [...nack(), ...ack()] : [...ack(), ...nack()];
      expect(said).toEqual([request(CDS, { responseNonce: "up-1", error })]);
      expect(lastNack(cache)).toBe("no such filter");
      expect(cache.status()[0]?.acked).toBe(undefined);
    }
  });

  test("what stands refused is refused again when istiod sends the same after a reconnect", () => {
    const { cache, one, two } = waiting();
    cache.fromEnvoy(1, request(CDS, { responseNonce: one }));
    cache.fromSotwEnvoy(2, sotw(CDS, { responseNonce: two, error }));
    cache.upstreamClosed();
    cache.upstreamOpened();
    expect(cache.fromUpstream(response(CDS, "up-2", { a: "1" }))).toEqual([
      { to: "upstream", request: request(CDS, { responseNonce: "up-2", error }) },
    ]);
    expect(lastNack(cache)).toBe("no such filter");
  });

  test("one that goes away without an answer leaves the ACK to the other, and takes its NACK along", () => {
    const silent = waiting();
    silent.cache.fromEnvoy(1, request(CDS, { responseNonce: silent.one }));
    expect(toIstiod(silent.cache.envoyClosed(2))).toEqual([request(CDS, { responseNonce: "up-1" })]);

    const { cache, two } = waiting();
    cache.fromSotwEnvoy(2, sotw(CDS, { responseNonce: two, error }));
    expect(toIstiod(cache.envoyClosed(2))).toEqual([]);
    expect(lastNack(cache)).toBe(undefined);
  });
});

function sotw(typeUrl: string, more: Partial<SotwRequest> = {}): SotwRequest {
  return { typeUrl, version: "", names: [], responseNonce: "", ...more };
}

describe("state of the world", () => {
  function connectedSotw(): DeltaCache {
    const cache = new DeltaCache();
    cache.envoyOpened(1, "sotw");
    cache.upstreamOpened();
    return cache;
  }
  const LDS = TYPE_URL.listener;
  const RDS = TYPE_URL.route;

  test.for([CDS, LDS])("%s go whole: what changed, what did not, and without what is gone", (typeUrl) => {
    const cache = connectedSotw();
    expect(toIstiod(cache.fromSotwEnvoy(1, sotw(typeUrl)))).toEqual([request(typeUrl)]);
    const first = toEnvoy(cache.fromUpstream(response(typeUrl, "1", { a: "1", b: "1", c: "1" })));
    const second = toEnvoy(cache.fromUpstream(response(typeUrl, "2", { b: "2" }, ["c"])));
    expect([names(first), names(second)]).toEqual([
      ["a", "b", "c"],
      ["a", "b"],
    ]);
    expect(second[0]?.removed).toEqual([]);
    expect(second[0]?.systemVersion).not.toBe(first[0]?.systemVersion);
  });

  test("nothing goes before istiod has said all of a type: half a world would remove the other half", () => {
    const cache = connectedSotw();
    expect(toEnvoy(cache.fromSotwEnvoy(1, sotw(CDS, { version: "x" })))).toEqual([]);
    cache.upstreamClosed();
    expect(toEnvoy(cache.upstreamOpened())).toEqual([]);
  });

  test("endpoints and routes go as asked; a name that is given up is taken back from istiod", () => {
    const cache = connectedSotw();
    expect(toIstiod(cache.fromSotwEnvoy(1, sotw(EDS, { names: ["a", "b"] })))).toEqual([
      request(EDS, { subscribe: ["a", "b"] }),
    ]);
    expect(names(toEnvoy(cache.fromUpstream(response(EDS, "1", { a: "1", b: "1" }))))).toEqual(["a", "b"]);
    expect(names(toEnvoy(cache.fromUpstream(response(EDS, "2", { b: "2" }))))).toEqual(["b"]);
    expect(toIstiod(cache.fromSotwEnvoy(1, sotw(EDS, { names: ["b", "c"] })))).toEqual([
      request(EDS, { unsubscribe: ["a"] }),
      request(EDS, { subscribe: ["c"] }),
    ]);
    expect(toIstiod(cache.fromSotwEnvoy(1, sotw(EDS)))).toEqual([request(EDS, { unsubscribe: ["b", "c"] })]);
  });

  test("endpoints that do not exist are an empty list, for which Envoy would wait for ever; routes are not said", () => {
    const cache = connectedSotw();
    for (const typeUrl of [EDS, RDS]) cache.fromSotwEnvoy(1, sotw(typeUrl, { names: ["a"] }));
    const [none] = toEnvoy(cache.fromUpstream(response(EDS, "1", {}, ["a"])));
    expect(none?.resources).toEqual([
      { name: "a", version: "", any: writeAny(EDS, Buffer.from("\x0a\x01a")) },
    ]);
    expect(cache.fromUpstream(response(RDS, "2", {}, ["a"]))).toEqual([
      { to: "upstream", request: request(RDS, { responseNonce: "2" }) },
    ]);
  });

  test("a changed cluster is followed by its own endpoints, and by no other's", () => {
    const cache = connectedSotw();
    cache.fromSotwEnvoy(1, sotw(CDS));
    cache.fromUpstream(response(CDS, "c1", { a: "1", b: "1" }));
    cache.fromSotwEnvoy(1, sotw(EDS, { names: ["a", "b"] }));
    cache.fromUpstream(response(EDS, "e1", { a: "ep", b: "ep" }));
    const pushed = toEnvoy(cache.fromUpstream(response(CDS, "c2", { a: "2" })));
    expect(pushed.map((it) => [it.typeUrl, names([it])])).toEqual([
      [CDS, ["a", "b"]],
      [EDS, ["a"]],
    ]);
  });

  test("what is on disk comes clusters first, then endpoints, listeners, routes", () => {
    const cache = connectedSotw();
    for (const typeUrl of [LDS, CDS]) cache.fromSotwEnvoy(1, sotw(typeUrl));
    for (const typeUrl of [RDS, EDS]) cache.fromSotwEnvoy(1, sotw(typeUrl, { names: ["a"] }));
    const set: ResourceSet = new Map(
      [RDS, LDS, EDS, CDS].map((typeUrl) => [typeUrl, response(typeUrl, "", { a: "1" }).resources]),
    );
    expect(toEnvoy(cache.restore(set)).map(({ typeUrl }) => typeUrl)).toEqual([CDS, EDS, LDS, RDS]);
  });

  test("an Envoy that is up is neither emptied nor set back by what is on disk", () => {
    const cache = connectedSotw();
    cache.fromSotwEnvoy(1, sotw(CDS, { version: "x" }));
    cache.fromSotwEnvoy(1, sotw(EDS, { version: "x", names: ["a"] }));
    const old = (typeUrl: string) => response(typeUrl, "", { a: "old" }).resources;
    const set: ResourceSet = new Map([CDS, EDS].map((typeUrl) => [typeUrl, old(typeUrl)]));
    expect(toEnvoy(cache.restore(set))).toEqual([]);
    const pushed = toEnvoy(cache.fromUpstream(response(CDS, "1", { a: "new" })));
    expect(names(pushed.filter(({ typeUrl }) => typeUrl === CDS))).toEqual(["a"]);
  });

  test("after an agent restart, an Envoy that says the same version is sent no clusters, and any other all of them", () => {
    const before = connectedSotw();
    before.fromSotwEnvoy(1, sotw(CDS));
    const [first] = toEnvoy(before.fromUpstream(response(CDS, "1", { a: "1", b: "1" })));
    for (const [answer, pushed] of [
      [{ b: "1", a: "1" }, []],
      [{ a: "1", b: "2" }, ["a", "b"]],
    ] as const) {
      const after = connectedSotw();
      after.fromSotwEnvoy(1, sotw(CDS, { version: first?.systemVersion ?? "" }));
      expect(names(toEnvoy(after.fromUpstream(response(CDS, "1", answer))))).toEqual(pushed);
      // Set back by istiod: what it came with is not what it holds any more.
      const back = after.fromUpstream(response(CDS, "2", { a: "1", b: "1" }));
      expect(names(toEnvoy(back))).toEqual(pushed);
    }
  });
});

/** What Envoy keeps of one type: it applies what comes and acknowledges it. */
class ModelEnvoy {
  readonly id: number;
  readonly holds = new Map<string, { any: Uint8Array; version: string }>();
  readonly names = new Set<string>();
  readonly typeUrl: string;
  readonly cache: DeltaCache;
  #first = true;
  constructor(cache: DeltaCache, id: number, typeUrl: string) {
    this.cache = cache;
    this.id = id;
    this.typeUrl = typeUrl;
  }
  open(): void {
    this.cache.envoyOpened(this.id);
  }
  /** The same Envoy on its next stream. */
  reconnects(id: number): ModelEnvoy {
    const next = new ModelEnvoy(this.cache, id, this.typeUrl);
    for (const [held, value] of this.holds) next.holds.set(held, value);
    return next;
  }
  ask(subscribe: readonly string[], unsubscribe: readonly string[]): Effect[] {
    for (const name of subscribe) this.names.add(name);
    for (const name of unsubscribe) {
      this.names.delete(name);
      this.holds.delete(name);
    }
    const initialVersions = new Map(
      this.#first ? [...this.holds].map(([name, { version }]) => [name, version]) : [],
    );
    this.#first = false;
    const asked = request(this.typeUrl, { subscribe, unsubscribe, initialVersions });
    return this.cache.fromEnvoy(this.id, asked);
  }
  apply(pushed: DeltaResponse): Effect[] {
    for (const { name, any, version } of pushed.resources) {
      expect(this.holds.get(name)?.any, `${name} is pushed although nothing changed`).not.toEqual(any);
      this.holds.set(name, { any, version });
    }
    for (const name of pushed.removed) this.holds.delete(name);
    return this.cache.fromEnvoy(this.id, request(this.typeUrl, { responseNonce: pushed.nonce }));
  }
}

/** The same in state of the world: it asks by all its names, and what a response of clusters leaves out is gone. */
class ModelSotwEnvoy extends ModelEnvoy {
  #version = "";
  #nonce = "";
  override open(): void {
    this.cache.envoyOpened(this.id, "sotw");
  }
  override reconnects(id: number): ModelSotwEnvoy {
    const next = new ModelSotwEnvoy(this.cache, id, this.typeUrl);
    for (const [held, value] of this.holds) next.holds.set(held, value);
    next.#version = this.#version;
    return next;
  }
  override ask(subscribe: readonly string[], unsubscribe: readonly string[]): Effect[] {
    for (const name of subscribe) this.names.add(name);
    for (const name of unsubscribe) {
      this.names.delete(name);
      this.holds.delete(name);
    }
    return this.#say();
  }
  override apply(pushed: DeltaResponse): Effect[] {
    expect(pushed.removed).toEqual([]);
    if (this.typeUrl === CDS) {
      expect(pushed.systemVersion, "the same world is pushed again").not.toBe(this.#version);
      this.holds.clear();
    }
    for (const { name, any, version } of pushed.resources) {
      if (version === "") this.holds.delete(name);
      else this.holds.set(name, { any, version });
    }
    this.#version = pushed.systemVersion;
    this.#nonce = pushed.nonce;
    return this.#say();
  }
  #say(): Effect[] {
    const said = { version: this.#version, names: [...this.names], responseNonce: this.#nonce };
    return this.cache.fromSotwEnvoy(this.id, sotw(this.typeUrl, said));
  }
}

/** istiod with one type: answers subscriptions, pushes changes, and counts which of its nonces were answered. */
class ModelIstiod {
  readonly truth = new Map<string, string>();
  #wants: { wildcard: boolean; names: Set<string> } | undefined;
  #knows = new Set<string>();
  #nonce = 0;
  readonly unanswered = new Set<string>();
  readonly typeUrl: string;
  constructor(typeUrl: string) {
    this.typeUrl = typeUrl;
  }
  hear(it: DeltaRequest): DeltaResponse[] {
    if (it.responseNonce !== "") {
      this.unanswered.delete(it.responseNonce);
      return [];
    }
    const first = this.#wants === undefined;
    this.#wants ??= { wildcard: it.subscribe.length === 0, names: new Set() };
    if (first) this.#knows = new Set(it.initialVersions.keys());
    for (const name of it.subscribe) {
      if (name === "*") this.#wants.wildcard = true;
      else this.#wants.names.add(name);
    }
    for (const name of it.unsubscribe) this.#wants.names.delete(name);
    return first || it.subscribe.length > 0
      ? [this.#answer(first && this.#wants.wildcard ? undefined : it.subscribe)]
      : [];
  }
  change(name: string, content: string | undefined): DeltaResponse[] {
    if (content === undefined) this.truth.delete(name);
    else this.truth.set(name, content);
    const wants = this.#wants;
    if (wants === undefined || !(wants.wildcard || wants.names.has(name))) return [];
    return [this.#answer([name])];
  }
  cut(): void {
    this.#wants = undefined;
    this.unanswered.clear();
  }
  #answer(which: readonly string[] | undefined): DeltaResponse {
    const asked = which ?? [...new Set([...this.truth.keys(), ...this.#knows])];
    const resources: Record<string, string> = {};
    const removed: string[] = [];
    for (const name of asked) {
      const content = this.truth.get(name);
      if (content === undefined) removed.push(name);
      else resources[name] = content;
    }
    this.#nonce += 1;
    this.unanswered.add(String(this.#nonce));
    return response(this.typeUrl, String(this.#nonce), resources, removed);
  }
}

const NAMES = ["a", "b", "c"] as const;
const name = fc.constantFrom(...NAMES);
const step = fc.oneof(
  fc.record({
    do: fc.constant("change" as const),
    name,
    content: fc.option(fc.constantFrom("1", "2"), { nil: undefined }),
  }),
  fc.record({ do: fc.constant("want" as const), envoy: fc.constantFrom(1, 2), name }),
  fc.record({ do: fc.constant("drop" as const), envoy: fc.constantFrom(1, 2), name }),
  fc.record({ do: fc.constant("envoy-reconnects" as const), envoy: fc.constantFrom(1, 2) }),
  fc.record({ do: fc.constant("istiod-reconnects" as const) }),
);

describe.for([
  ["clusters, all of them, two of delta", CDS, ModelEnvoy],
  ["endpoints, by name, two of delta", EDS, ModelEnvoy],
  ["clusters, all of them, one of delta, one of state of the world", CDS, ModelSotwEnvoy],
  ["endpoints, by name, one of delta, one of state of the world", EDS, ModelSotwEnvoy],
] as const)("%s: whatever happens", ([, typeUrl, second]) => {
  test("each Envoy ends up with what it wants of what istiod has, nothing is pushed twice, every nonce is answered", () => {
    fc.assert(
      fc.property(fc.array(step, { maxLength: 25 }), (steps) => {
        const cache = new DeltaCache();
        const istiod = new ModelIstiod(typeUrl);
        const envoys = new Map<number, ModelEnvoy>();
        let stream = 0;
        const carry = (effects: readonly Effect[]): void => {
          for (const effect of effects) {
            if (effect.to === "upstream")
              for (const it of istiod.hear(effect.request)) carry(cache.fromUpstream(it));
            else {
              const envoy = [...envoys.values()].find(({ id }) => id === effect.stream);
              if (envoy !== undefined) carry(envoy.apply(effect.response));
            }
          }
        };
        const connect = (which: number): void => {
          const before = envoys.get(which);
          stream += 1;
          const Model = which === 2 ? second : ModelEnvoy;
          const envoy = before?.reconnects(stream) ?? new Model(cache, stream, typeUrl);
          envoys.set(which, envoy);
          if (before !== undefined) carry(cache.envoyClosed(before.id));
          envoy.open();
          if (typeUrl === CDS) carry(envoy.ask([], []));
          else if ((before?.names.size ?? 0) > 0) carry(envoy.ask([...(before?.names ?? [])], []));
        };
        carry(cache.upstreamOpened());
        connect(1);
        connect(2);
        for (const it of steps) {
          if (it.do === "change")
            for (const pushed of istiod.change(it.name, it.content)) carry(cache.fromUpstream(pushed));
          else if (it.do === "istiod-reconnects") {
            cache.upstreamClosed();
            istiod.cut();
            carry(cache.upstreamOpened());
          } else if (it.do === "envoy-reconnects") connect(it.envoy);
          else if (typeUrl === EDS) {
            const envoy = envoys.get(it.envoy);
            const has = envoy?.names.has(it.name) === true;
            if (envoy === undefined || has === (it.do === "want")) continue;
            const [subscribe, unsubscribe] = it.do === "want" ? [[it.name], []] : [[], [it.name]];
            carry(envoy.ask(subscribe, unsubscribe));
          }
        }
        for (const envoy of envoys.values()) {
          const want = [...istiod.truth].filter(([key]) => typeUrl === CDS || envoy.names.has(key));
          expect(
            Object.fromEntries([...envoy.holds].map(([key, { any }]) => [key, Buffer.from(any)])),
          ).toEqual(
            Object.fromEntries(
              want.map(([key, content]) => [key, Buffer.from(bytesOf(typeUrl, key, content))]),
            ),
          );
        }
        expect([...istiod.unanswered]).toEqual([]);
      }),
      { numRuns: 300 },
    );
  });
});

describe("extensions that only Istio's own Envoy has", () => {
  const STATS = "type.googleapis.com/stats.PluginConfig";
  /** A cluster with upstream network filters (40; typed_config 2) of these types. */
  const cluster = (...types: readonly string[]): Uint8Array => {
    const writer = new BinaryWriter();
    put(writer, 1, "a");
    for (const type of types) {
      const filter = new BinaryWriter();
      put(filter, 2, writeAny(type, Buffer.from("x")));
      put(writer, 40, filter.finish());
    }
    return writeAny(CDS, writer.finish());
  };
  const sent: DeltaResponse = {
    ...response(CDS, "up-1", {}),
    resources: [{ name: "a", version: "", any: cluster(STATS) }],
  };
  const [stock, istios] = [1, 2];

  function both(): { cache: DeltaCache; effects: readonly Effect[] } {
    const cache = connected();
    cache.envoyOpened(istios);
    cache.envoyHas(stock, () => false);
    cache.envoyHas(istios, () => true);
    cache.fromEnvoy(stock, request(CDS));
    cache.fromEnvoy(istios, request(CDS));
    return { cache, effects: cache.fromUpstream(sent) };
  }

  test("each of two Envoys gets what it can load, under one version", () => {
    const { cache, effects } = both();
    const [without] = toEnvoy(effects, stock)[0]?.resources ?? [];
    const [with_] = toEnvoy(effects, istios)[0]?.resources ?? [];
    expect(Buffer.from(without?.any ?? [])).toEqual(Buffer.from(cluster()));
    expect(Buffer.from(with_?.any ?? [])).toEqual(Buffer.from(cluster(STATS)));
    expect(without?.version).toBe(with_?.version);
    expect(cache.stripped()).toEqual(["istio.stats"]);
  });

  test("the same from istiod again is no push, neither on this stream nor to one that says it holds it", () => {
    const { cache, effects } = both();
    expect(toEnvoy(cache.fromUpstream({ ...sent, nonce: "up-2" }), stock)).toEqual([]);
    const version = toEnvoy(effects, stock)[0]?.resources[0]?.version ?? "";
    cache.envoyOpened(3);
    cache.envoyHas(3, () => false);
    const again = cache.fromEnvoy(3, request(CDS, { initialVersions: new Map([["a", version]]) }));
    expect(toEnvoy(again, 3)).toEqual([]);
  });

  test("what is said follows the Envoys and what istiod sends", () => {
    const { cache } = both();
    cache.envoyClosed(stock);
    expect(cache.stripped()).toEqual([]);
    cache.envoyClosed(istios);
    expect(cache.stripped()).toBeUndefined();
    cache.envoyOpened(stock);
    cache.envoyHas(stock, () => false);
    expect(cache.stripped()).toEqual(["istio.stats"]);
    cache.fromUpstream({ ...sent, resources: [{ name: "a", version: "", any: cluster() }] });
    expect(cache.stripped()).toEqual([]);
  });
});

describe("what was accepted, and a start without upstream", () => {
  const LDS = TYPE_URL.listener;
  /** One Envoy with a cluster, its endpoints and a listener, as istiod sends them; nothing acknowledged yet. */
  function loaded(): { cache: DeltaCache; nonces: { typeUrl: string; nonce: string }[] } {
    const cache = connected();
    cache.fromEnvoy(1, request(CDS));
    const nonces = toEnvoy(cache.fromUpstream(response(CDS, "1", { a: "1", b: "1" })));
    cache.fromEnvoy(1, request(EDS, { subscribe: ["a"] }));
    nonces.push(...toEnvoy(cache.fromUpstream(response(EDS, "2", { a: "ends" }))));
    cache.fromEnvoy(1, request(LDS));
    nonces.push(...toEnvoy(cache.fromUpstream(response(LDS, "3", { l: "1" }))));
    return { cache, nonces };
  }
  function accept({ cache, nonces }: ReturnType<typeof loaded>): ResourceSet {
    for (const { typeUrl, nonce } of nonces) cache.fromEnvoy(1, request(typeUrl, { responseNonce: nonce }));
    const set = cache.accepted();
    if (set === undefined) throw new Error("nothing was accepted");
    return set;
  }

  test("there is no set before the last ACK, and none while something is refused", () => {
    const it = loaded();
    for (const { typeUrl, nonce } of it.nonces) {
      expect(it.cache.accepted()).toBeUndefined();
      it.cache.fromEnvoy(1, request(typeUrl, { responseNonce: nonce }));
    }
    expect([...(it.cache.accepted()?.keys() ?? [])].sort()).toEqual([CDS, EDS, LDS].sort());
    const [bad] = toEnvoy(it.cache.fromUpstream(response(LDS, "4", { l: "2" })));
    it.cache.fromEnvoy(
      1,
      request(LDS, { responseNonce: bad?.nonce ?? "", error: { code: 3, message: "no" } }),
    );
    expect(it.cache.accepted()).toBeUndefined();
  });

  test("there is no set while a name that Envoy asked for is neither there nor said to be absent", () => {
    const it = loaded();
    accept(it);
    it.cache.fromEnvoy(1, request(EDS, { subscribe: ["b"] }));
    expect(it.cache.accepted()).toBeUndefined();
    const [answer] = toEnvoy(it.cache.fromUpstream(response(EDS, "4", {}, ["b"])));
    it.cache.fromEnvoy(1, request(EDS, { responseNonce: answer?.nonce ?? "" }));
    expect(it.cache.accepted()).toBeDefined();
  });

  test("a secret is never in the set, nor restored from one", () => {
    const it = loaded();
    it.cache.fromEnvoy(1, request(TYPE_URL.secret, { subscribe: ["default"] }));
    it.nonces.push(...toEnvoy(it.cache.fromUpstream(response(TYPE_URL.secret, "4", { default: "key" }))));
    expect(accept(it).has(TYPE_URL.secret)).toBe(false);
    const cold = new DeltaCache();
    cold.restore(new Map([[TYPE_URL.secret, [{ name: "default", version: "", any: Buffer.of() }]]]));
    expect(cold.has(TYPE_URL.secret, "default")).toBe(false);
  });

  test("an Envoy that starts empty gets the restored set, and from istiod only what differs", () => {
    const cold = new DeltaCache();
    cold.envoyOpened(1);
    cold.fromEnvoy(1, request(CDS));
    expect(names(toEnvoy(cold.restore(accept(loaded()))))).toEqual(["a", "b"]);
    expect(names(toEnvoy(cold.fromEnvoy(1, request(EDS, { subscribe: ["a"] }))))).toEqual(["a"]);
    expect(names(toEnvoy(cold.fromEnvoy(1, request(LDS))))).toEqual(["l"]);
    expect([cold.stale, cold.accepted()]).toEqual([true, undefined]);

    const asked = toIstiod(cold.upstreamOpened());
    expect(asked.map(({ typeUrl, initialVersions }) => [typeUrl, [...initialVersions.keys()]])).toEqual([
      [CDS, ["a", "b"]],
      [EDS, ["a"]],
      [LDS, ["l"]],
    ]);
    const [clusters] = toEnvoy(cold.fromUpstream(response(CDS, "9", { a: "1", c: "1" }, ["b"])));
    expect([clusters?.resources.map(({ name }) => name), clusters?.removed]).toEqual([["c"], ["b"]]);
    expect(toEnvoy(cold.fromUpstream(response(LDS, "10", { l: "1" })))).toEqual([]);
    expect(cold.stale).toBe(true);
    expect(toEnvoy(cold.fromUpstream(response(EDS, "11", { a: "ends" })))).toEqual([]);
    expect(cold.stale).toBe(false);
  });

  test("an Envoy that is up already is not set back to what is on disk", () => {
    const cold = new DeltaCache();
    cold.envoyOpened(1);
    cold.restore(accept(loaded()));
    const held = new Map([
      ["a", "a newer one"],
      ["z", "not on disk"],
    ]);
    expect(toEnvoy(cold.fromEnvoy(1, request(CDS, { initialVersions: held })))).toEqual([]);
  });

  test("what istiod has said already is not overwritten from disk, and what has ended is served to nobody", () => {
    const set = accept(loaded());
    const late = connected();
    late.fromEnvoy(1, request(CDS));
    late.fromUpstream(response(CDS, "1", { new: "1" }));
    late.restore(set);
    expect([late.has(CDS, "new"), late.has(CDS, "a"), late.has(LDS, "l")]).toEqual([true, false, true]);
    late.forgetRestored();
    expect([late.has(CDS, "new"), late.has(LDS, "l"), late.stale]).toEqual([true, false, false]);
    expect(toEnvoy(late.fromEnvoy(1, request(LDS)))).toEqual([]);
  });
});
