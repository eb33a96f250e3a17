import { describe, expect, test } from "vitest";
import { isRoutable, routedDomains } from "./routed.ts";

const tableOf = (...names: string[]) => ({
  names: new Map(names.map((name) => [name, { v4: ["192.0.2.1"], v6: [] }])),
});
const SEARCH = ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"];
const routed = (names: string[], max?: number) =>
  routedDomains(tableOf(...names), "svc.cluster.local", "shop", max);

describe("the domains that systemd-resolved sends to us", () => {
  test("are a pod's search list, also before the first table", () => {
    expect(routedDomains(undefined, "svc.cluster.local", "shop")).toEqual(SEARCH);
  });

  test("and every other name of the mesh, a wildcard as its domain, none below another", () => {
    expect(
      routed(["a.shop.svc.cluster.local.", "*.example.com.", "api.example.com.", "db.corp.test."]),
    ).toEqual([...SEARCH, "~db.corp.test", "~example.com"]);
  });

  test("short names and what is no domain are left out", () => {
    expect(routed(["reviews.", "*.com.", "bad name.test.", "-x.test."])).toEqual(SEARCH);
  });

  test("too many are given by what they end in, never by a top-level domain", () => {
    const names = Array.from({ length: 2000 }, (_, index) => `n${index}.a.example.com.`);
    expect(routed([...names, "db.corp.test."])).toEqual([...SEARCH, "~a.example.com", "~db.corp.test"]);
    expect(routed(["a.one.test.", "b.two.test.", "c.three.test."], 5).length).toBe(5);
  });

  test.for(["~.", ".", "com", "~com", "-x.test", "a b.test", "--help", "a..b", `${"a".repeat(64)}.test`])(
    "%s is none",
    (domain) => expect(isRoutable(domain)).toBe(false),
  );
});
