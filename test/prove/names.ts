import { spawn } from "node:child_process";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { decode, encode } from "dns-packet";
import type { Taken, Weighed } from "../netns/many-names.ts";
import type { Scale } from "../suite.ts";
import { type Proof, type ProofRow, row } from "./proof.ts";

const SERVER = new URL("../netns/many-names.ts", import.meta.url).pathname;
const PORT = 19_153;
const SERVICES = 10_000;
const TABLES: Readonly<Record<Scale, number>> = { quick: 9, full: 49 };
const MIB = 2 ** 20;

/** Asks over UDP, one question after the other. */
class Client implements Disposable {
  readonly #socket = createSocket("udp4");
  #id = 0;
  lost = 0;
  wrong = 0;

  /** @returns the second byte of the address, which is the table's number, and how long the answer took in ms */
  async ask(service: number): Promise<{ table: number; tookMs: number }> {
    this.#id = (this.#id + 1) % 0x10000;
    const name = `service-${service}.ns-${service % 100}.svc.cluster.local`;
    const query = encode({ type: "query", id: this.#id, flags: 0x100, questions: [{ type: "A", name }] });
    const startedMs = performance.now();
    this.#socket.send(query, PORT, "127.0.0.1");
    const heard = await once(this.#socket, "message", { signal: AbortSignal.timeout(5000) }).catch(
      () => undefined,
    );
    const tookMs = performance.now() - startedMs;
    if (heard === undefined) {
      this.lost += 1;
      return { table: -1, tookMs };
    }
    const { id, answers = [] } = decode(heard[0] as Buffer);
    const data = answers[0]?.type === "A" ? answers[0].data : "";
    const [, table, ...rest] = data.split(".");
    if (id !== this.#id || rest.join(".") !== `${service >> 8}.${service & 255}`) this.wrong += 1;
    return { table: Number(table), tookMs };
  }

  [Symbol.dispose](): void {
    this.#socket.close();
  }
}

export const proof: Proof = {
  name: "names",
  about: `${SERVICES} services: memory, lookups, and how long an answer waits while a table is replaced`,
  async run(scale) {
    const argv = ["--max-semi-space-size=1", SERVER, PORT, SERVICES, TABLES[scale]].map(String);
    const child = spawn(process.execPath, argv, { stdio: ["pipe", "pipe", "inherit"] });
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const heard = async (): Promise<unknown> => {
      const { value, done } = await lines.next();
      if (done === true) throw new Error("the server ended in the middle");
      return JSON.parse(value);
    };
    try {
      using client = new Client();
      const empty = (await heard()) as Weighed;
      const changes: { taken: Taken; longestMs: number }[] = [];
      for (let table = 0; table < TABLES[scale]; table += 1) {
        let taken: Taken | undefined;
        child.stdin.write("next\n");
        const taking = heard().then((it) => {
          taken = it as Taken;
        });
        let longestMs = 0;
        // Without a table the question would go to the machine's resolver: the first one is only waited for.
        while (table > 0 && taken === undefined) {
          const { tookMs, table: of } = await client.ask(changes.length % SERVICES);
          longestMs = Math.max(longestMs, tookMs);
          if (of !== table && of !== table - 1) client.wrong += 1;
        }
        await taking;
        if (taken !== undefined && table > 0) changes.push({ taken, longestMs });
        if ((await client.ask(table)).table !== table) client.wrong += 1;
      }
      const atRest: number[] = [];
      for (let service = 0; service < SERVICES; service += 1) atRest.push((await client.ask(service)).tookMs);
      child.stdin.end();
      const full = (await heard()) as Weighed;
      return rows(empty, full, changes, atRest, client);
    } finally {
      child.kill();
    }
  },
};

function rows(
  empty: Weighed,
  full: Weighed,
  changes: readonly { taken: Taken; longestMs: number }[],
  atRest: readonly number[],
  { lost, wrong }: Client,
): ProofRow[] {
  const say = (what: string, value: number, unit: string, bound: string): ProofRow =>
    row("names", what, Number(value.toFixed(2)), unit, bound);
  const { names } = changes[0]?.taken ?? { names: 0 };
  return [
    say(
      `names of ${SERVICES} services (one message of ${(full.messageBytes / MIB).toFixed(1)} MiB)`,
      names,
      "names",
      `>= ${3 * SERVICES}`,
    ),
    say("memory that a table takes", (full.heapBytes - empty.heapBytes) / MIB, "MiB", "< 24"),
    say(`an answer at rest, median of ${atRest.length}`, quantile(atRest, 0.5), "ms", "< 2"),
    say("an answer at rest, 99th percentile", quantile(atRest, 0.99), "ms", "< 20"),
    say(
      `the answer that waited longest in a change, median of ${changes.length} changes`,
      quantile(
        changes.map((it) => it.longestMs),
        0.5,
      ),
      "ms",
      "< 40",
    ),
    say(
      "from the message to answers out of it, median",
      quantile(
        changes.map((it) => it.taken.tookMs),
        0.5,
      ),
      "ms",
      "< 2000",
    ),
    say("answers lost", lost, "answers", "= 0"),
    say("answers that neither the old nor the new table gives", wrong, "answers", "= 0"),
  ];
}

function quantile(values: readonly number[], share: number): number {
  return values.toSorted((one, other) => one - other)[Math.floor(share * values.length)] ?? Number.NaN;
}
