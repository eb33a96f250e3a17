import { CHAIN, type Family, type Match, type Rule, TCP } from "../rules.ts";
import { exemptions } from "./exemptions.ts";
import { outboundFailures } from "./failure.ts";
import { outboundRedirect } from "./nat.ts";
import { jump, RETURN, rulesIn, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** What PREROUTING knows nothing of: who has sent it, and where it will go out. */
const unknownOnArrival = (match: Match): boolean =>
  match.is === "owner" || match.is === "ownerGroup" || match.is === "out";

/**
 * Table nat: what comes in through a virtual interface and is bound for elsewhere is captured as this machine's own outbound
 * traffic is (the peer's kube-virt-interfaces). What is addressed to this machine stays inbound traffic like everybody's.
 */
export function virtualRules(wish: CaptureWish, family: Family): Rule[] {
  const cells = outboundFailures(wish, family);
  if (!wish.virtualInterfaces?.length || cells.length === 0) return [];
  const rule = rulesIn("nat");
  return [
    ...exemptions(wish, family)
      .filter(({ when }) => !when.some(unknownOnArrival))
      .map(({ when, why }) => rule(CHAIN.virtual, when, RETURN, why)),
    // Before what is local: with kube-proxy in IPVS mode a service address is an address of this machine.
    ...cells.filter((cell) => cell.mesh).flatMap((cell) => outboundRedirect(cell, CHAIN.virtual)),
    rule(
      CHAIN.virtual,
      [{ is: "toThisMachine" }],
      RETURN,
      "addressed to this machine: judged as inbound, like anybody's",
    ),
    ...cells.filter((cell) => !cell.mesh).flatMap((cell) => outboundRedirect(cell, CHAIN.virtual)),
  ];
}

/** The jumps to these rules, one for each interface. */
export function virtualHooks(wish: CaptureWish, family: Family): Rule[] {
  if (virtualRules(wish, family).length === 0) return [];
  return unique(wish.virtualInterfaces ?? []).map((name) => ({
    table: "nat",
    chain: "PREROUTING",
    when: [{ is: "in", interface: name }, TCP],
    verdict: jump(CHAIN.virtual),
    why: "what is behind this interface is captured as if it were sent here",
  }));
}
