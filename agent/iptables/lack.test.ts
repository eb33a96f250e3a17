import { expect, test } from "vitest";
import { lackOf } from "./lack.ts";

const nft = (line: string, why = "No such file or directory"): string =>
  `/dev/stdin:41:3-60: Error: Could not process rule: ${why}\n\t\t${line}\n\t\t^^^^^^^^^^\n`;

test.for([
  {
    name: "owner, in the kernel",
    stderr:
      "Warning: Extension owner revision 0 not supported, missing kernel module?\niptables v1.8.9 (nf_tables):  RULE_APPEND failed (No such file or directory): rule in chain OUTPUT\n",
    lacks: "this kernel has no `owner`",
    next: "modprobe xt_owner",
  },
  {
    name: "recent, in the kernel, for iptables-legacy",
    stderr:
      "Warning: Extension recent revision 0 not supported, missing kernel module?\niptables-restore: line 9 failed: No chain/target/match by that name.\n",
    lacks: "this kernel has no `recent`",
    next: "modprobe xt_recent",
  },
  {
    name: "comment, in the kernel",
    stderr: "Warning: Extension comment is not supported, missing kernel module?\n",
    lacks: "this kernel has no `comment`",
    next: "modprobe xt_comment`, or leave the rules' reasons out: --rule-comments off",
  },
  {
    name: "TPROXY, in the kernel",
    stderr: "Warning: Extension TPROXY revision 0 not supported, missing kernel module?\n",
    lacks: "this kernel has no `TPROXY`",
    next: "modprobe xt_TPROXY",
  },
  {
    name: "a table of iptables-legacy",
    stderr: "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'nat'\n",
    lacks: "table nat",
    next: "modprobe iptable_nat",
  },
  {
    name: "tproxy of nft",
    stderr: nft('counter tproxy to :15006 comment "vmmesh: to Envoy"'),
    lacks: "this kernel has no `tproxy`",
    next: "modprobe nft_tproxy",
  },
  {
    name: "socket of nft",
    stderr: nft("socket transparent 1 return", "Operation not supported"),
    lacks: "this kernel has no `socket`",
    next: "modprobe nft_socket",
  },
])("$name: what is missing is named, with the command that loads it", ({ stderr, lacks, next }) => {
  const lack = lackOf(stderr);
  expect(lack?.sentence).toContain(lacks);
  expect(lack?.next).toContain(next);
});

test.for([
  "iptables-nft-restore: line 3 failed\n",
  "# Warning: iptables-legacy tables present, use iptables-legacy to see them\n",
  nft("add table ip vmmesh", "File exists"),
])("nothing is missing where something else is wrong: %s", (stderr) => {
  expect(lackOf(stderr)).toBeUndefined();
});
