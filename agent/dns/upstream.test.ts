import { decode, encode } from "dns-packet";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { Latest } from "../core/signals.ts";
import { linuxHost } from "../platform/linux.ts";
import { serveDns } from "./server.ts";
import type { DnsTable } from "./table.ts";
import { Upstreams } from "./upstream.ts";

const machine = linuxHost();
/** Time runs ten times as fast, so that hedges and timeouts do not hold the tests up. */
const clock = {
  ...machine.clock,
  monotonicMs: () => performance.now() * 10,
  sleep: (ms: number, signal?: AbortSignal) => machine.clock.sleep(ms / 10, signal),
};
/** Below what the kernel hands out by itself, beside those of server.test.ts. */
const PORT = 31_000 + (process.pid % 1000);
const query = encode({ type: "query", id: 7, flags: 0x100, questions: [{ type: "A", name: "a.test" }] });

let stop: AbortController;
let cleanUp: AsyncDisposableStack;
let resolvConf: string;
let gone: string[];
beforeEach(() => {
  stop = new AbortController();
  cleanUp = new AsyncDisposableStack();
  gone = [];
});
afterEach(async () => {
  stop.abort();
  await cleanUp.disposeAsync();
});

interface Resolver {
  /** Response code, or nothing at all. */
  does: number | "silent";
  /** Names that it was asked for, without those that look for loops. */
  readonly asked: string[];
}

async function resolver(address: string, does: Resolver["does"]): Promise<Resolver> {
  const self: Resolver = { does, asked: [] };
  const socket = await machine.net.bindUdp(address, PORT);
  cleanUp.defer(() => socket.close());
  socket.onMessage((data, from) => {
    const { id = 0, questions = [] } = decode(Buffer.from(data));
    const name = questions[0]?.name ?? "";
    if (!name.includes("vmmesh")) self.asked.push(name);
    if (self.does === "silent") return;
    socket.send(encode({ type: "response", id, flags: self.does, questions }), from.port, from.address);
  });
  return self;
}

function upstreamsOf(...servers: string[]): Upstreams {
  resolvConf = servers.map((server) => `nameserver ${server}\n`).join("");
  return new Upstreams({
    host: { ...machine, clock, files: { ...machine.files, readText: async () => resolvConf } },
    resolvConf: "/etc/resolv.conf",
    port: PORT,
    onGone: (server) => gone.push(server),
  });
}

const rcode = async (upstreams: Upstreams): Promise<number> =>
  Buffer.from(await upstreams.forward(query, "udp", stop.signal)).readUInt8(3) & 0xf;

describe("a resolver that refuses (SERVFAIL, NOTIMP, REFUSED)", () => {
  test.for([2, 4, 5])(
    "the next one is asked at once, and this one is not taken for dead (%i)",
    async (code) => {
      await resolver("127.0.8.1", code);
      await resolver("127.0.8.2", 0);
      const upstreams = upstreamsOf("127.0.8.1", "127.0.8.2");
      const before = performance.now();
      expect(await rcode(upstreams)).toBe(0);
      expect(performance.now() - before).toBeLessThan(100);
      expect(upstreams.health().map(({ healthy }) => healthy)).toEqual([true, true]);
    },
  );

  test("NXDOMAIN is an answer: nobody else is asked", async () => {
    await resolver("127.0.8.1", 3);
    const second = await resolver("127.0.8.2", 0);
    expect(await rcode(upstreamsOf("127.0.8.1", "127.0.8.2"))).toBe(3);
    expect(second.asked).toEqual([]);
  });

  test("all refuse: the first refusal is passed on", async () => {
    await resolver("127.0.8.1", 5);
    await resolver("127.0.8.2", 2);
    expect(await rcode(upstreamsOf("127.0.8.1", "127.0.8.2"))).toBe(5);
  });

  test("nobody waits for a dead one to say better", async () => {
    await resolver("127.0.8.1", "silent");
    const second = await resolver("127.0.8.2", 0);
    const upstreams = upstreamsOf("127.0.8.1", "127.0.8.2");
    await rcode(upstreams);
    await expect.poll(() => upstreams.health()[0]?.healthy).toBe(false);
    second.does = 2;
    const before = performance.now();
    expect(await rcode(upstreams)).toBe(2);
    expect(performance.now() - before).toBeLessThan(100);
  });
});

test("a resolver whose port is closed costs no wait: its refusal is heard", async () => {
  await resolver("127.0.8.2", 0);
  const upstreams = upstreamsOf("127.0.8.1", "127.0.8.2");
  const before = performance.now();
  expect(await rcode(upstreams)).toBe(0);
  expect(performance.now() - before).toBeLessThan(100);
  expect(upstreams.health()[0]).toMatchObject({
    healthy: false,
    lastError: expect.stringMatching(/REFUSED/),
  });
});

