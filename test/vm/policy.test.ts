import { expect, test } from "vitest";
import { requireRoot } from "../lab/acceptance.ts";
import { proof } from "../prove/policy.ts";

test("whatever happens to Envoy, the agent or the rules, nothing for the mesh leaves in plaintext, and what is open flows", async () => {
  requireRoot();
  const rows = await proof.run("quick");
  expect(rows.filter(({ holds }) => !holds)).toEqual([]);
  expect(rows.length).toBeGreaterThan(20);
}, 600_000);
