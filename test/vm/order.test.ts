import { expect, test } from "vitest";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/order.ts";

test("whoever writes the firewall, requests by ClusterIP go through Envoy and the jump is first again at once", async () => {
  const rows = await quick(proof);
  expect(rows.length).toBeGreaterThan(20);
}, 600_000);
