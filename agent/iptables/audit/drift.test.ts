import { expect, test } from "vitest";
import { MACHINE_V4 as MACHINE, WISH as USUAL } from "../../../test/fakes/capture.ts";
import type { CaptureWish, MachineFacts } from "../plan/wish.ts";
import { planCapture } from "../plan.ts";
import { parsePolicyRule } from "../policy.ts";
import { driftFindings } from "./drift.ts";

const WISH: CaptureWish = {
  ...USUAL,
  inbound: { kind: "ports", ports: [9080] },
  dns: { servers: ["10.0.0.2"] },
  ipv6: false,
  istiod: ["10.99.0.2:15012"],
};
const evidence = (wish: Partial<CaptureWish>, machine: Partial<MachineFacts> = {}): readonly string[] =>
  driftFindings(
    planCapture(WISH, MACHINE),
    planCapture({ ...WISH, ...wish }, { ...MACHINE, ...machine }),
  ).flatMap((finding) => finding.evidence);

test("the same configuration is no drift", () => {
  expect(evidence({})).toEqual([]);
});

const CHANGES: readonly { name: string; lines: readonly string[]; says: string }[] = [
  { name: "istiod has another address", lines: evidence({ istiod: ["10.99.0.3:15012"] }), says: "10.99.0.3" },
  { name: "the resolver has changed", lines: evidence({ dns: { servers: ["10.0.0.9"] } }), says: "10.0.0.9" },
  {
    name: "another network of the mesh",
    lines: evidence({ meshCidrs: ["10.97.0.0/16"] }),
    says: "10.97.0.0/16",
  },
  { name: "sshd listens elsewhere", lines: evidence({}, { sshPorts: [2222] }), says: "2222" },
  {
    name: "a port that may fail open",
    lines: evidence({ failurePolicy: [parsePolicyRule("inbound:9080=open")] }),
    says: "9080",
  },
];

test.for(CHANGES)("$name: what would come and what would go is named", ({ lines, says }) => {
  expect(lines.some((line) => line.startsWith("would come: ") && line.includes(says))).toBe(true);
  expect(lines.some((line) => line.startsWith("would go: "))).toBe(true);
  expect(lines.length).toBeLessThanOrEqual(8);
});
