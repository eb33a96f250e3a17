import { requireRoot } from "../lab/acceptance.ts";
import { chosen, eachInTurn } from "../suite.ts";
import type { Proof, ProofRow } from "./proof.ts";

/**
 * `npm run prove:capture [-- --json] [--quick] [--only name,name]`: every number that capture promises, seen on real
 * components. Each other file of this folder holds one proof. Exit code 1 if a promise does not hold or a proof breaks.
 */
requireRoot();
const { json, scale, names } = chosen("proof", new URL(".", import.meta.url), [
  "lane.ts",
  "main.ts",
  "proof.ts",
]);

const rows: ProofRow[] = [];
const broken = await eachInTurn(names, async (name) => {
  const { proof } = (await import(`./${name}.ts`)) as { proof: Proof };
  process.stderr.write(`${name}: ${proof.about}\n`);
  rows.push(...(await proof.run(scale)));
});
if (json) process.stdout.write(`${JSON.stringify({ scale, rows, broken }, undefined, 2)}\n`);
else process.stdout.write(rows.map(line).join(""));
process.exitCode = broken.length > 0 || rows.some(({ holds }) => !holds) ? 1 : 0;

function line({ proof, what, value, unit, bound, holds, side }: ProofRow): string {
  const verdict = bound === "" ? "" : `  (${bound}: ${holds ? "holds" : "DOES NOT HOLD"})`;
  return `${proof.padEnd(14)} ${side.padEnd(7)} ${what}: ${value} ${unit}${verdict}\n`;
}
