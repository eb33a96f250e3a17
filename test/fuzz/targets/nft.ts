import { buildRuleset } from "../../../agent/iptables/trace/ruleset.ts";
import { monitorReader } from "../../../agent/iptables/watch.ts";
import type { Target } from "../target.ts";

const rule = (expr: readonly object[]): object => ({
  rule: { family: "ip", table: "t", chain: "out", handle: 4, expr },
});
const left = { payload: { protocol: "tcp", field: "dport" } };
const json = (...rules: readonly object[]): string =>
  JSON.stringify({
    nftables: [
      { table: { family: "ip", name: "t" } },
      {
        chain: {
          family: "ip",
          table: "t",
          name: "out",
          hook: "output",
          type: "nat",
          prio: -100,
          policy: "accept",
        },
      },
      {
        set: {
          family: "ip",
          table: "t",
          name: "s",
          elem: ["10.0.0.1", { prefix: { addr: "10.1.0.0", len: 16 } }],
        },
      },
      { map: { family: "ip", table: "t", name: "m", elem: [[80, { jump: { target: "x" } }]] } },
      ...rules,
    ],
  });

export const target: Target = {
  about:
    "the rules that nft prints are read whatever they say, JSON that is none is refused as that, and each event of its monitor is one change or none",
  covers: /\/agent\/iptables\//,
  seeds: [
    json(
      rule([
        { match: { op: "==", left, right: { set: [80, { range: [90, 99] }] } } },
        { counter: { packets: 1, bytes: 2 } },
        { redirect: { port: 15001 } },
      ]),
      rule([
        { match: { op: "!=", left: { meta: { key: "skuid" } }, right: "@s" } },
        { vmap: { key: left, data: "@m" } },
      ]),
    ),
    json(
      rule([
        { mangle: { key: { meta: { key: "mark" } }, value: { "|": [{ meta: { key: "mark" } }, 1] } } },
        { tproxy: { port: 1, addr: "::1" } },
      ]),
      rule([
        { xt: null },
        { match: { op: "in", left: { ct: { key: "state" } }, right: ["new", "established"] } },
        { dnat: { addr: "10.0.0.1", port: 1 } },
      ]),
      rule([
        {
          match: {
            op: "==",
            left: { "&": [{ payload: { protocol: "tcp", field: "flags" } }, ["syn", "ack"]] },
            right: "syn",
          },
        },
        { reject: null },
      ]),
    ),
    "table ip t {\n\tchain out { # handle 1\n\t\ttcp dport 80 counter packets 1 bytes 2 redirect to :1 # handle 4\n\t}\n}\n",
    "add table ip nat\nadd rule ip nat OUTPUT counter jump KUBE-SERVICES\n# new generation 7 by process 12 (iptables)\ninsert rule ip nat OUTPUT jump ISTIO_OUTPUT\n# new generation 8 by process 0 ()\nnetlink: lost some netlink events\n",
    '{"nftables": {}}',
  ],
  words: [
    '{"match":',
    '"right":',
    '"elem":',
    '"prefix":',
    '"range":',
    '"concat":',
    "null",
    "[]",
    "{}",
    '"@s"',
    "toString",
    "__proto__",
    "delete rule ip nat ",
    "# new generation ",
  ],
  run(bytes) {
    const text = Buffer.from(bytes).toString();
    const read = monitorReader();
    for (const line of text.split("\n")) {
      const change = read(line);
      if (change !== undefined && !line.startsWith("#") && change.kind !== "lost")
        throw new Error(`a change before its transaction ended: ${line}`);
    }
    for (const family of [4, 6] as const) {
      try {
        buildRuleset({ nftSave: "", legacySave: "", nftJson: text, nftText: text, nftNetlink: text }, family);
      } catch (thrown) {
        if (!(thrown instanceof SyntaxError)) throw thrown;
      }
    }
  },
};
