import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { PROBE_ADDRESS } from "../core/paths.ts";
import { describePlan } from "./plan/describe.ts";
import type { CaptureWish, MachineFacts } from "./plan/wish.ts";
import { planCapture } from "./plan.ts";
import { parsePolicyRule, sameNetwork } from "./policy.ts";
import { renderPlan } from "./render.ts";
import { isHook, MAX_WHY, type Match } from "./rules.ts";

const MODERN: MachineFacts = {
  backend: "nft",
  backendWhy: "the machine's other rules are there",
  programs: { 4: "iptables-nft", 6: "ip6tables-nft" },
  nft: true,
  ipv6: true,
  sshPorts: [22],
};
const OLD: MachineFacts = {
  backend: "legacy",
  backendWhy: "the only one there is",
  programs: { 4: "iptables-legacy", 6: "ip6tables-legacy" },
  nft: false,
  ipv6: true,
  sshPorts: [22, 2222],
};

const JOIN: CaptureWish = {
  agentUid: 990,
  envoyUid: 989,
  inbound: { kind: "ports", ports: [8080, 9000] },
  sshPorts: [],
  outbound: { cidrs: ["*"], excludeCidrs: ["192.168.7.0/24"], excludePorts: [5432] },
  meshCidrs: ["10.96.0.0/12", "fd96::/108"],
  dns: { servers: ["127.0.0.53", "fd00::53"] },
  ipv6: true,
  istiod: ["10.200.0.2:15012"],
  keep: ["10.9.0.0/16"],
};

const TPROXY = { mode: "TPROXY", routeTable: 133 } as const;

describe("rendered texts, as a person reviews them and the kernel gets them", () => {
  test.for([
    { name: "join", wish: JOIN, machine: MODERN },
    {
      name: "inbound-all-legacy",
      wish: {
        ...JOIN,
        inbound: { kind: "all", excludePorts: [111] },
        outbound: { ...JOIN.outbound, cidrs: ["10.0.0.0/8"] },
      },
      machine: OLD,
    },
    {
      name: "interfaces",
      wish: {
        ...JOIN,
        excludeInterfaces: ["wg0"],
        virtualInterfaces: ["docker0", "virbr+"],
        dropInvalid: true,
      },
      machine: { ...MODERN, interfaces: ["lo", "eth0", "docker0", "virbr0"] },
    },
    { name: "tproxy", wish: { ...JOIN, interception: TPROXY }, machine: MODERN },
    {
      name: "tproxy-inbound-all-legacy",
      wish: { ...JOIN, interception: TPROXY, inbound: { kind: "all", excludePorts: [111] } },
      machine: OLD,
    },
    {
      name: "failure-policy",
      wish: {
        ...JOIN,
        outbound: { ...JOIN.outbound, cidrs: ["*"] },
        failurePolicy: [
          "outbound:*=closed",
          "outbound:10.96.0.10=open",
          "outbound:10.0.0.0/8:443=open",
          "outbound:[2001:db8::/32]=open",
          "inbound:9000=open",
        ].map(parsePolicyRule),
      },
      machine: MODERN,
    },
    {
      name: "failure-policy-inbound-all",
      wish: {
        ...JOIN,
        ipv6: false,
        inbound: { kind: "all", excludePorts: [111] },
        failurePolicy: ["inbound:*=closed", "inbound:8080=open"].map(parsePolicyRule),
      },
      machine: MODERN,
    },
    {
      name: "senders",
      wish: {
        ...JOIN,
        ipv6: false,
        outbound: { ...JOIN.outbound, cidrs: ["10.0.0.0/8"], includePorts: [443] },
        senders: { only: { uids: [1000], gids: [2000] }, never: { uids: [0], gids: [3000] } },
      },
      machine: MODERN,
    },
  ] as const)("$name", async ({ name, wish, machine }) => {
    const rendered = renderPlan(planCapture(wish, machine));
    const parts = {
      "ipv4.rules": rendered.ipv4,
      "ipv6.rules": rendered.ipv6,
      "guard.nft": rendered.guard,
      "fence.nft": rendered.fence,
      "routing.sh": rendered.routing,
      "held.nft": rendered.held,
      "undo.sh": rendered.undo,
    };
    for (const [part, text] of Object.entries(parts)) {
      if (text !== undefined) await expect(text).toMatchFileSnapshot(`./golden/${name}.${part}`);
    }
    await expect(describePlan(rendered.plan)).toMatchFileSnapshot(`./golden/${name}.plan.txt`);
  });
});

