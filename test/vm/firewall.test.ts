import { expect, test } from "vitest";
import { proof } from "../prove/firewall.ts";
import { quick } from "../prove/lane.ts";

test("capture neither opens what the machine's firewall closes nor closes what it opens", {
  timeout: 400_000,
}, async () => {
  const rows = await quick(proof);
  expect(rows.length).toBe(8);
});
