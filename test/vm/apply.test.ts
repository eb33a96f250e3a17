import { expect, test } from "vitest";
import { requireRoot } from "../lab/acceptance.ts";
import { proof } from "../prove/apply.ts";

test("rules are in force sooner than by istio-iptables, on empty tables and beside 20,000 rules of kube-proxy", {
  timeout: 300_000,
}, async () => {
  requireRoot();
  const rows = await proof.run("quick");
  for (const { what, value, unit, bound } of rows) console.log(`${what}: ${value} ${unit} ${bound}`);
  expect(rows.filter(({ holds }) => !holds)).toEqual([]);
  expect(rows.filter(({ bound }) => bound !== "")).toHaveLength(3);
});
