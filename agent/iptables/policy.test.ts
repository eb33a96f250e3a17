import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { checkFailurePolicy, inboundFailures, outboundFailures } from "./plan/failure.ts";
import { formatPolicyRule, inside, parsePolicyRule } from "./policy.ts";

const WISH = {
  inbound: { kind: "ports" as const, ports: [8080, 9000] },
  outbound: { cidrs: ["*"], excludeCidrs: ["192.168.7.0/24"], excludePorts: [5432] },
  meshCidrs: ["10.96.0.0/12"],
  sshPorts: [2222],
  ipv6: true,
};
const policy = (...rules: string[]) => ({ ...WISH, failurePolicy: rules.map(parsePolicyRule) });

describe("how a rule is written", () => {
  test.for([
    "outbound:*=closed",
    "outbound:*:443=open",
    "outbound:10.0.0.0/8=closed",
    "outbound:10.0.0.0/8:443=closed",
    "outbound:[fd00::/8]=open",
    "outbound:[fd00::1/128]:443=closed",
    "inbound:8080=open",
    "inbound:*=closed",
  ])("%s is read and written the same", (text) => {
    expect(formatPolicyRule(parsePolicyRule(text))).toBe(text);
  });

  test("a single address is a prefix of full length", () => {
    expect(parsePolicyRule("outbound:10.0.0.1=open").to).toBe("10.0.0.1/32");
  });

  test.for([
    "",
    "closed",
    "outbound=closed",
    "outbound:10.0.0.0/8=shut",
    "outbound:10.0.0.0/33=open",
    "outbound:example.com=open",
    "outbound:fd00::/8=open",
    "outbound:10.0.0.0/8:0=open",
    "outbound:10.0.0.0/8:65536=open",
    "outbound:10.0.0.0/8:443:80=open",
    "inbound:http=open",
    "inbound:0=open",
    "inbound:10.0.0.0/8:80=open",
    "sideways:80=open",
    "outbound:*=open -j ACCEPT",
  ])("`%s` is refused with a sentence", (text) => {
    expect(() => parsePolicyRule(text)).toThrow(
      expect.objectContaining({ code: "USAGE", message: expect.stringContaining(`\`${text}\``) as string }),
    );
  });
});

describe("rules that contradict each other, or can never apply", () => {
  test.for([
    { rules: ["outbound:10.1.0.0/16=open", "outbound:10.1.0.0/16=closed"], want: "contradicts" },
    { rules: ["outbound:10.1.2.3/16=open", "outbound:10.1.0.0/16=closed"], want: "contradicts" },
    { rules: ["inbound:8080=open", "inbound:8080=closed"], want: "contradicts" },
    { rules: ["inbound:8081=open"], want: "port 8081 is not captured" },
    { rules: ["inbound:22=open"], want: "port 22 is not captured" },
    { rules: ["inbound:2222=closed"], want: "never goes through Envoy" },
    { rules: ["inbound:15006=open"], want: "never goes through Envoy" },
    { rules: ["outbound:192.168.7.0/25=closed"], want: "192.168.7.0/24 is excluded" },
    { rules: ["outbound:*:5432=closed"], want: "port 5432 is excluded" },
  ])("$rules: $want", ({ rules, want }) => {
    expect(() => checkFailurePolicy(policy(...rules))).toThrow(want);
  });

  test("a destination that is not captured, and IPv6 without IPv6", () => {
    const narrow = { ...WISH, outbound: { ...WISH.outbound, cidrs: ["10.1.0.0/16"] } };
    const rule = (text: string) => ({ failurePolicy: [parsePolicyRule(text)] });
    expect(() => checkFailurePolicy({ ...narrow, ...rule("outbound:172.16.0.0/12=closed") })).toThrow(
      "nothing of it is captured",
    );
    expect(() => checkFailurePolicy({ ...narrow, ...rule("outbound:10.0.0.0/8=closed") })).not.toThrow();
    expect(() => checkFailurePolicy({ ...WISH, ipv6: false, ...rule("outbound:[fd00::/8]=closed") })).toThrow(
      "no IPv6",
    );
  });

  test("the same rule twice is one", () => {
    expect(() => checkFailurePolicy(policy("inbound:8080=open", "inbound:8080=open"))).not.toThrow();
  });
});

