import { expect, test } from "vitest";
import { proof } from "../prove/apply.ts";
import { quick } from "../prove/lane.ts";

test("rules are in force sooner than by istio-iptables, on empty tables and beside 20,000 rules of kube-proxy", {
  timeout: 300_000,
}, async () => {
  const rows = await quick(proof);
  expect(rows.filter(({ bound }) => bound !== "")).toHaveLength(4);
});
