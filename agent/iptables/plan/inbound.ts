import { CHAIN, type Match, type Rule, TCP } from "../rules.ts";
import { neverCaptured } from "./exemptions.ts";
import { jump, portGroups, RETURN, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** One list of matches for each group of captured ports; one empty list when all are captured; none when nothing is. */
export function inboundMatches(wish: CaptureWish): Match[][] {
  if (wish.inbound.kind === "all") return [[]];
  const never = neverCaptured(wish);
  const ports = unique(wish.inbound.ports).filter((port) => !never.includes(port));
  return portGroups(ports).map((group) => [{ is: "toPorts", ports: group }]);
}

export function inboundRules(wish: CaptureWish): Rule[] {
  const rule = (when: readonly Match[], verdict: Rule["verdict"], why: string): Rule => ({
    table: "nat",
    chain: CHAIN.inbound,
    when,
    verdict,
    why,
  });
  const captured = inboundMatches(wish);
  if (captured.length === 0) return [];
  const left = portGroups(neverCaptured(wish)).map((ports) =>
    rule([TCP, { is: "toPorts", ports }], RETURN, "sshd and vmmesh's own listeners are never captured"),
  );
  if (wish.inbound.kind === "ports") {
    return [
      ...left,
      ...captured.map((when) =>
        rule(
          [TCP, ...when],
          jump(CHAIN.inRedirect),
          "a declared port: only through Envoy's inbound listener",
        ),
      ),
    ];
  }
  return [
    ...left,
    ...portGroups(unique(wish.inbound.excludePorts)).map((ports) =>
      rule([TCP, { is: "toPorts", ports }], RETURN, "an inbound port excluded from capture by configuration"),
    ),
    rule(
      [TCP, { is: "leased", lease: "envoy" }],
      jump(CHAIN.inRedirect),
      "every other port through Envoy, direct while it does not answer",
    ),
  ];
}