describe("what a machine cannot have", () => {
  test("without nf_tables guard and fence are left out, and it is said", () => {
    const plan = planCapture(JOIN, OLD);
    expect(plan.guard).toBe(false);
    expect(plan.fence).toEqual([]);
    expect(describePlan(plan)).toContain("guard and fence are left out");
  });

  test("without iptables the guard captures alone, and it is said", () => {
    const plan = planCapture(JOIN, {
      ...MODERN,
      backend: undefined,
      backendWhy: "there is no iptables that can be used",
      programs: { 4: undefined, 6: undefined },
    });
    const rendered = renderPlan(plan);
    expect(rendered).toMatchObject({ ipv4: undefined, ipv6: undefined });
    expect(rendered.guard).toContain("table ip vmmesh");
    expect(describePlan(plan)).toContain(
      "nftables, in tables of its own (there is no iptables that can be used)",
    );
  });

  test("with neither, it is refused", () => {
    expect(() => planCapture(JOIN, { ...OLD, backend: undefined })).toThrow(
      expect.objectContaining({ code: "RULES_REJECTED" }),
    );
  });

  test("without ip6tables and nft the IPv6 gap is said", () => {
    expect(planCapture(JOIN, { ...OLD, programs: { 4: "iptables", 6: undefined } }).notes).toContain(
      "ip6tables is missing: IPv6 traffic is not captured",
    );
    expect(planCapture(JOIN, { ...MODERN, programs: { 4: "iptables-nft", 6: undefined } }).notes).toContain(
      "ip6tables is missing: the guard table captures IPv6 alone",
    );
  });
});

test("a unit that is chosen and a backend of iptables that was asked for exclude each other", () => {
  const senders = {
    only: { uids: [], gids: [] },
    never: { uids: [], gids: [], units: [{ unit: "a.service", path: "system.slice/a.service" }] },
  } as const;
  expect(planCapture({ ...JOIN, senders }, MODERN)).toMatchObject({
    backend: undefined,
    backendWhy: "units are chosen",
  });
  expect(() => planCapture({ ...JOIN, senders }, { ...MODERN, backendAsked: true })).toThrow(
    expect.objectContaining({ code: "USAGE", next: expect.stringContaining("--backend nftables") }),
  );
});

describe("wishes that are refused", () => {
  test.for([
    { name: "root as an exempt user", wish: { envoyUid: 0 } },
    { name: "a network that is none", wish: { meshCidrs: ["10.96.0.0/33"] } },
    { name: "a name instead of a resolver's address", wish: { dns: { servers: ["localhost"] } } },
    { name: "a name instead of istiod's address", wish: { istiod: ["istiod.istio-system.svc"] } },
    { name: "a port beyond the last", wish: { inbound: { kind: "ports", ports: [70_000] } } },
    { name: "lo as an interface to leave alone", wish: { excludeInterfaces: ["lo"] } },
    {
      name: "an interface that is excluded and captured",
      wish: { excludeInterfaces: ["a0"], virtualInterfaces: ["a0"] },
    },
    { name: "a rule smuggled into an interface", wish: { virtualInterfaces: ["a -j DROP"] } },
    { name: "a name that no interface can have", wish: { excludeInterfaces: ["sixteen-letters0"] } },
    {
      name: "a routing table of the kernel's own",
      wish: { interception: { mode: "TPROXY", routeTable: 254 } },
    },
    { name: "a port both ways", wish: { outbound: { ...JOIN.outbound, includePorts: [5432] } } },
    { name: "a network both ways", wish: { outbound: { ...JOIN.outbound, cidrs: ["192.168.7.0/24"] } } },
    {
      name: "a user both ways",
      wish: { senders: { only: { uids: [5], gids: [] }, never: { uids: [5], gids: [] } } },
    },
    {
      name: "a group both ways",
      wish: { senders: { only: { uids: [], gids: [5] }, never: { uids: [], gids: [5] } } },
    },
    { name: "a rule smuggled into a network", wish: { keep: ["10.0.0.0/8 -j ACCEPT"] } },
  ] as const)("$name", ({ wish }) => {
    expect(() => planCapture({ ...JOIN, ...wish }, MODERN)).toThrow(
      expect.objectContaining({ code: "USAGE" }),
    );
  });
});

