import { describe, expect, test } from "vitest";
import { answer, LEASE_NAME, shuffled, TYPE } from "./answer.ts";
import { buildTable, lookUp, type NameEntry } from "./table.ts";

const entry = (ips: string[], more: Partial<NameEntry> = {}): NameEntry => ({
  ips,
  registry: "Kubernetes",
  shortname: "",
  namespace: "",
  altHosts: [],
  ...more,
});

const table = buildTable(
  new Map([
    [
      "Details.ns1.svc.cluster.local",
      entry(["10.0.0.1", "fd00::1"], {
        shortname: "details",
        namespace: "ns1",
        altHosts: ["details.ns1.svc.alt"],
      }),
    ],
    ["ratings.ns2.svc.cluster.local", entry(["10.0.0.2"], { shortname: "ratings", namespace: "ns2" })],
    ["db.other.example", entry(["10.0.0.3"], { shortname: "db", namespace: "ns1" })],
    ["api.example.com", entry(["10.0.0.4"], { registry: "External" })],
    ["*.example.com", entry(["10.0.0.5"], { registry: "External" })],
    ["*.deep.example.com", entry(["10.0.0.6"], { registry: "External" })],
    ["nowhere.example.com", entry(["not-an-ip"], { registry: "External" })],
    ["dotted.example.net.", entry(["10.0.0.7"])],
    ["details.ns1", entry(["10.0.0.8"], { registry: "External" })],
  ]),
  { proxyDomain: "svc.cluster.local", namespace: "ns1" },
);

describe("buildTable and lookUp", () => {
  test.for([
    { name: "the host itself, in lower case", ask: "details.ns1.svc.cluster.local.", v4: "10.0.0.1" },
    { name: "short.ns.svc", ask: "details.ns1.svc.", v4: "10.0.0.1" },
    { name: "the bare short name in our own namespace", ask: "details.", v4: "10.0.0.1" },
    { name: "an alternative host", ask: "details.ns1.svc.alt.", v4: "10.0.0.1" },
    { name: "not the bare short name of another namespace", ask: "ratings.", v4: undefined },
    { name: "short.ns of another namespace", ask: "ratings.ns2.", v4: "10.0.0.2" },
    { name: "a host's own name wins over a derived one", ask: "details.ns1.", v4: "10.0.0.8" },
    { name: "another domain: only the host", ask: "db.ns1.", v4: undefined },
    { name: "an external host", ask: "api.example.com.", v4: "10.0.0.4" },
    { name: "the nearest wildcard first", ask: "x.y.deep.example.com.", v4: "10.0.0.6" },
    { name: "the farther wildcard for the rest", ask: "x.y.example.com.", v4: "10.0.0.5" },
    { name: "a wildcard does not cover its own base", ask: "example.com.", v4: undefined },
    {
      name: "an entry without usable address falls to the wildcard",
      ask: "nowhere.example.com.",
      v4: "10.0.0.5",
    },
    { name: "a Kubernetes host that ends in a dot has no name", ask: "dotted.example.net.", v4: undefined },
    { name: "the root", ask: ".", v4: undefined },
  ])("$name", ({ ask, v4 }) => {
    expect(lookUp(table, ask, [])?.addresses.v4[0]).toBe(v4);
  });

  test.for([
    {
      name: "every search domain counts, not only the first",
      ask: "ratings.ns2.lab.test.",
      alias: "ratings.ns2.",
    },
    { name: "a domain with a trailing dot", ask: "api.example.com.corp.test.", alias: "api.example.com." },
    { name: "a wildcard below a search domain", ask: "q.example.com.corp.test.", alias: "q.example.com." },
    {
      name: "a real name that ends in a search domain needs no alias",
      ask: "ratings.ns2.svc.cluster.local.",
      alias: undefined,
    },
  ])("search: $name", ({ ask, alias }) => {
    const found = lookUp(table, ask, ["corp.test.", "lab.test", "svc.cluster.local", "."]);
    expect(found).toBeDefined();
    expect(found?.alias).toBe(alias);
  });
});

describe("answer", () => {
  const ask = (name: string, type: number, klass = 1) =>
    answer(table, { name, type, class: klass }, ["corp.test"]);

  test("A and AAAA are split", () => {
    expect(ask("details.", TYPE.A)).toEqual({ addresses: ["10.0.0.1"] });
    expect(ask("details.", TYPE.AAAA)).toEqual({ addresses: ["fd00::1"] });
  });
  test("a name without that family is answered with nothing, never denied", () => {
    expect(ask("ratings.ns2.", TYPE.AAAA)).toEqual({ addresses: [] });
  });
  test("a search domain becomes an alias", () => {
    expect(ask("details.corp.test.", TYPE.A)).toEqual({ alias: "details.", addresses: ["10.0.0.1"] });
  });
  test("other types and classes are forwarded also for our names", () => {
    expect(ask("details.", 65)).toBe("forward");
    expect(ask("details.", TYPE.A, 3)).toBe("forward");
    expect(ask("unknown.test.", TYPE.A)).toBe("forward");
  });
  // istio #43276: with capture on and no table yet, LDAP and with it SSH logins failed.
  test("before the first table everything is forwarded, except the lease", () => {
    expect(answer(undefined, { name: "details.", type: TYPE.A, class: 1 }, [])).toBe("forward");
    expect(answer(undefined, { name: LEASE_NAME, type: TYPE.A, class: 1 }, [])).toEqual({ addresses: [] });
  });
  test("shuffled keeps every item", () => {
    expect(shuffled([1, 2, 3, 4], () => 0)).toEqual([2, 3, 4, 1]);
    expect(shuffled([], Math.random)).toEqual([]);
  });
});
