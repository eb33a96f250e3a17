import { randomInt } from "node:crypto";
import { once } from "node:events";
import { decode, encode } from "dns-packet";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { Latest } from "../core/signals.ts";
import type { Datagrams, Host } from "../platform/host.ts";
import { linuxHost } from "../platform/linux.ts";
import { LEASE_NAME, TYPE } from "./answer.ts";
import { capturedServers, parseResolvConf } from "./resolvConf.ts";
import { leaseBeat, type QueryEvent, serveDns } from "./server.ts";
import { buildTable, type DnsTable } from "./table.ts";
import { Upstreams } from "./upstream.ts";
import { Deframer, frame, withId, writeQuery } from "./wire.ts";

const machine = linuxHost();
let stop: AbortController;
let cleanUp: AsyncDisposableStack;

beforeEach(() => {
  stop = new AbortController();
  cleanUp = new AsyncDisposableStack();
});
afterEach(async () => {
  stop.abort();
  await cleanUp.disposeAsync();
});

/** A resolver on its own loopback address that answers with `data`, or is silent; what it was asked, but for loop checks. */
async function resolver(
  address: string,
  port: number,
  data: string | "silent",
): Promise<{ port: number; asked: Buffer[] }> {
  const asked: Buffer[] = [];
  const replyTo = (query: Buffer): Buffer => {
    const { id, questions } = decode(query);
    const name = questions?.[0]?.name ?? "";
    const extra = { type: "TXT" as const, name: "seen.test", ttl: 7, data: [Buffer.from([0, 255, 1])] };
    return encode({
      type: "response",
      id: id ?? 0,
      flags: 0x180,
      questions: questions ?? [],
      answers: [{ type: "A", name, ttl: 5, data }],
      additionals: [extra],
    });
  };
  const socket = await machine.net.bindUdp(address, port);
  cleanUp.defer(() => socket.close());
  socket.onMessage((query, from) => {
    if (!Buffer.from(query).includes("vmmesh")) asked.push(Buffer.from(query));
    if (data !== "silent") socket.send(replyTo(Buffer.from(query)), from.port, from.address);
  });
  cleanUp.use(
    await machine.net.listenTcp(address, socket.port, (connection) => {
      const deframer = new Deframer();
      connection.on("error", () => undefined);
      connection.on("data", (chunk) => {
        for (const query of deframer.push(chunk)) {
          asked.push(Buffer.from(query));
          if (data !== "silent") connection.write(frame(replyTo(Buffer.from(query))));
        }
      });
    }),
  );
  return { port: socket.port, asked };
}

interface Running {
  readonly port: number;
  readonly table: Latest<DnsTable>;
  readonly events: QueryEvent[];
  readonly upstreams: Upstreams;
  resolvConf: string;
}

/** At random, for two runs at once have neighbouring process numbers. */
let nextPort = randomInt(20_000, 30_000);

async function start(
  resolvConf: string,
  upstreamPort: number,
  clock: Host["clock"] = machine.clock,
): Promise<Running> {
  const port = fixedPort();
  const running = { port, table: new Latest<DnsTable>(), events: [] as QueryEvent[], resolvConf };
  const files = { ...machine.files, readText: async () => running.resolvConf };
  const upstreams = new Upstreams({
    host: { ...machine, clock, files },
    resolvConf: "/etc/resolv.conf",
    port: upstreamPort,
  });
  await new Promise<void>((resolve, reject) => {
    const served = serveDns(
      {
        host: { ...machine, clock },
        port,
        table: running.table,
        upstreams,
        onListening: resolve,
        onQuery: (event) => running.events.push(event),
      },
      stop.signal,
    );
    served.catch(reject);
    cleanUp.defer(async () => {
      stop.abort();
      await served;
    });
  });
  return Object.assign(running, { upstreams });
}

/**
 * UDP and TCP share this port, so it must be free for both: below the range that the kernel hands out by itself (32768 on,
 * ip(7)), where no other test's socket can come first.
 */
function fixedPort(): number {
  nextPort += 1;
  return nextPort;
}

