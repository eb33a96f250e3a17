import type { CapturePlan } from "../plan.ts";
import type { FenceRule, Match, Rule } from "../rules.ts";

/** Which programs' tables the rules are in, and why there. */
export function backendWords(plan: CapturePlan): string {
  return `${plan.backend === undefined ? "nftables, in tables of its own" : plan.programs[4]} (${plan.backendWhy})`;
}

/** For `vmmesh iptables plan`: what is captured, what is let through and why, what happens when something dies. */
export function describePlan(plan: CapturePlan): string {
  const lines: string[] = [];
  lines.push(
    `Capture by ${backendWords(plan)}.`,
    plan.backend === undefined
      ? "The tables `ip vmmesh` and `ip6 vmmesh` capture alone."
      : "Chains ISTIO_*, first in OUTPUT, ahead of KUBE-SERVICES.",
  );
  if (plan.guard && plan.backend !== undefined)
    lines.push("Guard: the same rules as an nft nat chain at priority -120, ahead of every other program's.");
  if (plan.fence.length > 0)
    lines.push(
      "Fence: table `inet vmmesh-fence` refuses what is closed and counts what is open, where it would go past Envoy.",
    );
  for (const { unit, list, path } of plan.units ?? [])
    lines.push(`Unit ${unit}: ${list === "only" ? "captured" : "never captured"} (cgroup ${path}).`);
  for (const note of plan.notes) lines.push(`Note: ${note}.`);
  for (const { family, rules } of plan.families) {
    lines.push("", `IPv${family}`);
    for (const rule of rules) {
      lines.push(
        `  ${rule.table.padEnd(6)} ${rule.chain.padEnd(17)} ${describeMatches(rule.when)} → ${describeVerdict(rule.verdict)}`,
      );
      lines.push(`         because: ${rule.why}`);
    }
  }
  if (plan.fence.length > 0) {
    lines.push("", "Fence, both families");
    for (const rule of plan.fence) {
      lines.push(
        `  ${rule.chain.padEnd(6)} ${describeMatches(rule.when)} → ${describeVerdict(rule.verdict)}`,
        `         because: ${rule.why}`,
      );
    }
  }
  lines.push(
    "",
    "Let through as they are: all UDP but questions to the resolver (DHCP and NTP among it), ICMP, forwarded packets,",
    "connections that were open before, everything sent by the users of Envoy and of the agent.",
    "When Envoy does not answer (closed: refused; open: direct after 3 s, and counted):",
    ...plan.failures.map((line) => `  ${line}`),
    "When the agent dies: questions go to the real resolver after 3 s.",
  );
  return `${lines.join("\n")}\n`;
}

function describeMatches(matches: readonly Match[]): string {
  return matches.length === 0 ? "everything" : matches.map(describeMatch).join(", ");
}

function describeMatch(match: Match): string {
  const not = "not" in match && match.not === true ? "not " : "";
  switch (match.is) {
    case "protocol":
      return match.protocol;
    case "from":
      return `from ${match.cidr}`;
    case "to":
      return `${not}to ${match.cidr}`;
    case "addressedTo":
      return `addressed to ${match.cidr}`;
    case "addressedToPorts":
      return `addressed to port ${match.ports.join(",")}`;
    case "in":
    case "out":
      return `${not}${match.is} ${match.interface}`;
    case "fromPorts":
      return `from port ${match.ports.join(",")}`;
    case "toPorts":
      return `to port ${match.ports.join(",")}`;
    case "owner":
      return `${not}sent by uid ${match.uid}`;
    case "unit":
      return match.list === "only" ? "sent by a unit that is captured" : "sent by a unit that never is";
    case "ownerGroup":
      return `sent by gid ${match.gid}`;
    case "family":
      return `IPv${match.family}`;
    case "toThisMachine":
      return "to this machine";
    case "opening":
      return "opening";
    case "accepted":
      return "accepted";
    case "invalid":
      return "invalid for conntrack";
    case "leased":
      return match.lease === "envoy" ? "while Envoy answers" : "while the agent answers";
    case "marked":
      return match.on === "packet" ? "with Istio's mark" : "of a connection with Istio's mark";
    case "handedOver":
      return "handed to Envoy";
  }
}

function describeVerdict(verdict: Rule["verdict"] | FenceRule["verdict"]): string {
  switch (verdict.do) {
    case "return":
      return "left alone";
    case "drop":
      return "dropped";
    case "reset":
      return "refused";
    case "jump":
      return verdict.chain;
    case "redirect":
      return `port ${verdict.port}`;
    case "tproxy":
      return `port ${verdict.port}, addresses as they are`;
    case "saveMark":
      return "the connection is marked";
    case "restoreMark":
      return "marked as its connection is";
    case "zone":
      return `conntrack zone ${verdict.zone}`;
    case "refresh":
      return `renews the lease of ${verdict.lease === "envoy" ? "Envoy" : "the agent"}`;
    case "count":
      return "counted, and left alone";
  }
}
