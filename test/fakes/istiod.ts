import "reflect-metadata";
import { createServer, type TLSSocket } from "node:tls";
import { type ServedStream, serveStreams } from "../../agent/platform/grpc.ts";
import { Authority } from "../controlplane/authority.ts";

export const SERVER_NAME = "istiod.istio-system.svc";

/** A TLS port with the handlers of one test behind it. Unary methods are streams with one message each way. */
export interface FakeIstiod extends AsyncDisposable {
  readonly port: number;
  readonly authority: Authority;
  /** Connections accepted so far. */
  readonly accepted: () => number;
  /** Ends every connection; the port goes on listening. */
  drop(): void;
}

export async function startIstiod(
  handlers: Readonly<Record<string, (stream: ServedStream) => void>>,
  options: { authority?: Authority; names?: readonly string[]; certificateShiftMs?: number } = {},
): Promise<FakeIstiod> {
  const authority = options.authority ?? (await Authority.create("cluster.local"));
  const own = await authority.server(
    options.names ?? [SERVER_NAME],
    ["127.0.0.1"],
    options.certificateShiftMs,
  );
  const grpc = serveStreams(handlers);
  const sockets = new Set<TLSSocket>();
  let accepted = 0;
  const front = createServer(
    {
      ...own,
      ca: authority.rootPem,
      requestCert: true,
      // As istiod: no certificate is fine, a foreign one ends the handshake with an alert.
      rejectUnauthorized: false,
      ALPNProtocols: ["h2"],
    },
    (socket) => {
      if (socket.getPeerCertificate().raw !== undefined && !socket.authorized) {
        socket.destroy();
        return;
      }
      accepted += 1;
      sockets.add(socket);
      socket.once("close", () => sockets.delete(socket)).on("error", () => undefined);
      grpc.accept(socket);
    },
  );
  front.on("tlsClientError", () => undefined);
  await new Promise<void>((resolve) => front.listen(0, "127.0.0.1", resolve));
  const address = front.address();
  const drop = (): void => {
    for (const socket of sockets) socket.destroy();
  };
  return {
    port: typeof address === "object" && address !== null ? address.port : 0,
    authority,
    accepted: () => accepted,
    drop,
    async [Symbol.asyncDispose]() {
      const closed = new Promise((resolve) => front.close(resolve));
      drop();
      grpc.close();
      await closed;
    },
  };
}
