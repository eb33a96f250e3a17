import {
  parseBaseChains,
  parseRule,
  parseRules,
  parseSave,
  sshPortsOf,
  withoutCounters,
} from "../../../agent/iptables/parse.ts";
import { buildRuleset } from "../../../agent/iptables/trace/ruleset.ts";
import type { Target } from "../target.ts";

export const target: Target = {
  about: "what iptables, nft and ss print is read whatever it says; a rule is the same without its counters",
  seeds: [
    `*nat\n:PREROUTING ACCEPT [1:2]\n:ISTIO_OUTPUT - [0:0]\n[3:4] -A OUTPUT -p tcp -m comment --comment "a \\"b\\"" -j ISTIO_OUTPUT\nCOMMIT\n`,
    "-P INPUT ACCEPT\n-N X\n-A X -d 10.96.0.0/12 -p udp -m udp --dport 53 -m owner ! --uid-owner 1337 -j REDIRECT --to-ports 15053\n",
    "-A OUTPUT -p tcp -m multiport ! --dports 79,80:90 -m cgroup --path a/b -m set --match-set x dst -g Y\n-A OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN SYN -m statistic --mode random --probability 0.5 -j DNAT --to-destination [::1]:1-9\n",
    "table ip nat { # handle 1\n\tchain out {\n\t\ttype nat hook output priority dstnat - 20; policy accept;\n\t\ttcp dport 80 redirect # handle 4\n\t}\n}\n",
    `LISTEN 0 128 [::]:22 [::]:* users:(("sshd",pid=812,fd=3))\nListen=[::]:22 (Stream)\n`,
  ],
  words: [
    "-A ",
    "-j ",
    "--comment ",
    '"',
    '\\"',
    "*filter\n",
    ":OUTPUT ",
    "[1:2] ",
    "! ",
    "-m ",
    "--dport ",
    "priority ",
  ],
  run(bytes) {
    const text = Buffer.from(bytes).toString();
    for (const rule of parseRules(text)) {
      const again = parseRule(`[1:2] ${rule.line}`);
      if (
        again?.line !== rule.line ||
        again.target !== rule.target ||
        again.words.length !== rule.words.length
      )
        throw new Error(`counters change ${JSON.stringify(rule.line)}`);
    }
    parseSave(text);
    withoutCounters(text);
    parseBaseChains(text);
    sshPortsOf(text, text, text);
    for (const family of [4, 6] as const)
      for (const legacySave of [text, ""])
        buildRuleset(
          {
            nftSave: legacySave === "" ? text : "",
            legacySave,
            nftJson: "",
            nftText: text,
            nftNetlink: text,
          },
          family,
        );
  },
};
