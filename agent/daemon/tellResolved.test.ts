import { Duplex } from "node:stream";
import { expect, test } from "vitest";
import { Conditions } from "../health/conditions.ts";
import { tellResolved } from "./tellResolved.ts";

interface Round {
  readonly applies?: boolean;
  readonly domains?: readonly string[];
  /** Does our own question come back? */
  readonly routed?: boolean;
  /** Of the unit behind the socket; undefined: it ends without one. */
  readonly answer?: string | undefined;
}

/** One round for each entry, on a clock that jumps to the end of every pause. */
async function tell(rounds: readonly Round[]) {
  let round = -1;
  const stop = new AbortController();
  const orders: string[] = [];
  const pausesMs: number[] = [];
  const routes: string[] = [];
  const said: (string | undefined)[] = [];
  const conditions = new Conditions(() => new Date(0));
  const now = (): Round => rounds[round] ?? {};
  let open = 0;
  const work = tellResolved(
    {
      host: {
        clock: {
          now: () => new Date(0),
          monotonicMs: () => 0,
          sleep: async (ms, signal) => {
            if (ms === 15_000) {
              // The wait for an answer: it is over when the answer is there, or never.
              await new Promise((_, reject) =>
                signal?.addEventListener("abort", () => reject(signal.reason), { once: true }),
              );
            }
            pausesMs.push(ms);
            said.push(conditions.list().find(({ id }) => id === "names-not-routed")?.message);
            if (round + 1 >= rounds.length) stop.abort();
            signal?.throwIfAborted();
          },
        },
        net: {
          connectUnix: async (path) => {
            expect(path).toBe("/in");
            open += 1;
            const socket = new Duplex({
              read: () => undefined,
              write(chunk: Buffer, _encoding, done) {
                orders.push(chunk.toString());
                const { answer } = now();
                if (answer !== undefined) this.push(`${answer}\n`);
                else this.destroy();
                done();
              },
            });
            socket.once("close", () => {
              open -= 1;
            });
            return socket;
          },
        },
      },
      socket: "/in",
      conditions,
      applies: async () => {
        round += 1;
        return now().applies ?? true;
      },
      domains: () => now().domains ?? ["cluster.local"],
      onRoutes: (domains) => routes.push(domains.join(" ")),
      routed: async () => now().routed ?? true,
    },
    stop.signal,
  );
  await expect(work).rejects.toThrow();
  await new Promise((resolve) => setImmediate(resolve));
  expect(open, "connections left open").toBe(0);
  return { orders, pausesMs, routes, said };
}

const OK = { answer: "ok" };

test("resolved is told once, and again only when the domains change or a question does not come back", async () => {
  const { orders } = await tell([
    OK,
    OK,
    { ...OK, domains: ["cluster.local", "~api.example.com"] },
    { ...OK, domains: ["cluster.local", "~api.example.com"] },
    { ...OK, domains: ["cluster.local", "~api.example.com"], routed: false },
  ]);
  expect(orders).toEqual([
    "cluster.local\n",
    "cluster.local ~api.example.com\n",
    "cluster.local ~api.example.com\n",
  ]);
});

test("while an order is under way the former routes count too: an answer may come by either", async () => {
  const { routes } = await tell([OK, { ...OK, domains: ["mesh.local"] }]);
  expect(routes).toEqual(["cluster.local", "cluster.local", "cluster.local mesh.local", "mesh.local"]);
});

test("an order that fails is repeated ever later, up to a minute, in the unit's words; then it is over", async () => {
  const refused = { answer: "resolvectl is not there" };
  const { pausesMs, said, routes } = await tell([...Array(7).fill(refused), OK, OK]);
  expect(pausesMs).toEqual([4, 8, 16, 32, 64, 64, 64, 2, 2].map((s) => s * 1000));
  expect(said[0]).toContain("resolvectl is not there");
  expect(said.slice(-2)).toEqual([undefined, undefined]);
  // What it was told may have got through all the same: nothing is taken back until it has said yes.
  expect(routes.at(-1)).toBe("cluster.local");
});

test("an end without an answer is a fault, not a yes", async () => {
  const { said } = await tell([{ answer: undefined }]);
  expect(said[0]).toContain("it ended without an answer");
});

test("where resolv.conf no longer names it, nobody is told, the complaint is over and the next look is soon", async () => {
  const { orders, said, pausesMs } = await tell([{ answer: "no" }, { applies: false }]);
  expect(pausesMs).toEqual([4000, 2000]);
  expect(orders.length).toBe(1);
  expect(said).toEqual([expect.stringContaining("no"), undefined]);
});
