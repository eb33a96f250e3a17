import { readdirSync } from "node:fs";
import { parseArgs } from "node:util";
import { requireRoot } from "../lab/acceptance.ts";
import { type Fault, holds, type Row, type Scale } from "./fault.ts";
import { Stage } from "./stage.ts";

/**
 * `npm run drill [-- --json] [--quick] [--only name,name]`: what each fault costs, beside the real pilot-agent. Needs root
 * and the deb of `scripts/package`. Exit code 1 if a promise does not hold or a fault could not be made.
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
const names = readdirSync(new URL("faults/", import.meta.url)).map((file) => file.slice(0, -".ts".length));
const only = values.only?.split(",");
const unknown = only?.find((name) => !names.includes(name));
if (unknown !== undefined) {
  process.stderr.write(`no fault is called "${unknown}"; there are: ${names.join(", ")}\n`);
  process.exit(64);
}

const rows: Row[] = [];
const broken: string[] = [];
const stage = await Stage.open();
try {
  for (const name of names.filter((each) => only?.includes(each) ?? true)) {
    const { fault } = (await import(`./faults/${name}.ts`)) as { fault: Fault };
    process.stderr.write(`${name}: ${fault.about}\n`);
    try {
      const seen = await fault.run(stage, scale);
      rows.push(...seen);
      for (const each of seen) process.stderr.write(`  ${line(each)}`);
    } catch (error) {
      broken.push(name);
      process.stderr.write(
        `${name} broke: ${error instanceof Error ? (error.stack ?? error.message) : error}\n`,
      );
    }
  }
} finally {
  await stage.close();
}
if (values.json) process.stdout.write(`${JSON.stringify(rows, undefined, 2)}\n`);
else process.stdout.write(rows.map(line).join(""));
if (broken.length > 0) process.stderr.write(`could not be done: ${broken.join(", ")}\n`);
process.exitCode = broken.length > 0 || !rows.every(holds) ? 1 : 0;

function line(row: Row): string {
  const { fault, side, requests, lost, allowed, because, recoverMs, end } = row;
  const most = allowed === undefined ? "" : ` (allowed ${allowed}${because === "" ? "" : `: ${because}`})`;
  const verdict = side === "peer" ? "" : holds(row) ? "holds; " : "DOES NOT HOLD; ";
  const back = recoverMs === undefined ? "never well again" : `well after ${Math.round(recoverMs)} ms`;
  return `${fault.padEnd(28)} ${side.padEnd(7)} ${lost} of ${requests} lost${most}, ${back}; ${verdict}${end}\n`;
}
