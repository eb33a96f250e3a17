import { expect, test } from "vitest";
import { requireRoot } from "../lab/acceptance.ts";
import { proof } from "../prove/order.ts";

test("whoever writes the firewall, requests by ClusterIP go through Envoy and the jump is first again at once", async () => {
  requireRoot();
  const rows = await proof.run("quick");
  console.log(rows.map(({ what, value, unit }) => `${what}: ${value} ${unit}`).join("\n"));
  expect(rows.filter(({ holds }) => !holds)).toEqual([]);
  expect(rows.length).toBeGreaterThan(14);
}, 600_000);
