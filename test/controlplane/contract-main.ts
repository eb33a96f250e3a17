// Runs the contract against the control plane whose papers come on standard input (a `Target` as JSON); prints a list of
// `{name, error?}`. A program of its own, because the real istiod lives in a network namespace.
import { text } from "node:stream/consumers";
import { CONTRACT, type Target } from "./contract.ts";

const target = JSON.parse(await text(process.stdin)) as Target;
const results: { name: string; error?: string }[] = [];
for (const { name, check } of CONTRACT) {
  try {
    await check(target);
    results.push({ name });
  } catch (thrown) {
    results.push({
      name,
      error: thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown),
    });
  }
}
process.stdout.write(`${JSON.stringify(results)}\n`);
