import type { Duplex } from "node:stream";
import { messageOf } from "../core/errors.ts";
import type { Latest } from "../core/signals.ts";
import { aborted } from "../core/signals.ts";
import type { Svid } from "../identity/svid.ts";
import { type ServedStream, serveStreams } from "../platform/grpc.ts";
import type { Listener } from "../platform/host.ts";
import {
  readDeltaRequest,
  readSotwRequest,
  TYPE_URL,
  writeDeltaResponse,
  writeSotwResponse,
} from "../proto/discovery.ts";
import { writeTlsCertificate, writeValidationContext } from "../proto/secret.ts";
import { writeAny } from "../proto/wire.ts";

const SERVICE = "/envoy.service.secret.v3.SecretDiscoveryService";

/** The two names that istiod's TLS contexts ask for. */
const SECRETS: Readonly<Record<string, (svid: Svid) => Uint8Array>> = {
  default: (svid) => writeTlsCertificate("default", svid.chain, svid.key),
  ROOTCA: (svid) => writeValidationContext("ROOTCA", svid.roots),
};

export interface SdsDeps {
  listen(onConnection: (socket: Duplex) => void): Promise<Listener>;
  readonly onListening?: () => void;
  /** Envoy refused a secret: its words. */
  onRejected(name: string, reason: string): void;
}

/**
 * Serves Envoy its certificate and the mesh's roots, and pushes both anew whenever they change: rotation needs no
 * restart and drops no connection. An Envoy that asks before there is a certificate waits for the first one.
 */
export async function serveSds(deps: SdsDeps, svids: Latest<Svid>, signal: AbortSignal): Promise<void> {
  const server = serveStreams({
    [`${SERVICE}/StreamSecrets`]: (stream) => serveSotw(deps, svids, stream, signal),
    [`${SERVICE}/DeltaSecrets`]: (stream) => serveDelta(deps, svids, stream, signal),
  });
  await using _listener = await deps.listen((socket) => server.accept(socket));
  deps.onListening?.();
  await aborted(signal);
  server.close();
}

const anyOf = (name: string, svid: Svid): Uint8Array =>
  writeAny(TYPE_URL.secret, SECRETS[name]?.(svid) ?? new Uint8Array());
const known = (names: readonly string[]): string[] => names.filter((name) => Object.hasOwn(SECRETS, name));

function scopeOf(stream: ServedStream, signal: AbortSignal): AbortSignal {
  const gone = new AbortController();
  stream.onClose(() => gone.abort());
  return AbortSignal.any([signal, gone.signal]);
}

/** Bytes that are no request end the stream that they came on; thrown from a listener they would end the agent. */
function readable<T>(stream: ServedStream, read: () => T): T | undefined {
  try {
    return read();
  } catch (thrown) {
    stream.fail(`not a discovery request: ${messageOf(thrown)}`);
    return undefined;
  }
}

function serveSotw(deps: SdsDeps, svids: Latest<Svid>, stream: ServedStream, signal: AbortSignal): void {
  let names: string[] = [];
  let nonce = 0;
  const push = (svid: Svid): void => {
    if (names.length === 0) return;
    nonce += 1;
    const resources = names.map((name) => anyOf(name, svid));
    stream.send(
      writeSotwResponse({ version: svid.serial, typeUrl: TYPE_URL.secret, nonce: String(nonce), resources }),
    );
  };
  stream.onMessage((message) => {
    const request = readable(stream, () => readSotwRequest(message));
    if (request === undefined) return;
    if (request.error !== undefined) deps.onRejected(names.join(", "), request.error.message);
    const wanted = known(request.names);
    const changed = wanted.join() !== names.join();
    names = wanted;
    // Else it is the answer to what was sent.
    if (changed && svids.value !== undefined) push(svids.value);
  });
  svids.subscribe(push, scopeOf(stream, signal));
}

function serveDelta(deps: SdsDeps, svids: Latest<Svid>, stream: ServedStream, signal: AbortSignal): void {
  const names = new Set<string>();
  let nonce = 0;
  const push = (svid: Svid, which: Iterable<string>): void => {
    const resources = [...which].map((name) => ({ name, version: svid.serial, any: anyOf(name, svid) }));
    if (resources.length === 0) return;
    nonce += 1;
    stream.send(
      writeDeltaResponse({
        systemVersion: svid.serial,
        typeUrl: TYPE_URL.secret,
        resources,
        removed: [],
        nonce: String(nonce),
      }),
    );
  };
  stream.onMessage((message) => {
    const request = readable(stream, () => readDeltaRequest(message));
    if (request === undefined) return;
    if (request.error !== undefined) deps.onRejected([...names].join(", "), request.error.message);
    const fresh = known(request.subscribe);
    for (const name of fresh) names.add(name);
    for (const name of request.unsubscribe) names.delete(name);
    if (svids.value !== undefined) push(svids.value, fresh);
  });
  svids.subscribe((svid) => push(svid, names), scopeOf(stream, signal));
}
