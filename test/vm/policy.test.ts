import { expect, test } from "vitest";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/policy.ts";

test("whatever happens to Envoy, the agent or the rules, nothing for the mesh leaves in plaintext, and what is open flows", async () => {
  const rows = await quick(proof);
  expect(rows.length).toBeGreaterThan(20);
}, 600_000);
