import { readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { readCorpus } from "./corpus.ts";
import { runTarget } from "./run.ts";

/**
 * `npm run fuzz [-- --target NAME,NAME] [--seconds N] [--json]`: N seconds (60) for each parser, one after the other.
 * Exit code 1 if one of them broke its property; the input lies in test/fuzz/corpus/NAME then.
 */
const { values } = parseArgs({
  options: {
    json: { type: "boolean", default: false },
    seconds: { type: "string", default: "60" },
    target: { type: "string" },
  },
});
const names = readdirSync(new URL("targets/", import.meta.url)).map((file) => file.replace(/\.ts$/, ""));
const wanted = values.target?.split(",") ?? names;
const unknown = wanted.find((name) => !names.includes(name));
const seconds = Number(values.seconds);
if (unknown !== undefined || !(seconds > 0)) {
  const why =
    unknown === undefined
      ? `--seconds is a number above 0, not "${values.seconds}"`
      : `no target is called "${unknown}"; there are: ${names.join(", ")}`;
  process.stderr.write(`${why}\n`);
  process.exit(64);
}

const rows = [];
for (const target of wanted) {
  const corpus = fileURLToPath(new URL(`corpus/${target}`, import.meta.url));
  const run = await runTarget(new URL(`targets/${target}.ts`, import.meta.url).href, corpus, seconds);
  const { finding, saved, ...numbers } = run;
  const kept = [...readCorpus(corpus).values()];
  const bytes = kept.reduce((sum, input) => sum + input.length, 0);
  rows.push({ target, seconds, ...numbers, inputs: kept.length, bytes, finding: finding?.what, saved });
  const { executions, reachedBefore, reached, slowestMs } = numbers;
  process.stderr.write(
    `${target.padEnd(16)} ${executions} executions, reached ${reachedBefore} → ${reached}, slowest ${slowestMs.toFixed(1)} ms, kept ${kept.length} inputs (${bytes} bytes)\n`,
  );
  if (finding !== undefined) process.stderr.write(`${target}: ${finding.what}\n  the input is ${saved}\n`);
}
if (values.json) process.stdout.write(`${JSON.stringify(rows, undefined, 2)}\n`);
process.exitCode = rows.some(({ finding }) => finding !== undefined) ? 1 : 0;
