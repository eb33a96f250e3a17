import { requireRoot } from "../lab/acceptance.ts";
import { chosen, eachInTurn } from "../suite.ts";
import { type Fault, holds, type Row } from "./fault.ts";
import { Stage } from "./stage.ts";

/**
 * `npm run drill [-- --json] [--quick] [--only name,name]`: what each fault costs, beside the real pilot-agent. Needs root
 * and the deb of `scripts/package`. Exit code 1 if a promise does not hold or a fault could not be made.
 */
requireRoot();
const { json, scale, names } = chosen("fault", new URL("faults/", import.meta.url));

const rows: Row[] = [];
const stage = await Stage.open();
let broken: string[];
try {
  broken = await eachInTurn(names, async (name) => {
    const { fault } = (await import(`./faults/${name}.ts`)) as { fault: Fault };
    process.stderr.write(`${name}: ${fault.about}\n`);
    const seen = await fault.run(stage, scale);
    rows.push(...seen);
    for (const each of seen) process.stderr.write(`  ${line(each)}`);
  });
} finally {
  await stage.close();
}
if (json) process.stdout.write(`${JSON.stringify(rows, undefined, 2)}\n`);
else process.stdout.write(rows.map(line).join(""));
if (broken.length > 0) process.stderr.write(`could not be done: ${broken.join(", ")}\n`);
process.exitCode = broken.length > 0 || !rows.every(holds) ? 1 : 0;

function line(row: Row): string {
  const { fault, side, requests, lost, allowed, because, recoverMs, end, happened, unmet } = row;
  const most = allowed === undefined ? "" : ` (allowed ${allowed}${because === "" ? "" : `: ${because}`})`;
  const verdict = side === "peer" ? "" : holds(row) ? "holds; " : "DOES NOT HOLD; ";
  const back = recoverMs === undefined ? "never well again" : `well after ${Math.round(recoverMs)} ms`;
  return `${fault.padEnd(28)} ${side.padEnd(7)} ${lost} of ${requests} lost${most}, ${back}; ${verdict}${unmet === undefined ? "" : `NOT KEPT: ${unmet}; `}${end} (${happened})\n`;
}
