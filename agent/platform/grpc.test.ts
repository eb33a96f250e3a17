import { once } from "node:events";
import {
  connect as connectHttp2,
  createSecureServer,
  type IncomingHttpHeaders,
  type ServerHttp2Stream,
} from "node:http2";
import { type AddressInfo, createServer, type Server, type Socket } from "node:net";
import { type Duplex, duplexPair } from "node:stream";
import { setTimeout } from "node:timers/promises";
import { Metadata, status } from "@grpc/grpc-js";
import { afterEach, describe, expect, test } from "vitest";
import { Authority } from "../../test/controlplane/authority.ts";
import { SERVER_NAME, startIstiod } from "../../test/fakes/istiod.ts";
import { DAY_MS } from "../core/time.ts";
import { type GrpcTarget, grpcError, openStream, type ServedStream, serveStreams, unary } from "./grpc.ts";

const ECHO = "/test.Echo/Say";
const NEVER = new AbortController().signal;

const echo = (stream: ServedStream): void =>
  stream.onMessage((message) => {
    stream.send(message);
    stream.end();
  });

function targetOf(port: number, rootCert: string, more: Partial<GrpcTarget> = {}): GrpcTarget {
  return { address: "127.0.0.1", port, serverName: SERVER_NAME, rootCert, metadata: {}, ...more };
}

describe("a call over TLS", () => {
  test("a message of a stream may exceed gRPC's default of 4 MiB", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    const big = Buffer.alloc(6 * 1024 * 1024, 7);
    const seen: Uint8Array[] = [];
    const stream = openStream(targetOf(istiod.port, istiod.authority.rootPem), ECHO, (it) => seen.push(it));
    stream.send(big);
    await stream.done;
    expect(seen.map((message) => Buffer.compare(message, big))).toEqual([0]);
  });

  test("one answer of more than 1 MiB is refused, and why is said", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    const big = Buffer.alloc(1024 * 1024 + 1);
    const target = targetOf(istiod.port, istiod.authority.rootPem);
    await expect(unary(target, ECHO, big, 10_000, NEVER)).rejects.toThrow(
      /RESOURCE_EXHAUSTED.*larger than max/,
    );
  });

  test("an abort ends it, also one that came before", async () => {
    await using istiod = await startIstiod({ [ECHO]: () => undefined });
    const target = targetOf(istiod.port, istiod.authority.rootPem);
    const scope = new AbortController();
    const work = unary(target, ECHO, Buffer.from("x"), 10_000, scope.signal);
    scope.abort(new Error("enough"));
    await expect(work).rejects.toThrow("enough");
    const startedMs = performance.now();
    await expect(
      unary(target, ECHO, Buffer.from("x"), 10_000, AbortSignal.abort(new Error("before"))),
    ).rejects.toThrow("before");
    expect(performance.now() - startedMs).toBeLessThan(2000);
  });

  test("a stream that the server ends in order is done without an error", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    const seen: string[] = [];
    const stream = openStream(targetOf(istiod.port, istiod.authority.rootPem), ECHO, (message) =>
      seen.push(Buffer.from(message).toString()),
    );
    stream.send(Buffer.from("hello"));
    await stream.done;
    expect(seen).toEqual(["hello"]);
  });

  // grpc-js alone was seen to wait beyond 25 s: the control plane's next address was never tried.
  test("who takes the connection and says nothing is given up in time, and named", async () => {
    const sockets: Socket[] = [];
    const silent = createServer((socket) => sockets.push(socket)).listen(0, "127.0.0.1");
    await once(silent, "listening");
    const { port } = silent.address() as AddressInfo;
    const stream = openStream(targetOf(port, ""), ECHO, () => undefined, 300);
    await expect(stream.done).rejects.toMatchObject({
      code: "ISTIOD_UNREACHABLE",
      message: `istiod does not answer at 127.0.0.1:${port}`,
      cause: { message: "no connection within 0.3 s" },
    });
    for (const socket of sockets) socket.destroy();
    silent.close();
    await once(silent, "close");
  });

  test("a stream that came about in time outlives that time", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    const target = targetOf(istiod.port, istiod.authority.rootPem);
    const heard = Promise.withResolvers<void>();
    const stream = openStream(target, ECHO, () => heard.resolve(), 300);
    await setTimeout(600);
    stream.send(Buffer.from("x"));
    await Promise.all([heard.promise, stream.done]);
  });

  test("a method that is not served is said so", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    const target = targetOf(istiod.port, istiod.authority.rootPem);
    await expect(unary(target, "/test.Echo/Shout", Buffer.from("x"), 5000, NEVER)).rejects.toThrow(
      /UNIMPLEMENTED/,
    );
  });
});

