import { connect, type IncomingHttpHeaders } from "node:http2";
import { type Duplex, duplexPair } from "node:stream";
import { Latest } from "../../../agent/core/signals.ts";
import type { Svid } from "../../../agent/identity/svid.ts";
import { TYPE_URL } from "../../../agent/proto/discovery.ts";
import { serveSds } from "../../../agent/sds/serve.ts";
import { encode } from "../../controlplane/protos.ts";
import type { Target } from "../target.ts";
import { mutateMessage } from "../wire.ts";

const XDS = "envoy.service.discovery.v3";
const KEY = "the key that only who asks for it gets";
const svids = new Latest<Svid>();
svids.set({
  key: KEY,
  chain: "chain",
  roots: "roots",
  notBefore: new Date(0),
  notAfter: new Date(1),
  serial: "1",
  spiffe: "spiffe://a/ns/b/sa/c",
});

const session = await new Promise<Duplex>((resolve) => {
  void serveSds(
    {
      listen: async (onConnection) => {
        const [ours, theirs] = duplexPair();
        onConnection(theirs);
        resolve(ours);
        return { port: 0, [Symbol.asyncDispose]: async () => undefined };
      },
      onRejected: () => undefined,
    },
    svids,
    new AbortController().signal,
  );
}).then((socket) => connect("http://localhost", { createConnection: () => socket }));

interface Answer {
  /** Of gRPC. */
  readonly status: string | undefined;
  readonly body: Buffer;
}

/** One message on a stream of its own, which the client then ends. */
function ask(method: "StreamSecrets" | "DeltaSecrets", message: Uint8Array): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const stream = session.request({
      ":method": "POST",
      ":path": `/envoy.service.secret.v3.SecretDiscoveryService/${method}`,
      "content-type": "application/grpc",
      te: "trailers",
    });
    const chunks: Buffer[] = [];
    let status: string | undefined;
    const note = (headers: IncomingHttpHeaders): void => {
      if (headers["grpc-status"] !== undefined) status = String(headers["grpc-status"]);
    };
    stream.on("response", note).on("trailers", note).on("error", reject);
    stream.on("data", (chunk: Buffer) => chunks.push(chunk));
    stream.on("close", () => resolve({ status, body: Buffer.concat(chunks) }));
    const head = Buffer.alloc(5);
    head.writeUInt32BE(message.length, 1);
    stream.end(Buffer.concat([head, message]));
  });
}

const OK = "0";
const INTERNAL = "13";
const good = encode(`${XDS}.DeltaDiscoveryRequest`, {
  type_url: TYPE_URL.secret,
  resource_names_subscribe: ["default"],
});

export const target: Target = {
  about:
    "any message ends its own stream in order or in words, the key goes to who names it alone, the next is served",
  covers: /\/agent\/(sds|proto)\//,
  seeds: [
    good,
    encode(`${XDS}.DeltaDiscoveryRequest`, {
      type_url: TYPE_URL.secret,
      resource_names_subscribe: ["ROOTCA", "other"],
      resource_names_unsubscribe: ["default"],
      error_detail: { code: 13, message: "no" },
    }),
    encode(`${XDS}.DiscoveryRequest`, {
      version_info: "1",
      resource_names: ["default", "ROOTCA"],
      type_url: TYPE_URL.secret,
      response_nonce: "1",
    }),
  ],
  words: ["default", "ROOTCA", "__proto__", "constructor"],
  mutate: mutateMessage,
  async run(bytes) {
    for (const method of ["StreamSecrets", "DeltaSecrets"] as const) {
      const { status, body } = await ask(method, bytes);
      if (status !== OK && status !== INTERNAL) throw new Error(`${method} ended with status ${status}`);
      if (body.includes(KEY) && !Buffer.from(bytes).includes("default"))
        throw new Error(`${method} gave the key to who did not name it`);
    }
    const next = await ask("DeltaSecrets", good);
    if (next.status !== OK || !next.body.includes(KEY)) throw new Error("the next client is not served");
  },
};