describe("senders", () => {
  const senders = (only: number[], never: number[] = []) => ({
    only: { uids: only, gids: [] },
    never: { uids: never, gids: [] },
  });

  test("capture's own probe is captured whoever else is", () => {
    const probe = `${PROBE_ADDRESS[4]}/32`;
    const plan = planCapture({ ...JOIN, meshCidrs: [probe], senders: senders([7], [8]) }, MODERN);
    const rules = plan.families[0]?.rules.filter(({ chain }) => chain === "ISTIO_OUTPUT") ?? [];
    const isProbe = (it: Match): boolean => it.is === "to" && it.cidr === probe;
    const at = rules.findIndex(({ verdict, when }) => verdict.do === "jump" && when.some(isProbe));
    expect(at).toBeGreaterThanOrEqual(0);
    for (const uid of [7, 8])
      expect(
        rules.findIndex(({ when }) => when.some((it) => it.is === "owner" && it.uid === uid)),
      ).toBeGreaterThan(at);
  });

  test("a wish for no senders at all is a wish for everybody", () => {
    expect(planCapture({ ...JOIN, senders: senders([]) }, MODERN)).toEqual(planCapture(JOIN, MODERN));
  });
});

describe("systemd units", () => {
  const app = { unit: "app.service", path: "system.slice/app.service" };
  const deep = { unit: "db@1.service", path: "system.slice/system-db.slice/db@1.service" };
  const wish = {
    ...JOIN,
    senders: {
      only: { uids: [], gids: [], units: [app, deep] },
      never: { uids: [], gids: [], units: [{ unit: "x.service", path: "system.slice/x.service" }] },
    },
  };

  test("the guard captures alone, from sets that its script fills", async () => {
    const rendered = renderPlan(planCapture(wish, MODERN));
    expect(rendered).toMatchObject({ ipv4: undefined, ipv6: undefined, held: undefined });
    await expect(rendered.guard).toMatchFileSnapshot("./golden/units.guard.nft");
    await expect(rendered.fence).toMatchFileSnapshot("./golden/units.fence.nft");
    await expect(rendered.scope).toMatchFileSnapshot("./golden/units.scope.sh");
    await expect(describePlan(rendered.plan)).toMatchFileSnapshot("./golden/units.plan.txt");
  });

  test("without nf_tables they are refused, with what to do instead", () => {
    expect(() => planCapture(wish, OLD)).toThrow("capture by systemd unit needs nf_tables");
  });

  test("the same unit both ways is refused", () => {
    const both = { uids: [], gids: [], units: [app] };
    expect(() => planCapture({ ...JOIN, senders: { only: both, never: both } }, MODERN)).toThrow(
      "unit app.service is both included and excluded",
    );
  });
});

describe("ports captured wherever they lead", () => {
  const wish = { ...JOIN, outbound: { cidrs: [], excludeCidrs: [], excludePorts: [], includePorts: [443] } };

  test("they fail as the policy says", () => {
    const failurePolicy = [parsePolicyRule("outbound:*:443=closed")];
    expect(planCapture(wish, MODERN).failures).toContain("outbound everything else port 443: open");
    expect(planCapture({ ...wish, failurePolicy }, MODERN).failures).toContain(
      "outbound everything else port 443: closed",
    );
  });

  test("a policy for another port is refused: nothing of it is captured", () => {
    const failurePolicy = [parsePolicyRule("outbound:*:8443=closed")];
    expect(() => planCapture({ ...wish, meshCidrs: [], failurePolicy }, MODERN)).toThrow(
      "nothing of it is captured",
    );
  });
});

