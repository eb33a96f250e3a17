import { mkdtempSync, readdirSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { readCorpus } from "./fuzz/corpus.ts";
import { SLOW_MS } from "./fuzz/engine.ts";
import { runTarget } from "./fuzz/run.ts";
import type { Target } from "./fuzz/target.ts";

const FOLDER = new URL("fuzz/", import.meta.url).pathname;
const names = readdirSync(`${FOLDER}/targets`).map((file) => file.replace(/\.ts$/, ""));

/** Milliseconds of the processor that it takes; the best of three, for the first run compiles. */
async function run(target: Target, input: Uint8Array): Promise<number> {
  let best = Number.POSITIVE_INFINITY;
  for (let tries = 0; tries < 3 && best > SLOW_MS; tries += 1) {
    const before = process.threadCpuUsage();
    await target.run(Uint8Array.from(input));
    const { user, system } = process.threadCpuUsage(before);
    best = Math.min(best, (user + system) / 1000);
  }
  return best;
}

describe("every kept input of the fuzzer holds its parser's property", () => {
  test.each(names)("%s", async (name) => {
    const { target } = (await import(`${FOLDER}/targets/${name}.ts`)) as { target: Target };
    const inputs = [
      ...target.seeds.map((seed, at): [string, Uint8Array] => [`seed ${at}`, Buffer.from(seed)]),
      ...readCorpus(`${FOLDER}/corpus/${name}`),
    ];
    expect(inputs.length).toBeGreaterThan(0);
    for (const [file, input] of inputs) {
      const ms = await run(target, input).catch((cause: unknown) => {
        throw new Error(`corpus/${name}/${file} does not hold: ${target.about}`, { cause });
      });
      expect(ms, `corpus/${name}/${file}`).toBeLessThan(SLOW_MS);
    }
  });
});

test("the corpus stays small", () => {
  const bytes = names
    .flatMap((name) => [...readCorpus(`${FOLDER}/corpus/${name}`).values()])
    .reduce((sum, input) => sum + input.length, 0);
  expect(bytes).toBeLessThan(300_000);
});

describe("the fuzzer finds what was planted", () => {
  const planted = (name: string, hangMs = 10_000) =>
    runTarget(`file://${FOLDER}/planted/${name}.ts`, mkdtempSync(join(tmpdir(), "vmmesh-fuzz-")), 20, hangMs);

  test("a crash behind four comparisons, cut down to the bytes that matter", async () => {
    const { finding, saved = "" } = await planted("crash");
    expect(finding?.what).toMatch(/^TypeError: found\n/);
    expect(Buffer.from(finding?.input ?? []).toString()).toBe("FUZZ");
    expect([...readCorpus(join(saved, "..")).values()].map(String)).toEqual([String(finding?.input)]);
  });

  test("time that grows faster than the input", async () => {
    expect((await planted("slow")).finding?.what).toMatch(/^time grows faster than size: /);
  });

  test("an input that fills the memory", async () => {
    const { finding } = await planted("memory");
    expect(finding?.what).toBe("needs more than 256 MB");
    expect(finding?.input[0]).toBe(0x39);
  });

  test("an input that never ends", async () => {
    const { finding } = await planted("hang", 1000);
    expect(finding?.what).toMatch(/^does not end within /);
    expect(finding?.input).toContain(0xff);
  });
});
