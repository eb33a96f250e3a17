import { CHAIN, type Match, type Rule, type Table, TCP } from "../rules.ts";
import { neverCaptured } from "./exemptions.ts";
import { inboundFailures, portMatches } from "./failure.ts";
import { jump, portGroups, RETURN, type RuleWords, rulesIn, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** One list of matches for each group of captured ports; one empty list when all are captured; none when nothing is. */
export function inboundMatches(wish: CaptureWish): Match[][] {
  if (wish.inbound.kind === "all") return [[]];
  const never = neverCaptured(wish);
  const ports = unique(wish.inbound.ports).filter((port) => !never.includes(port));
  return portGroups(ports).map((group) => [{ is: "toPorts", ports: group }]);
}

/**
 * Every port is captured, and nft can do it after others have translated: then what is published for a container or a
 * Service stays theirs. A declared port is ours whoever publishes it.
 */
export function leavesPublished(wish: CaptureWish, native: boolean): boolean {
  return native && wish.inbound.kind === "all";
}

/** Which inbound connections go to chain `target`, and which are left alone; the same for REDIRECT (nat) and TPROXY (mangle). */
export function inboundRules(wish: CaptureWish, table: Table, target: string): Rule[] {
  const rule = (...of: RuleWords): Rule => rulesIn(table)(CHAIN.inbound, ...of);
  const captured = inboundMatches(wish);
  if (captured.length === 0) return [];
  const left = portGroups(neverCaptured(wish)).map((ports) =>
    rule([TCP, { is: "toPorts", ports }], RETURN, "sshd and vmmesh's own listeners are never captured"),
  );
  const interfaces = unique(wish.excludeInterfaces ?? []).map((name) =>
    rule([{ is: "in", interface: name }], RETURN, "an interface excluded from capture by configuration"),
  );
  const excluded = wish.inbound.kind === "all" ? unique(wish.inbound.excludePorts) : [];
  return [
    ...interfaces,
    ...left,
    ...portGroups(excluded).map((ports) =>
      rule([TCP, { is: "toPorts", ports }], RETURN, "an inbound port excluded from capture by configuration"),
    ),
    ...inboundFailures(wish).flatMap((cell, index, cells) =>
      portMatches(cell).flatMap((when) => {
        if (cell.failure === "closed")
          return [
            rule(
              [TCP, ...when],
              jump(target),
              cell.ports === undefined
                ? "every other port: only through Envoy's inbound listener"
                : "a declared port: only through Envoy's inbound listener",
            ),
          ];
        const direct = rule([TCP, ...when], RETURN, "declared open: direct while Envoy does not answer");
        return [
          rule(
            [TCP, ...when, { is: "leased", lease: "envoy" }],
            jump(target),
            cell.ports === undefined
              ? "every other port through Envoy, direct while it does not answer"
              : "a port declared open: through Envoy, direct while it does not answer",
          ),
          ...(cells.slice(index + 1).some(({ failure }) => failure === "closed") ? [direct] : []),
        ];
      }),
    ),
  ];
}