async function client(): Promise<{ socket: Datagrams; reply(): Promise<Buffer> }> {
  const socket = await machine.net.bindUdp("127.0.0.1", 0);
  cleanUp.defer(() => socket.close());
  const arrived: Buffer[] = [];
  let wake: (() => void) | undefined;
  socket.onMessage((data) => {
    arrived.push(Buffer.from(data));
    wake?.();
  });
  return {
    socket,
    async reply() {
      for (;;) {
        const first = arrived.shift();
        if (first !== undefined) return first;
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
      }
    },
  };
}

async function askUdp(port: number, message: Uint8Array): Promise<Buffer> {
  const { socket, reply } = await client();
  socket.send(message, port, "127.0.0.1");
  return reply();
}

const query = (name: string, id = 4242): Buffer =>
  encode({ type: "query", id, flags: 0x100, questions: [{ type: "A", name }] });
const mesh = buildTable(
  new Map([
    [
      "api.ns.svc.cluster.local",
      { ips: ["10.1.1.1"], registry: "Kubernetes", shortname: "api", namespace: "ns", altHosts: [] },
    ],
  ]),
  { proxyDomain: "svc.cluster.local", namespace: "ns" },
);

describe("serveDns", () => {
  test("forwards everything before the first table, then answers the mesh's names itself", async () => {
    const upstream = await resolver("127.0.0.53", 0, "192.0.2.1");
    const dns = await start("nameserver 127.0.0.53\nsearch corp.test\n", upstream.port);
    expect(decode(await askUdp(dns.port, query("api.ns"))).answers).toMatchObject([{ data: "192.0.2.1" }]);
    dns.table.set(mesh);
    expect(decode(await askUdp(dns.port, query("api.ns"))).answers).toMatchObject([{ data: "10.1.1.1" }]);
    expect(decode(await askUdp(dns.port, query("api.ns.corp.test"))).answers).toMatchObject([
      { type: "CNAME" },
      { data: "10.1.1.1" },
    ]);
    expect(decode(await askUdp(dns.port, query("www.test"))).answers).toMatchObject([{ data: "192.0.2.1" }]);
    expect(dns.events.map((event) => event.outcome)).toEqual(["forwarded", "local", "local", "forwarded"]);
  });

  test("passes replies on byte for byte under the client's id, asks under another id", async () => {
    const upstream = await resolver("127.0.0.54", 0, "192.0.2.2");
    const dns = await start("nameserver 127.0.0.54\n", upstream.port);
    const ids = new Set<number>();
    for (let round = 0; round < 4; round += 1) {
      const got = await askUdp(dns.port, query("raw.test"));
      const asked = upstream.asked.at(-1) ?? Buffer.alloc(2);
      expect(Buffer.compare(withId(asked, 4242), query("raw.test"))).toBe(0);
      ids.add(asked.readUInt16BE(0));
      const { id, answers, additionals } = decode(got);
      expect(id).toBe(4242);
      expect(answers).toHaveLength(1);
      expect(additionals).toMatchObject([{ type: "TXT", ttl: 7 }]);
    }
    expect(ids.size).toBeGreaterThan(1);
  });

  test("TCP: several queries on one connection, forwarded over TCP", async () => {
    const upstream = await resolver("127.0.0.55", 0, "192.0.2.3");
    const dns = await start("nameserver 127.0.0.55\n", upstream.port);
    dns.table.set(mesh);
    const socket = await machine.net.connectTcp("127.0.0.1", dns.port, { timeoutMs: 1000 });
    cleanUp.defer(() => {
      socket.destroy();
    });
    const deframer = new Deframer();
    const replies = new Map<number, Buffer>();
    const both = new Promise<void>((resolve) => {
      socket.on("data", (chunk) => {
        for (const message of deframer.push(chunk))
          replies.set(Buffer.from(message).readUInt16BE(0), Buffer.from(message));
        if (replies.size === 2) resolve();
      });
    });
    socket.write(Buffer.concat([frame(query("www.test", 1)), frame(query("api", 2))]));
    await both;
    expect(decode(replies.get(1) ?? Buffer.alloc(0)).answers).toMatchObject([{ data: "192.0.2.3" }]);
    expect(decode(replies.get(2) ?? Buffer.alloc(0)).answers).toMatchObject([{ data: "10.1.1.1" }]);
  });

  test("fails over from a silent server, remembers it, and follows a changed resolv.conf", async () => {
    const good = await resolver("127.0.0.57", 0, "192.0.2.4");
    await resolver("127.0.0.56", good.port, "silent");
    // Time runs ten times as fast, so that the 1.5 s of the hedge do not hold the test up.
    const clock = {
      ...machine.clock,
      monotonicMs: () => performance.now() * 10,
      sleep: (ms: number, signal?: AbortSignal) => machine.clock.sleep(ms / 10, signal),
    };
    const dns = await start("nameserver 127.0.0.56\nnameserver 127.0.0.57\n", good.port, clock);
    expect(decode(await askUdp(dns.port, query("a.test"))).answers).toMatchObject([{ data: "192.0.2.4" }]);
    expect(dns.upstreams.health()).toMatchObject([
      { address: "127.0.0.56", healthy: false },
      { address: "127.0.0.57", healthy: true },
    ]);
    const before = performance.now();
    await askUdp(dns.port, query("b.test"));
    expect(performance.now() - before).toBeLessThan(100);
    const other = await resolver("127.0.0.58", good.port, "192.0.2.5");
    dns.resolvConf = "nameserver 127.0.0.58\n";
    await clock.sleep(1100);
    expect(decode(await askUdp(dns.port, query("c.test"))).answers).toMatchObject([{ data: "192.0.2.5" }]);
    expect(other.asked).toHaveLength(1);
  });

  test("only the asked server's reply to this very query counts", async () => {
    const socket = await machine.net.bindUdp("127.0.0.60", 0);
    const liar = await machine.net.bindUdp("127.0.0.61", 0);
    cleanUp.defer(() => socket.close());
    cleanUp.defer(() => liar.close());
    const reply = (id: number, name: string, data: string): Buffer =>
      encode({
        type: "response",
        id,
        questions: [{ type: "A", name }],
        answers: [{ type: "A", name, data }],
      });
    socket.onMessage((asked, from) => {
      const id = Buffer.from(asked).readUInt16BE(0);
      liar.send(reply(id, "a.test", "6.6.6.1"), from.port, from.address);
      socket.send(reply((id + 1) & 0xffff, "a.test", "6.6.6.2"), from.port, from.address);
      socket.send(reply(id, "b.test", "6.6.6.3"), from.port, from.address);
      socket.send(reply(id, "a.test", "192.0.2.7"), from.port, from.address);
    });
    const dns = await start("nameserver 127.0.0.60\n", socket.port);
    expect(decode(await askUdp(dns.port, query("a.test"))).answers).toMatchObject([{ data: "192.0.2.7" }]);
  });

  test("no server left: SERVFAIL, at once if the machine refuses TCP", async () => {
    const dns = await start("nameserver 127.0.0.62\n", 9);
    const socket = await machine.net.connectTcp("127.0.0.1", dns.port, { timeoutMs: 1000 });
    socket.write(frame(query("a.test")));
    const [chunk] = (await once(socket, "data")) as [Buffer];
    expect(decode(chunk.subarray(2))).toMatchObject({ id: 4242, rcode: "SERVFAIL" });
    socket.destroy();
  });

  test("survives random datagrams and goes on answering", async () => {
    const dns = await start("nameserver 127.0.0.1\n", 9);
    dns.table.set(mesh);
    const { socket, reply } = await client();
    // Small rounds: a datagram that overflows the kernel's receive buffer is lost, and that is nobody's fault.
    for (let round = 0; round < 10; round += 1) {
      for (const bytes of fc.sample(fc.uint8Array({ maxLength: 100 }), 30))
        socket.send(bytes, dns.port, "127.0.0.1");
      socket.send(query("api"), dns.port, "127.0.0.1");
      for (let done = false; !done; ) {
        const { id, answers } = decode(await reply());
        done = id === 4242 && answers?.[0]?.name === "api";
      }
    }
  });

  test("TCP: the 129th connection is closed, the others and UDP are answered, and its place is given anew", async () => {
    const dns = await start("nameserver 127.0.0.1\n", 9);
    const open = async () => {
      const socket = await machine.net.connectTcp("127.0.0.1", dns.port, { timeoutMs: 1000 });
      cleanUp.defer(() => {
        socket.destroy();
      });
      return socket.on("error", () => undefined);
    };
    const ask = async (): Promise<"answered" | "closed"> => {
      const socket = await open();
      const heard = new Promise<"answered" | "closed">((resolve) => {
        socket.once("data", () => resolve("answered")).once("close", () => resolve("closed"));
      });
      socket.write(frame(writeQuery(9, LEASE_NAME, TYPE.A)));
      const how = await heard;
      socket.destroy();
      return how;
    };
    const sockets = [];
    for (let count = 0; count < 128; count += 1) sockets.push(await open());
    expect(await ask()).toBe("closed");
    expect(decode(await askUdp(dns.port, writeQuery(9, LEASE_NAME, TYPE.A)))).toMatchObject({ id: 9 });
    sockets[0]?.destroy();
    await expect.poll(ask).toBe("answered");
  });

  test("the lease is answered without table and without resolvers", async () => {
    const dns = await start("nameserver 127.0.0.1\n", 9);
    expect(decode(await askUdp(dns.port, writeQuery(9, LEASE_NAME, TYPE.A)))).toMatchObject({
      id: 9,
      rcode: "NOERROR",
    });
    const beats = await new Promise((resolve) => {
      const scope = new AbortController();
      const clock = {
        ...machine.clock,
        sleep: (ms: number, signal?: AbortSignal) => machine.clock.sleep(ms / 20, signal),
      };
      const seen: boolean[] = [];
      void leaseBeat(
        {
          host: { net: machine.net, clock },
          port: dns.port,
          address: "127.0.0.1",
          onBeat: (ok) => {
            seen.push(ok);
            if (seen.length === 3) {
              scope.abort();
              resolve(seen);
            }
          },
        },
        scope.signal,
      );
    });
    expect(beats).toEqual([true, true, true]);
  });
});

