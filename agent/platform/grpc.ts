import type { Duplex } from "node:stream";
import {
  Client,
  type ClientDuplexStream,
  credentials,
  Metadata,
  Server,
  ServerCredentials,
  type ServerDuplexStream,
  type ServiceError,
  status,
} from "@grpc/grpc-js";
import { VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";

/** Where and as whom to speak gRPC over TLS. */
export interface GrpcTarget {
  /** IP address to dial. */
  readonly address: string;
  readonly port: number;
  /** Name that the server's certificate must bear; sent as SNI and :authority. */
  readonly serverName: string;
  /** PEM roots that may have signed it. */
  readonly rootCert: string;
  readonly client?: { readonly key: string; readonly chain: string };
  /** Sent with each call, names in lower case. */
  readonly metadata: Readonly<Record<string, string>>;
}

const bytes = (message: Uint8Array): Buffer =>
  Buffer.from(message.buffer, message.byteOffset, message.byteLength);
/** A certificate chain with its roots, the CA's one answer, is some KiB. */
const MAX_UNARY_BYTES = 1024 * 1024;
/**
 * One push of a big mesh is far beyond gRPC's default of 4 MiB; but what claims more than this is not one, and its sender
 * is not to decide how much memory the agent takes.
 */
const MAX_STREAM_BYTES = 512 * 1024 * 1024;
/** Envoy names what it has when it connects again: 100,000 names with their versions are some 10 MiB. */
const MAX_SERVED_BYTES = 64 * 1024 * 1024;
/** Each worker thread of Envoy has a connection of its own for the access log, and one Envoy may leave while the next comes. */
const MAX_SERVED_CONNECTIONS = 1024;

const same = (message: Buffer): Buffer => message;

function clientOf(target: GrpcTarget, maxBytes: number): Client {
  const host = target.address.includes(":")
    ? `ipv6:[${target.address}]:${target.port}`
    : `ipv4:${target.address}:${target.port}`;
  const tls = credentials.createSsl(
    Buffer.from(target.rootCert),
    target.client === undefined ? null : Buffer.from(target.client.key),
    target.client === undefined ? null : Buffer.from(target.client.chain),
  );
  return new Client(host, tls, {
    "grpc.ssl_target_name_override": target.serverName,
    "grpc.default_authority": target.serverName,
    "grpc.max_receive_message_length": maxBytes,
    "grpc.max_send_message_length": -1,
    // As Istio's own agent keeps the connection alive (GRPC_KEEPALIVE_INTERVAL, _TIMEOUT).
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    // One connection per call of ours: credentials belong to it and may be new at the next.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_retries": 0,
    // The proxy of an operator's shell is for the internet; istiod is dialled as given.
    "grpc.enable_http_proxy": 0,
  });
}

function metadataOf(target: GrpcTarget): Metadata {
  const metadata = new Metadata();
  for (const [name, value] of Object.entries(target.metadata)) metadata.set(name, value);
  return metadata;
}

/**
 * One request, one response.
 * @throws {VmmeshError} see `grpcError`
 */
export function unary(
  target: GrpcTarget,
  path: string,
  request: Uint8Array,
  timeoutMs: number,
  signal: AbortSignal,
): Promise<Uint8Array> {
  // An abort that came before would never reach the listener below.
  if (signal.aborted) return Promise.reject(signal.reason);
  const client = clientOf(target, MAX_UNARY_BYTES);
  const scope = new AbortController();
  return new Promise<Uint8Array>((resolve, reject) => {
    const call = client.makeUnaryRequest(
      path,
      bytes,
      same,
      request,
      metadataOf(target),
      { deadline: Date.now() + timeoutMs },
      (error, response) => {
        if (error === null && response !== undefined) resolve(response);
        else reject(signal.aborted ? signal.reason : grpcError(error as ServiceError, target));
      },
    );
    signal.addEventListener("abort", () => call.cancel(), { once: true, signal: scope.signal });
  }).finally(() => {
    scope.abort();
    client.close();
  });
}

/** A bidirectional stream of raw messages. */
export interface ByteStream {
  /** Buffers without limit: the messages that we send are small (a bounded queue dead-locks against istiod's back-pressure). */
  send(message: Uint8Array): void;
  /** Resolves when the peer ended the stream in order; rejects with a VmmeshError otherwise. `onMessage` may ask for a pause. */
  readonly done: Promise<void>;
  pause(): void;
  resume(): void;
  close(): void;
}

/**
 * How long TCP and TLS may take. grpc-js has no bound of its own: a load balancer that takes the connection and has nobody
 * behind it was seen to be waited for beyond 25 s, with the next address untried.
 */
const CONNECT_MS = 10 * SECOND_MS;

/**
 * Opens a stream; `onMessage` gets each message as it comes.
 * @param connectMs without a connection after that, `done` rejects with ISTIOD_UNREACHABLE
 */
export function openStream(
  target: GrpcTarget,
  path: string,
  onMessage: (message: Uint8Array) => void,
  connectMs: number = CONNECT_MS,
): ByteStream {
  const client = clientOf(target, MAX_STREAM_BYTES);
  const call: ClientDuplexStream<Uint8Array, Buffer> = client.makeBidiStreamRequest(
    path,
    bytes,
    same,
    metadataOf(target),
  );
  const done = new Promise<void>((resolve, reject) => {
    call.on("data", onMessage);
    call.on("error", (error: ServiceError) => reject(grpcError(error, target)));
    call.on("end", () => resolve());
    client.waitForReady(Date.now() + connectMs, (late) => {
      if (late === undefined) return;
      const details = `no connection within ${connectMs / SECOND_MS} s`;
      reject(
        grpcError(
          Object.assign(late, { code: status.UNAVAILABLE, details, metadata: new Metadata() }),
          target,
        ),
      );
      call.cancel();
    });
  }).finally(() => client.close());
  return {
    send: (message) => void call.write(message),
    done,
    pause: () => call.pause(),
    resume: () => call.resume(),
    close: () => call.cancel(),
  };
}

const SET_THE_CLOCK = "`timedatectl` tells whether this machine's clock is synchronized";

/**
 * A gRPC failure as a sentence with its suspect.
 *
 * ISTIOD_UNREACHABLE: no TCP connection, the server is not ready, or it ended the call. ISTIOD_UNTRUSTED: the TLS
 * handshake failed on its certificate. CERT_WRONG_ROOT: on ours. CLOCK_OFF: on the dates of ours, which by our clock are
 * good. IDENTITY_REFUSED: it answered, and did not accept who we are.
 */
export function grpcError(error: ServiceError, target: GrpcTarget): VmmeshError {
  const where = `${target.address}:${target.port}`;
  const why = (error.details || error.message).replace(/\s*\n\s*/g, " ");
  const cause = new Error(why);
  if (error.code === status.UNAUTHENTICATED || error.code === status.PERMISSION_DENIED) {
    return new VmmeshError("IDENTITY_REFUSED", `istiod at ${where} does not accept this machine's identity`, {
      cause,
      next: "Make a new token (`vmmesh bundle create`, or join with a kubeconfig): the old one may be expired, of another service account than the machine says, or of another cluster than ISTIO_META_CLUSTER_ID in cluster.env.",
    });
  }
  if (/alert certificate expired|alert (?:number )?45/i.test(why)) {
    // What has ended by our own clock is never presented. Go says the same of a certificate that is not valid yet
    // (crypto/tls, processCertsFromClient: x509.Expired stands for both).
    return new VmmeshError(
      "CLOCK_OFF",
      `istiod at ${where} finds this machine's certificate expired or not valid yet, which it is not by this machine's clock`,
      { cause, next: `One of the two clocks is wrong: ${SET_THE_CLOCK}.` },
    );
  }
  if (
    /certificate unknown|bad certificate|unknown ca|certificate required|alert (?:number )?(?:42|46|48|116)/i.test(
      why,
    )
  ) {
    return new VmmeshError("CERT_WRONG_ROOT", `istiod at ${where} refuses this machine's certificate`, {
      cause,
      next: "The mesh has another root than the one that signed it: join again with a fresh token.",
    });
  }
  if (/altnames/i.test(why)) {
    // Every istiod has the plain name in its certificate, one of a revision `istiod-REVISION` too, and none has another's
    // (istio.io/istio, pilot/pkg/bootstrap, getDNSNames): this is what tells revisions apart.
    return new VmmeshError("ISTIOD_UNTRUSTED", `the server at ${where} is not ${target.serverName}`, {
      cause,
      next: "Is it another revision of istiod, or a proxy before it? The name that is asked for is the host of discoveryAddress in mesh.yaml.",
    });
  }
  const dated = /certificate (has expired|is not yet valid)/i.exec(why)?.[1];
  if (dated !== undefined) {
    return new VmmeshError(
      "ISTIOD_UNTRUSTED",
      `by this machine's clock the certificate of ${target.serverName} at ${where} ${dated}`,
      {
        cause,
        next: `Is the clock right? ${SET_THE_CLOCK}. If it is, istiod's own certificate or root is to be renewed.`,
      },
    );
  }
  if (/certificate|self.signed|issuer|unable to verify/i.test(why)) {
    return new VmmeshError(
      "ISTIOD_UNTRUSTED",
      `the server at ${where} does not prove to be ${target.serverName} of this mesh`,
      {
        cause,
        next: "Check the address, and that root-cert.pem is of this mesh: ConfigMap istio-ca-root-cert in the workload's namespace.",
      },
    );
  }
  if (/wrong version number|packet length too long/i.test(why)) {
    return new VmmeshError(
      "ISTIOD_UNTRUSTED",
      `the server at ${where} does not speak TLS: it is not istiod`,
      {
        cause,
        next: "Check address and port: istiod's are those of discoveryAddress in mesh.yaml, usually 15012.",
      },
    );
  }
  if (error.code === status.UNAVAILABLE || error.code === status.DEADLINE_EXCEEDED) {
    return new VmmeshError("ISTIOD_UNREACHABLE", `istiod does not answer at ${where}`, {
      cause,
      next: `Is the address right (--istiod-address), and does a firewall let port ${target.port} through? Try: nc -vz ${target.address} ${target.port}`,
    });
  }
  return new VmmeshError(
    "ISTIOD_UNREACHABLE",
    `istiod at ${where} ended the call: ${status[error.code] ?? error.code}: ${why}`,
    {
      cause,
      next: /larger than max/i.test(why)
        ? "A Sidecar resource in the workload's namespace (spec.egress.hosts) narrows the configuration that istiod sends."
        : "What istiod names must be there in the cluster, e.g. the WorkloadGroup: `kubectl get workloadgroups`.",
    },
  );
}

/** A served stream of raw messages. */
export interface ServedStream {
  /** false: the peer reads slowly; wait for `onDrain`. */
  send(message: Uint8Array): boolean;
  onMessage(listener: (message: Uint8Array) => void): void;
  onDrain(listener: () => void): void;
  onClose(listener: () => void): void;
  /** Ends the stream with a gRPC status that the peer will log. */
  fail(message: string): void;
  end(): void;
}

export interface GrpcServer {
  /** Hand it each accepted connection; further ones than 1024 at once are closed. */
  accept(socket: Duplex): void;
  close(): void;
}

/** Serves bidirectional streams on connections that the seam accepted. `handlers`: method path → what to do with a stream. */
export function serveStreams(handlers: Readonly<Record<string, (stream: ServedStream) => void>>): GrpcServer {
  const server = new Server({
    "grpc.max_receive_message_length": MAX_SERVED_BYTES,
    "grpc.max_send_message_length": -1,
    "grpc.max_concurrent_streams": 1024,
  });
  const byService = new Map<string, [string, (stream: ServedStream) => void][]>();
  for (const [path, handler] of Object.entries(handlers)) {
    const [, service = "", method = ""] = path.split("/");
    byService.set(service, [...(byService.get(service) ?? []), [method, handler]]);
  }
  for (const [service, methods] of byService) {
    const definition = Object.fromEntries(
      methods.map(([method]) => [
        method,
        {
          path: `/${service}/${method}`,
          requestStream: true,
          responseStream: true,
          requestSerialize: bytes,
          requestDeserialize: same,
          responseSerialize: bytes,
          responseDeserialize: same,
        },
      ]),
    );
    const implementation = Object.fromEntries(
      methods.map(([method, handler]) => [
        method,
        (call: ServerDuplexStream<Buffer, Uint8Array>) => handler(servedStream(call)),
      ]),
    );
    server.addService(definition, implementation);
  }
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure());
  let connections = 0;
  return {
    accept: (socket) => {
      if (connections >= MAX_SERVED_CONNECTIONS) {
        socket.on("error", () => undefined).destroy();
        return;
      }
      connections += 1;
      socket.once("close", () => {
        connections -= 1;
      });
      injector.injectConnection(socket);
    },
    close: () => {
      injector.destroy();
      server.forceShutdown();
    },
  };
}

function servedStream(call: ServerDuplexStream<Buffer, Uint8Array>): ServedStream {
  let closed = false;
  const closers: (() => void)[] = [];
  const close = (): void => {
    if (closed) return;
    closed = true;
    for (const closer of closers) closer();
  };
  call.on("cancelled", close);
  call.on("error", close);
  call.on("close", close);
  call.on("end", () => {
    call.end();
    close();
  });
  return {
    send: (message) => closed || call.write(message),
    onMessage: (listener) => void call.on("data", listener),
    onDrain: (listener) => void call.on("drain", listener),
    onClose: (listener) => void closers.push(listener),
    fail: (message) => void call.emit("error", { code: status.INTERNAL, details: message }),
    end: () => void call.end(),
  };
}
