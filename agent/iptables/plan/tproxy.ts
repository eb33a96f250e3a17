import { PORTS } from "../../core/paths.ts";
import { CHAIN, OPENING, type Rule, TCP } from "../rules.ts";
import { inboundMatches, inboundRules, leavesPublished } from "./inbound.ts";
import { jump, LO_OUT, owner, rulesIn } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** Is anything captured inbound, and by TPROXY? */
export function tproxies(wish: CaptureWish): boolean {
  return wish.interception?.mode === "TPROXY" && inboundMatches(wish).length > 0;
}

/**
 * Table mangle: inbound connections are handed to Envoy's transparent listener with their addresses as they are, and what
 * the application answers to the client comes back to Envoy. Calls of this machine to itself stay with REDIRECT (nat): they
 * never come in.
 *
 * @param native nft does the handing over. It leaves alone what no transparent socket takes, and so the fence can refuse
 *   it and connections from before the join live on; iptables would drop both, so there only first segments are handed over.
 */
export function tproxyRules(wish: CaptureWish, native: boolean): Rule[] {
  if (!tproxies(wish)) return [];
  const rule = rulesIn("mangle");
  const handingOver = [
    rule(
      CHAIN.tproxy,
      [TCP, ...(native ? [] : [OPENING])],
      { do: "tproxy", port: PORTS.inbound },
      "to Envoy's inbound listener, addresses as they are",
    ),
    ...inboundRules(wish, "mangle", CHAIN.tproxy),
    {
      ...rule(
        "PREROUTING",
        [{ is: "in", interface: "lo", not: true }, TCP, { is: "toThisMachine" }],
        jump(CHAIN.inbound),
        "inbound connections to this machine, never forwarded ones",
      ),
      ...(leavesPublished(wish, native) ? { late: true as const } : {}),
    },
  ];
  return [
    ...handingOver.map((it): Rule => (native ? { ...it, guardOnly: true } : it)),
    rule(
      CHAIN.output,
      [LO_OUT, TCP, owner(wish.envoyUid), { is: "marked", on: "packet" }],
      { do: "saveMark" },
      "Envoy calls the application in the client's name: remembered for the way back",
    ),
    rule(
      CHAIN.output,
      [TCP, { is: "marked", on: "connection" }],
      { do: "restoreMark" },
      "what the application answers goes back to Envoy, not out to the client",
    ),
    rule("OUTPUT", [], jump(CHAIN.output), "ways back to Envoy"),
  ];
}