describe("a failure names its suspect", () => {
  test("nobody listens", async () => {
    const { rootPem } = await Authority.create("cluster.local");
    const work = unary(targetOf(1, rootPem), ECHO, Buffer.from("x"), 5000, NEVER);
    await expect(work).rejects.toMatchObject({ code: "ISTIOD_UNREACHABLE" });
  });

  test("the server's certificate is of another root", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    const { rootPem } = await Authority.create("cluster.local");
    const work = unary(targetOf(istiod.port, rootPem), ECHO, Buffer.from("x"), 5000, NEVER);
    await expect(work).rejects.toMatchObject({ code: "ISTIOD_UNTRUSTED" });
  });

  test("the server's certificate is of another name", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo }, { names: ["somebody.else.svc"] });
    const work = unary(targetOf(istiod.port, istiod.authority.rootPem), ECHO, Buffer.from("x"), 5000, NEVER);
    await expect(work).rejects.toMatchObject({ code: "ISTIOD_UNTRUSTED" });
  });

  test.for([
    { name: "has ended", certificateShiftMs: -366 * DAY_MS, says: "has expired" },
    { name: "is not valid yet", certificateShiftMs: DAY_MS, says: "is not yet valid" },
  ])("the server's certificate $name: its dates and the clock are named, not its root", async (row) => {
    await using istiod = await startIstiod({ [ECHO]: echo }, row);
    const work = unary(targetOf(istiod.port, istiod.authority.rootPem), ECHO, Buffer.from("x"), 5000, NEVER);
    await expect(work).rejects.toMatchObject({
      code: "ISTIOD_UNTRUSTED",
      message: expect.stringContaining(row.says),
      next: expect.stringContaining("timedatectl"),
    });
  });

  test("a push that claims to be longer than 512 MiB is refused before it is sent, and what narrows it is said", async () => {
    const authority = await Authority.create("cluster.local");
    const server = createSecureServer(await authority.server([SERVER_NAME], ["127.0.0.1"]));
    server.on("stream", (stream: ServerHttp2Stream) => {
      stream.on("error", () => undefined);
      stream.respond({ ":status": 200, "content-type": "application/grpc" });
      const head = Buffer.alloc(5);
      head.writeUInt32BE(512 * 1024 * 1024 + 1, 1);
      stream.write(head);
    });
    await once(server.listen(0, "127.0.0.1"), "listening");
    const { port } = server.address() as AddressInfo;
    const seen: Uint8Array[] = [];
    const stream = openStream(targetOf(port, authority.rootPem), ECHO, (it) => seen.push(it));
    await expect(stream.done).rejects.toMatchObject({
      message: expect.stringMatching(/RESOURCE_EXHAUSTED.*larger than max/),
      next: expect.stringContaining("Sidecar"),
    });
    expect(seen).toEqual([]);
    server.close();
  });

  // The words are those of grpc-js 1.14.7 with OpenSSL 3, seen against `openssl s_server -Verify` and a closed port.
  test.for([
    {
      name: "our certificate is of a root that the server does not know",
      code: status.UNAVAILABLE,
      details:
        "No connection established. Last error: ssl3_read_bytes:tlsv1 alert unknown ca: SSL alert number 48",
      want: "CERT_WRONG_ROOT",
    },
    {
      // Seen against Go's crypto/tls, with a certificate that had ended and with one that was not valid yet.
      name: "our certificate has ended by the server's clock",
      code: status.UNAVAILABLE,
      details:
        "No connection established. Last error: error:0A000415:SSL routines:ssl3_read_bytes:ssl/tls alert certificate expired:../deps/openssl/openssl/ssl/record/rec_layer_s3.c:918:SSL alert number 45",
      want: "CLOCK_OFF",
    },
    {
      name: "our certificate does not please",
      code: status.UNAVAILABLE,
      details: "No connection established. Last error: sslv3 alert bad certificate: SSL alert number 42",
      want: "CERT_WRONG_ROOT",
    },
    {
      name: "the token is not accepted",
      code: status.UNAUTHENTICATED,
      details: "authentication failure",
      want: "IDENTITY_REFUSED",
    },
    {
      name: "the identity may not do it",
      code: status.PERMISSION_DENIED,
      details: "no identities matched",
      want: "IDENTITY_REFUSED",
    },
    {
      name: "no answer in time",
      code: status.DEADLINE_EXCEEDED,
      details: "Deadline exceeded",
      want: "ISTIOD_UNREACHABLE",
    },
    { name: "an end without a reason", code: status.INTERNAL, details: "", want: "ISTIOD_UNREACHABLE" },
  ])("$name", ({ code, details, want }) => {
    const failure = Object.assign(new Error(details), { code, details, metadata: new Metadata() });
    expect(grpcError(failure, targetOf(15012, "")).code).toBe(want);
  });
});