test("a dead resolver costs one wait; that it answers again is found out beside another's answer", async () => {
  const first = await resolver("127.0.8.1", "silent");
  await resolver("127.0.8.2", 0);
  const upstreams = upstreamsOf("127.0.8.1", "127.0.8.2");
  await rcode(upstreams);
  await expect
    .poll(() => upstreams.health()[0])
    .toMatchObject({ healthy: false, lastError: expect.stringMatching(/silent/) });
  // Ten seconds after its last failure, which is five after the question, it is asked again: nobody waits for it.
  for (const does of ["silent", 0] as const) {
    first.does = does;
    first.asked.length = 0;
    await clock.sleep(15_500);
    const before = performance.now();
    expect(await rcode(upstreams)).toBe(0);
    expect(performance.now() - before).toBeLessThan(100);
    await expect.poll(() => first.asked.length).toBe(1);
  }
  await expect.poll(() => upstreams.health()[0]?.healthy).toBe(true);
});

test("a resolv.conf without a server, as at the end of a DHCP lease, does not take the known ones away", async () => {
  await resolver("127.0.8.1", 0);
  await resolver("127.0.8.2", 0);
  const upstreams = upstreamsOf("127.0.8.1");
  await rcode(upstreams);
  gone.length = 0;
  for (const [text, servers, search] of [
    ["", ["127.0.8.1"], []],
    ["# by dhclient\nsearch lab.test\n", ["127.0.8.1"], ["lab.test"]],
    ["nameserver 127.0.8.2\n", ["127.0.8.2"], []],
  ] as const) {
    resolvConf = text;
    await clock.sleep(1100);
    await rcode(upstreams);
    expect(upstreams.health().map(({ address }) => address)).toEqual(servers);
    expect(upstreams.search).toEqual(search);
  }
  expect(gone).toEqual(["127.0.8.1"]);
});

// istio #29555: dnsmasq passes on what capture brings back to us.
test("a resolver that sends our questions back to us is found, named and left out until it does so no more", async () => {
  const good = await resolver("127.0.8.2", 0);
  const upstreams = upstreamsOf("127.0.8.1", "127.0.8.2");
  const served = new Promise<void>((resolve, reject) => {
    const deps = { host: { ...machine, clock }, port: PORT + 1000, table: new Latest<DnsTable>(), upstreams };
    const running = serveDns({ ...deps, onListening: resolve }, stop.signal);
    running.catch(reject);
    cleanUp.defer(async () => {
      stop.abort();
      await running;
    });
  });
  await served;
  const looping = await machine.net.bindUdp("127.0.8.1", PORT);
  let passesOn = true;
  let passed = 0;
  const waiting = new Map<number, number>();
  looping.onMessage((data, from) => {
    const id = Buffer.from(data).readUInt16BE(0);
    if (from.port === PORT + 1000) {
      const port = waiting.get(id);
      if (port !== undefined) looping.send(data, port, "127.0.0.1");
    } else if (passesOn) {
      passed += 1;
      waiting.set(id, from.port);
      looping.send(data, PORT + 1000, "127.0.0.1");
    } else {
      const { questions = [] } = decode(Buffer.from(data));
      looping.send(encode({ type: "response", id, questions }), from.port, from.address);
    }
  });
  cleanUp.defer(() => looping.close());
  expect(await rcode(upstreams)).toBe(0);
  await expect
    .poll(() => upstreams.health()[0])
    .toMatchObject({ healthy: false, lastError: expect.stringMatching(/loop/) });
  passed = 0;
  good.asked.length = 0;
  expect(await rcode(upstreams)).toBe(0);
  expect(passed).toBe(0);
  expect(good.asked).toEqual(["a.test"]);
  passesOn = false;
  await clock.sleep(61_000);
  await rcode(upstreams);
  await expect.poll(() => upstreams.health()[0]?.healthy).toBe(true);
}, 20_000);

describe("where resolv.conf names systemd-resolved", () => {
  const STUB = "127.0.0.53";
  async function withResolved(does: Resolver["does"] | undefined) {
    const stub = does === undefined ? undefined : await resolver(STUB, does);
    const behind = await resolver("127.0.8.3", 0);
    const texts: Record<string, string> = {
      "/etc/resolv.conf": `nameserver ${STUB}\n`,
      "/run/systemd/resolve/resolv.conf": "nameserver 127.0.8.3\n",
    };
    const files = { ...machine.files, readText: async (path: string) => texts[path] };
    const host = { ...machine, clock, files };
    return { stub, behind, upstreams: new Upstreams({ host, resolvConf: "/etc/resolv.conf", port: PORT }) };
  }

  test("it is asked, so that the routes of a VPN count, and nobody behind its back, whatever it refuses", async () => {
    const { stub, behind, upstreams } = await withResolved(2);
    expect(await rcode(upstreams)).toBe(2);
    expect(stub?.asked).toEqual(["a.test"]);
    expect(behind.asked).toEqual([]);
  });

  test("what it would ask us for is asked of the servers behind it", async () => {
    const { stub, behind, upstreams } = await withResolved(0);
    upstreams.routesAre(["~test"]);
    expect(await rcode(upstreams)).toBe(0);
    expect(stub?.asked).toEqual([]);
    expect(behind.asked).toEqual(["a.test"]);
  });

  test("when it does not run, the servers behind it are asked", async () => {
    const { behind, upstreams } = await withResolved(undefined);
    expect(await rcode(upstreams)).toBe(0);
    expect(behind.asked).toEqual(["a.test"]);
  });
});