describe("a connection by TCP on which nobody asks", () => {
  /** The ten seconds of a connection end when the test says so. */
  const started = async () => {
    const idle: (() => void)[] = [];
    const clock = {
      ...machine.clock,
      sleep: (ms: number, signal?: AbortSignal) =>
        ms === 10_000
          ? new Promise<void>((resolve, reject) => {
              idle.push(resolve);
              signal?.addEventListener("abort", () => reject(new Error("asked meanwhile")));
            })
          : machine.clock.sleep(ms, signal),
    };
    const upstream = await resolver("127.0.0.56", 0, "10.0.0.1");
    const dns = await start("nameserver 127.0.0.56\n", upstream.port, clock);
    const socket = await machine.net.connectTcp("127.0.0.1", dns.port, { timeoutMs: 1000 });
    cleanUp.defer(() => {
      socket.destroy();
    });
    socket.resume();
    while (idle.length === 0) await machine.clock.sleep(5);
    return { socket, idle };
  };

  test("is closed after ten seconds", async () => {
    const { socket, idle } = await started();
    const closed = once(socket, "end");
    idle[0]?.();
    await closed;
  });

  test("is left open by a question, and has ten seconds more from then", async () => {
    const { socket, idle } = await started();
    const answered = once(socket, "data");
    socket.write(frame(writeQuery(7, "outside.test", TYPE.A)));
    await answered;
    expect(idle).toHaveLength(2);
    const closed = once(socket, "end");
    idle[0]?.();
    socket.write(frame(writeQuery(8, "outside.test", TYPE.A)));
    await once(socket, "data");
    idle.at(-1)?.();
    await closed;
  });
});

describe("parseResolvConf", () => {
  test.for([
    { name: "nothing: the local resolver", text: "", want: { servers: ["127.0.0.1"], search: [] } },
    {
      name: "the last of search and domain wins",
      text: "domain a.test\nsearch b.test. c.test # mine\n",
      want: { servers: ["127.0.0.1"], search: ["b.test", "c.test"] },
    },
    {
      name: "both families, zone, doubles, rubbish",
      text: "nameserver 10.0.0.2 ; old\nnameserver fe80::1%eth0\nnameserver 10.0.0.2\nnameserver dns.test\noptions edns0\n",
      want: { servers: ["10.0.0.2", "fe80::1%eth0"], search: [] },
    },
  ])("$name", ({ text, want }) => {
    expect(parseResolvConf(text)).toEqual(want);
  });
});

test("what is captured: each address once and without its zone, the local resolver where none is named", () => {
  const text = "nameserver fe80::1%eth0\nnameserver fe80::1%eth1\nnameserver 192.0.2.1\n";
  expect(capturedServers(text)).toEqual(["fe80::1", "192.0.2.1"]);
  expect(capturedServers("search lab.test\n")).toEqual(["127.0.0.1"]);
});