describe("the operator's shell has a proxy", () => {
  let proxy: Server | undefined;
  afterEach(() => {
    delete process.env["https_proxy"];
    proxy?.close();
  });

  test("istiod is dialled directly all the same", async () => {
    await using istiod = await startIstiod({ [ECHO]: echo });
    let asked = 0;
    proxy = createServer((socket) => {
      asked += 1;
      socket.destroy();
    });
    await new Promise<void>((resolve) => proxy?.listen(0, "127.0.0.1", resolve));
    const bound = proxy.address();
    process.env["https_proxy"] = `http://127.0.0.1:${typeof bound === "object" ? bound?.port : 0}`;
    const target = targetOf(istiod.port, istiod.authority.rootPem);
    expect(Buffer.from(await unary(target, ECHO, Buffer.from("x"), 5000, NEVER)).toString()).toBe("x");
    expect(asked).toBe(0);
  });
});

describe("a served socket", () => {
  test("a message that claims to be longer than 64 MiB ends its stream before it is sent", async () => {
    const seen: number[] = [];
    const server = serveStreams({ [ECHO]: (stream) => stream.onMessage((it) => seen.push(it.length)) });
    const [ours, theirs] = duplexPair();
    server.accept(theirs);
    const session = connectHttp2("http://localhost", { createConnection: () => ours });
    const stream = session.request({
      ":method": "POST",
      ":path": ECHO,
      "content-type": "application/grpc",
      te: "trailers",
    });
    const said = new Promise<string>((resolve) => {
      const note = (headers: IncomingHttpHeaders): void => {
        if (headers["grpc-status"] !== undefined) resolve(String(headers["grpc-status"]));
      };
      stream
        .on("response", note)
        .on("trailers", note)
        .on("error", () => undefined);
    });
    const head = Buffer.alloc(5);
    head.writeUInt32BE(64 * 1024 * 1024 + 1, 1);
    stream.write(head);
    expect(await said).toBe(String(status.RESOURCE_EXHAUSTED));
    expect(seen).toEqual([]);
    session.destroy();
    server.close();
  });

  test("the 1025th connection is closed; when one has gone there is room again", async () => {
    const server = serveStreams({ [ECHO]: () => undefined });
    const open = (): Duplex => {
      const [ours, theirs] = duplexPair();
      ours.on("error", () => undefined).resume();
      server.accept(theirs);
      return theirs;
    };
    const first = open();
    for (let count = 1; count < 1024; count += 1) open();
    expect(open().destroyed).toBe(true);
    first.destroy();
    await once(first, "close");
    expect(open().destroyed).toBe(false);
    server.close();
  });
});
