import { expect, test } from "vitest";
import { foreignUse } from "./routing.ts";

const MAIN = { priority: 32_766, table: "254" };
const LO = { type: "local", dst: "default", dev: "lo" };

test.for([
  { name: "nothing but the kernel's own rules", rules: [MAIN], routes: [], shared: undefined },
  {
    name: "what we, or Istio's own tools, have laid",
    rules: [
      { priority: 133, fwmark: "0x539", fwmask: "0xfff", table: "133" },
      { priority: 9, fwmark: "0x539", table: "133" },
    ],
    routes: [LO],
    shared: undefined,
  },
  {
    name: "Tailscale, whose bits lie higher",
    rules: [{ priority: 5210, fwmark: "0x80000", fwmask: "0xff0000", table: "254" }],
    routes: [],
    shared: undefined,
  },
  {
    name: "Cilium, whose four bits have another value",
    rules: [{ priority: 9, fwmark: "0x200", fwmask: "0xf00", table: "2004" }],
    routes: [],
    shared: undefined,
  },
  {
    name: "WireGuard, which takes all but its own mark",
    rules: [{ priority: 32_765, not: null, fwmark: "0xca6c", table: "51820" }],
    routes: [],
    shared: undefined,
  },
  {
    name: "a rule for the same mark",
    rules: [{ priority: 100, fwmark: "0x539", table: "77" }],
    routes: [],
    shared: "a routing rule takes Istio's mark elsewhere (priority 100, mark 0x539, table 77)",
  },
  {
    name: "a rule for some of its bits",
    rules: [{ priority: 100, fwmark: "0x1", fwmask: "0x1", table: "77" }],
    routes: [],
    shared: "a routing rule takes Istio's mark elsewhere (priority 100, mark 0x1, table 77)",
  },
  {
    name: "a rule of another kind for the table",
    rules: [{ priority: 100, table: "133" }],
    routes: [],
    shared: "another rule uses routing table 133 (priority 100, mark none, table 133)",
  },
  {
    name: "a route in the table",
    rules: [],
    routes: [LO, { dst: "10.1.0.0/16", dev: "eth1" }],
    shared: "routing table 133 has a route to 10.1.0.0/16",
  },
] as const)("who shares mark or table: $name", ({ rules, routes, shared }) => {
  expect(foreignUse(rules, routes, 133)).toBe(shared);
});
