import { expect, test } from "vitest";
import { requireRoot } from "../lab/acceptance.ts";
import { proof } from "../prove/ssh.ts";

test("nobody is locked out by an apply, however it ends, and foreign rules stay", {
  timeout: 300_000,
}, async () => {
  requireRoot();
  const rows = await proof.run("quick");
  for (const { what, value, unit, bound } of rows) console.log(`${what}: ${value} ${unit} ${bound}`);
  expect(rows.filter(({ holds }) => !holds)).toEqual([]);
  expect(rows.length).toBeGreaterThan(6);
});
