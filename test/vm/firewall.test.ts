import { expect, test } from "vitest";
import { requireRoot } from "../lab/acceptance.ts";
import { proof } from "../prove/firewall.ts";

test("capture neither opens what the machine's firewall closes nor closes what it opens", {
  timeout: 400_000,
}, async () => {
  requireRoot();
  const rows = await proof.run("quick");
  for (const { what, value } of rows) console.log(`${what}: ${value}`);
  expect(rows.filter(({ holds }) => !holds)).toEqual([]);
  expect(rows.length).toBe(8);
});