describe("what decides", () => {
  const said = (wish: Parameters<typeof outboundFailures>[0]) =>
    outboundFailures(wish, 4).map(
      ({ to, port, failure }) => `${to}${port === undefined ? "" : `:${port}`} ${failure}`,
    );

  test("nothing said: the mesh is closed, the rest is open, declared ports are closed", () => {
    expect(said(WISH)).toEqual(["10.96.0.0/12 closed", "* open"]);
    expect(inboundFailures(WISH)).toEqual([{ ports: [8080, 9000], failure: "closed" }]);
    expect(inboundFailures({ ...WISH, inbound: { kind: "all", excludePorts: [] } })).toEqual([
      { ports: undefined, failure: "open" },
    ]);
  });

  test("what is wider than the mesh does not open the mesh", () => {
    expect(said(policy("outbound:10.0.0.0/8=open", "outbound:*:80=open"))).toEqual([
      "10.96.0.0/12 closed",
      "10.0.0.0/8 open",
      "*:80 open",
      "* open",
    ]);
  });

  test("the mesh itself can be opened, and a part of it", () => {
    expect(said(policy("outbound:10.96.0.0/12=open"))).toEqual(["10.96.0.0/12 open", "* open"]);
    expect(said(policy("outbound:10.96.0.10:80=open"))).toEqual([
      "10.96.0.10/32:80 open",
      "10.96.0.0/12 closed",
      "* open",
    ]);
  });

  test("only what is captured has a policy", () => {
    const narrow = { ...policy("outbound:*=closed"), outbound: { ...WISH.outbound, cidrs: ["10.1.0.0/16"] } };
    expect(said(narrow)).toEqual(["10.96.0.0/12 closed", "10.1.0.0/16 closed"]);
  });

  test("an inbound port for itself, and all of them", () => {
    expect(inboundFailures(policy("inbound:8080=open"))).toEqual([
      { ports: [9000], failure: "closed" },
      { ports: [8080], failure: "open" },
    ]);
    expect(
      inboundFailures({
        ...policy("inbound:*=closed", "inbound:8080=open"),
        inbound: { kind: "all", excludePorts: [] },
      }),
    ).toEqual([
      { ports: [8080], failure: "open" },
      { ports: undefined, failure: "closed" },
    ]);
  });

  test("whatever is said, the rule of the longest prefix decides, and of two alike the one with the port", () => {
    const bits = fc.integer({ min: 6, max: 12 });
    const place = fc.oneof(
      fc.constant("*"),
      fc.tuple(fc.integer({ min: 0, max: 255 }), bits).map(([b, size]) => `10.${b}.0.0/${size}`),
    );
    const rule = fc
      .tuple(place, fc.option(fc.constantFrom(80, 443)), fc.constantFrom("open", "closed"))
      .map(([to, port, failure]) =>
        parsePolicyRule(`outbound:${to}${port === null ? "" : `:${port}`}=${failure}`),
      );
    fc.assert(
      fc.property(
        fc.array(rule, { maxLength: 6 }),
        fc.integer({ min: 0, max: 255 }),
        fc.constantFrom(80, 443, 9999),
        (rules, b, port) => {
          const failurePolicy = rules.filter((one) => {
            try {
              checkFailurePolicy({ ...WISH, failurePolicy: [...rules.slice(0, rules.indexOf(one)), one] });
              return true;
            } catch {
              return false;
            }
          });
          const address = `10.${b}.7.7/32`;
          const fits = (one: { to: string; port: number | undefined }): boolean =>
            inside(address, one.to) && (one.port === undefined || one.port === port);
          const weight = (one: { to: string; port: number | undefined }): number =>
            (one.to === "*" ? 0 : 1 + Number(one.to.split("/")[1])) * 2 + (one.port === undefined ? 0 : 1);
          const all = [
            ...failurePolicy,
            parsePolicyRule("outbound:*=open"),
            parsePolicyRule("outbound:10.96.0.0/12=closed"),
          ].filter(fits);
          // What is said comes first in the list, so it wins over a default that is as specific.
          const want = all.reduce((best, one) => (weight(one) > weight(best) ? one : best));
          const got = outboundFailures({ ...WISH, failurePolicy }, 4).find(fits);
          expect(got?.failure).toBe(want.failure);
        },
      ),
    );
  });
});
