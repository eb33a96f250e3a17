import { CHAIN, type Rule, TCP } from "../rules.ts";
import { neverCaptured } from "./exemptions.ts";
import { inboundMatches } from "./inbound.ts";
import { jump, portGroups, RETURN, rulesIn, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/**
 * Table mangle: a segment that conntrack does not take for part of its connection is not translated back, so it would reach
 * the application's own port and be answered with a reset (INVALID_DROP of the peer). Captured ports only: elsewhere such
 * segments are none of our business.
 */
export function invalidRules(wish: CaptureWish): Rule[] {
  const captured = inboundMatches(wish);
  if (wish.dropInvalid !== true || captured.length === 0) return [];
  const rule = rulesIn("mangle");
  const left =
    wish.inbound.kind === "all" ? unique([...neverCaptured(wish), ...wish.inbound.excludePorts]) : [];
  return [
    ...unique(wish.excludeInterfaces ?? []).map((name) =>
      rule(
        CHAIN.drop,
        [{ is: "in", interface: name }],
        RETURN,
        "an interface excluded from capture by configuration",
      ),
    ),
    ...portGroups(left).map((ports) =>
      rule(CHAIN.drop, [TCP, { is: "toPorts", ports }], RETURN, "never captured, or excluded from capture"),
    ),
    ...captured.map((when) =>
      rule(
        CHAIN.drop,
        [TCP, ...when],
        { do: "drop" },
        "would be answered with a reset, because nothing translates it back",
      ),
    ),
    rule(
      "PREROUTING",
      [{ is: "in", interface: "lo", not: true }, TCP, { is: "toThisMachine" }, { is: "invalid" }],
      jump(CHAIN.drop),
      "segments that conntrack takes for no part of a connection",
    ),
  ];
}
