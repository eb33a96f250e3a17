import { expect, test } from "vitest";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/ssh.ts";

test("nobody is locked out by an apply, however it ends, and foreign rules stay", {
  timeout: 300_000,
}, async () => {
  const rows = await quick(proof);
  expect(rows.length).toBeGreaterThan(6);
});
