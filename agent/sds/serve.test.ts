import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Client, type ClientDuplexStream, credentials } from "@grpc/grpc-js";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { decode, encode, type Message, TYPE_PREFIX } from "../../test/controlplane/protos.ts";
import { Latest } from "../core/signals.ts";
import type { Svid } from "../identity/svid.ts";
import { linuxHost } from "../platform/linux.ts";
import { TYPE_URL } from "../proto/discovery.ts";
import { serveSds } from "./serve.ts";

const XDS = "envoy.service.discovery.v3";
const SECRET = TYPE_URL.secret.slice(TYPE_PREFIX.length);

function svid(serial: string): Svid {
  const dates = { notBefore: new Date(0), notAfter: new Date(1) };
  return {
    key: `KEY ${serial}`,
    chain: `CHAIN ${serial}`,
    roots: `ROOTS ${serial}`,
    serial,
    spiffe: "spiffe://a/ns/b/sa/c",
    ...dates,
  };
}

/** What Envoy does on one SDS stream, with Envoy's own message definitions. */
class SdsClient {
  readonly #client: Client;
  readonly #call: ClientDuplexStream<Message, Message>;
  readonly #heard: Message[] = [];
  #wake: () => void = () => undefined;
  readonly ended: Promise<string>;

  constructor(socket: string, form: "StreamSecrets" | "DeltaSecrets") {
    const messages = `${XDS}.${form === "DeltaSecrets" ? "Delta" : ""}Discovery`;
    this.#client = new Client(`unix:${socket}`, credentials.createInsecure(), {
      "grpc.use_local_subchannel_pool": 1,
    });
    this.#call = this.#client.makeBidiStreamRequest(
      `/envoy.service.secret.v3.SecretDiscoveryService/${form}`,
      (it: Message) => ("raw" in it ? (it["raw"] as Buffer) : encode(`${messages}Request`, it)),
      (it: Buffer) => decode(`${messages}Response`, it),
    );
    this.#call.on("data", (it: Message) => {
      this.#heard.push(it);
      this.#wake();
    });
    this.ended = new Promise((resolve) => this.#call.on("error", (error) => resolve(error.message)));
  }
  send(it: Message): void {
    this.#call.write({ type_url: TYPE_URL.secret, ...it });
  }
  garbage(): void {
    this.#call.write({ raw: Buffer.from([0x0a, 0x7f]) });
  }
  async next(): Promise<Message> {
    for (;;) {
      const it = this.#heard.shift();
      if (it !== undefined) return it;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }
  /** Nothing came before the answer to a question that is asked now. */
  get silent(): boolean {
    return this.#heard.length === 0;
  }
  close(): void {
    this.#call.cancel();
    this.#client.close();
  }
}

function secretsIn(response: Message): Message[] {
  return (response["resources"] as Message[]).map((it) => {
    const any = (it["resource"] ?? it) as { value: Buffer };
    return decode(SECRET, any.value);
  });
}
const keyOf = (serial: string) => ({
  tls_certificate: { private_key: { inline_bytes: Buffer.from(`KEY ${serial}`) } },
});
const rootsOf = (serial: string) => ({
  validation_context: { trusted_ca: { inline_bytes: Buffer.from(`ROOTS ${serial}`) } },
});

let folder: string;
let socket: string;
let svids: Latest<Svid>;
let rejected: string[];
let stop: AbortController;
let running: Promise<void>;
const clients: SdsClient[] = [];

function client(form: "StreamSecrets" | "DeltaSecrets"): SdsClient {
  const it = new SdsClient(socket, form);
  clients.push(it);
  return it;
}

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "vmmesh-sds-"));
  socket = join(folder, "sds.sock");
  [svids, rejected, stop] = [new Latest(), [], new AbortController()];
  const { net } = linuxHost();
  await new Promise<void>((resolve) => {
    running = serveSds(
      {
        listen: (onConnection) => net.listenUnix(socket, { mode: 0o600 }, onConnection),
        onListening: resolve,
        onRejected: (name, reason) => rejected.push(`${name}: ${reason}`),
      },
      svids,
      stop.signal,
    );
  });
});