describe("safety", () => {
  test("sshd's real ports are not captured even if somebody declares them", () => {
    const plan = planCapture({ ...JOIN, inbound: { kind: "ports", ports: [22, 2222, 8080] } }, OLD);
    expect(plan.inboundPorts).toEqual([8080]);
    expect(plan.sshPorts).toEqual([22, 2222]);
  });

  const port = fc.integer({ min: 1, max: 65_535 });
  const cidr = fc.oneof(
    fc.tuple(fc.ipV4(), fc.integer({ min: 0, max: 32 })).map(([ip, bits]) => `${ip}/${bits}`),
    fc.tuple(fc.ipV6(), fc.integer({ min: 0, max: 128 })).map(([ip, bits]) => `${ip}/${bits}`),
  );
  const id = fc.integer({ min: 0, max: 1000 });
  const otherId = fc.integer({ min: 1001, max: 2000 });
  const wishes: fc.Arbitrary<CaptureWish> = fc.record({
    agentUid: fc.integer({ min: 1, max: 60_000 }),
    envoyUid: fc.integer({ min: 1, max: 60_000 }),
    inbound: fc.oneof(
      fc.record({ kind: fc.constant("ports" as const), ports: fc.array(port, { maxLength: 40 }) }),
      fc.record({ kind: fc.constant("all" as const), excludePorts: fc.array(port, { maxLength: 40 }) }),
    ),
    interception: fc.constantFrom(TPROXY, { mode: "REDIRECT" } as const),
    excludeInterfaces: fc.subarray(["wg0", "br-+"]),
    virtualInterfaces: fc.subarray(["docker0", "virbr+"]),
    dropInvalid: fc.boolean(),
    sshPorts: fc.array(port, { maxLength: 3 }),
    outbound: fc
      .record({
        cidrs: fc.oneof(fc.constant<string[]>(["*"]), fc.array(cidr, { maxLength: 4 })),
        excludeCidrs: fc.array(cidr, { maxLength: 4 }),
        includePorts: fc.array(port, { maxLength: 4 }),
        excludePorts: fc.array(port, { maxLength: 20 }),
      })
      // What contradicts itself is refused, and has its own test.
      .map((it) => ({
        ...it,
        excludeCidrs: it.excludeCidrs.filter((item) => !it.cidrs.some((other) => sameNetwork(item, other))),
        excludePorts: it.excludePorts.filter((item) => !it.includePorts.includes(item)),
      })),
    senders: fc.record({
      only: fc.record({ uids: fc.array(id, { maxLength: 2 }), gids: fc.array(id, { maxLength: 2 }) }),
      never: fc.record({
        uids: fc.array(otherId, { maxLength: 2 }),
        gids: fc.array(otherId, { maxLength: 2 }),
      }),
    }),
    meshCidrs: fc.array(cidr, { maxLength: 4 }),
    dns: fc.option(fc.record({ servers: fc.array(fc.oneof(fc.ipV4(), fc.ipV6()), { maxLength: 3 }) }), {
      nil: undefined,
    }),
    ipv6: fc.boolean(),
    istiod: fc.array(
      fc.tuple(fc.ipV4(), port).map(([ip, at]) => `${ip}:${at}`),
      { maxLength: 2 },
    ),
    keep: fc.array(cidr, { maxLength: 3 }),
  });

  test("whatever is wished, every rule has a printable reason, every jump a chain, every REDIRECT only new connections", () => {
    fc.assert(
      fc.property(wishes, fc.constantFrom(MODERN, OLD), (wish, machine) => {
        const plan = planCapture(wish, machine);
        for (const { rules } of plan.families) {
          for (const rule of rules) {
            expect(rule.why).toMatch(new RegExp(`^[ !#-~]{1,${MAX_WHY}}$`));
            const { verdict } = rule;
            if (verdict.do === "jump") {
              expect(rules.some((it) => it.table === rule.table && it.chain === verdict.chain)).toBe(true);
            }
            if (
              verdict.do === "redirect" &&
              rule.when.some((it) => it.is === "protocol" && it.protocol === "tcp")
            ) {
              expect(rule.when).toContainEqual({ is: "opening" });
            }
            for (const match of rule.when) {
              if (match.is === "toPorts" || match.is === "fromPorts")
                expect(match.ports.length).toBeLessThanOrEqual(15);
            }
          }
          // Hooks come last: a jump is inserted when its chain is complete.
          const hooks = rules.filter((rule) => rule.table === "nat").map((rule) => isHook(rule.chain));
          expect(hooks.lastIndexOf(false)).toBeLessThan(hooks.indexOf(true));
        }
        for (const rule of plan.fence) expect(rule.why).toMatch(new RegExp(`^[ !#-~]{1,${MAX_WHY}}$`));
      }),
    );
  });

  test("no port that sshd or vmmesh uses is ever redirected inbound or fenced off as a declared one", () => {
    fc.assert(
      fc.property(wishes, (wish) => {
        const plan = planCapture(wish, MODERN);
        if (plan.inboundPorts === "all") return;
        for (const never of [22, ...wish.sshPorts, 15_001, 15_006, 15_008, 15_020, 15_021, 15_053, 15_090]) {
          expect(plan.inboundPorts).not.toContain(never);
        }
      }),
    );
  });
});
