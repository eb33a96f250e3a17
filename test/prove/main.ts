import { readdirSync } from "node:fs";
import { parseArgs } from "node:util";
import { requireRoot } from "../lab/acceptance.ts";
import type { Proof, ProofRow, Scale } from "./proof.ts";

/**
 * `npm run prove:capture [-- --json] [--quick] [--only name,name]`: every number that capture promises, seen on real
 * components. Each other file of this folder holds one proof. Exit code 1 if a promise does not hold or a proof breaks.
 */
const { values } = parseArgs({
  options: {
    json: { type: "boolean", default: false },
    quick: { type: "boolean", default: false },
    only: { type: "string" },
  },
});
requireRoot();
const scale: Scale = values.quick ? "quick" : "full";
const names = readdirSync(new URL(".", import.meta.url))
  .filter((file) => file.endsWith(".ts") && !["lane.ts", "main.ts", "proof.ts"].includes(file))
  .map((file) => file.slice(0, -".ts".length));
const only = values.only?.split(",");
const unknown = only?.find((name) => !names.includes(name));
if (unknown !== undefined) {
  process.stderr.write(`no proof is called "${unknown}"; there are: ${names.join(", ")}\n`);
  process.exit(64);
}

const rows: ProofRow[] = [];
const broken: string[] = [];
for (const name of names.filter((each) => only?.includes(each) ?? true)) {
  const { proof } = (await import(`./${name}.ts`)) as { proof: Proof };
  process.stderr.write(`${name}: ${proof.about}\n`);
  try {
    rows.push(...(await proof.run(scale)));
  } catch (error) {
    broken.push(name);
    process.stderr.write(
      `${name} broke: ${error instanceof Error ? (error.stack ?? error.message) : error}\n`,
    );
  }
}
if (values.json) process.stdout.write(`${JSON.stringify({ scale, rows, broken }, undefined, 2)}\n`);
else process.stdout.write(rows.map(line).join(""));
process.exitCode = broken.length > 0 || rows.some(({ holds }) => !holds) ? 1 : 0;

function line({ proof, what, value, unit, bound, holds, side }: ProofRow): string {
  const verdict = bound === "" ? "" : `  (${bound}: ${holds ? "holds" : "DOES NOT HOLD"})`;
  return `${proof.padEnd(14)} ${side.padEnd(7)} ${what}: ${value} ${unit}${verdict}\n`;
}