afterEach(async () => {
  for (const it of clients.splice(0)) it.close();
  stop.abort();
  await running;
  await rm(folder, { recursive: true });
});

describe("state of the world", () => {
  test("who asks before there is a certificate gets the first one, and each later one, without asking again", async () => {
    const [own, roots] = [client("StreamSecrets"), client("StreamSecrets")];
    own.send({ resource_names: ["default"] });
    roots.send({ resource_names: ["ROOTCA"] });
    svids.set(svid("01"));
    expect(secretsIn(await own.next())).toMatchObject([{ name: "default", ...keyOf("01") }]);
    expect(secretsIn(await roots.next())).toMatchObject([{ name: "ROOTCA", ...rootsOf("01") }]);
    svids.set(svid("02"));
    expect(secretsIn(await own.next())).toMatchObject([keyOf("02")]);
    expect(secretsIn(await roots.next())).toMatchObject([rootsOf("02")]);
  });

  test("an ACK gets no answer; a NACK gets none either and is told in Envoy's words", async () => {
    svids.set(svid("01"));
    const it = client("StreamSecrets");
    it.send({ resource_names: ["default"] });
    const { nonce, version_info } = await it.next();
    it.send({ resource_names: ["default"], response_nonce: nonce, version_info });
    it.send({
      resource_names: ["default"],
      response_nonce: nonce,
      error_detail: { code: 3, message: "bad key" },
    });
    await expect.poll(() => rejected).toEqual(["default: bad key"]);
    expect(it.silent).toBe(true);
  });

  test("several names in one request, and names that are not ours left out", async () => {
    svids.set(svid("01"));
    const it = client("StreamSecrets");
    it.send({ resource_names: ["ROOTCA", "default", "constructor", "file-root:/etc/shadow"] });
    expect(secretsIn(await it.next()).map((secret) => secret["name"])).toEqual(["ROOTCA", "default"]);
  });
});

describe("delta", () => {
  test("what is subscribed comes, also anew on rotation; what is unsubscribed does not", async () => {
    svids.set(svid("01"));
    const it = client("DeltaSecrets");
    it.send({ resource_names_subscribe: ["default"] });
    const first = await it.next();
    expect(secretsIn(first)).toMatchObject([keyOf("01")]);
    it.send({ response_nonce: first["nonce"], resource_names_subscribe: ["ROOTCA"] });
    expect(secretsIn(await it.next())).toMatchObject([rootsOf("01")]);
    svids.set(svid("02"));
    expect(secretsIn(await it.next())).toHaveLength(2);
    it.send({ resource_names_unsubscribe: ["default"], resource_names_subscribe: ["ROOTCA"] });
    await it.next();
    svids.set(svid("03"));
    expect(secretsIn(await it.next())).toMatchObject([rootsOf("03")]);
  });

  test("a NACK is told in Envoy's words", async () => {
    svids.set(svid("01"));
    const it = client("DeltaSecrets");
    it.send({ resource_names_subscribe: ["default"] });
    const { nonce } = await it.next();
    it.send({ response_nonce: nonce, error_detail: { code: 3, message: "bad chain" } });
    await expect.poll(() => rejected).toEqual(["default: bad chain"]);
  });
});

// A throw in a stream's listener would end the whole agent.
test.for(["StreamSecrets", "DeltaSecrets"] as const)(
  "bytes that are no request end that %s stream and no other",
  async (form) => {
    svids.set(svid("01"));
    const [bad, good] = [client(form), client("StreamSecrets")];
    bad.garbage();
    expect(await bad.ended).toContain("not a discovery request");
    good.send({ resource_names: ["default"] });
    expect(secretsIn(await good.next())).toMatchObject([keyOf("01")]);
  },
);
