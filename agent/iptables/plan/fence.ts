import { PORTS } from "../../core/paths.ts";
import { type Family, type FenceRule, hostCidr, type Match, OPENING, REDIRECTED_TO, TCP } from "../rules.ts";
import { exemptions, neverCaptured } from "./exemptions.ts";
import { type Inbound, inboundFailures, outboundFailures, outboundMatches, portMatches } from "./failure.ts";
import { senderMatches } from "./senders.ts";
import { LO_OUT, of, owner, portGroups, RETURN, to, unique } from "./terms.ts";
import { tproxies } from "./tproxy.ts";
import type { CaptureWish } from "./wish.ts";

const RESET = { do: "reset" } as const;
const COUNT = { do: "count" } as const;

/**
 * What slips past Envoy (order loss, a wipe, a lapsed lease) is refused where the policy is closed and counted where it is
 * open. Only first segments are judged: a connection that was open before the fence stays open. New TCP that is on its way
 * to Envoy has been readdressed to loopback, or to Envoy's inbound port, by now.
 */
export function fenceRules(wish: CaptureWish): FenceRule[] {
  const families: Family[] = wish.ipv6 ? [4, 6] : [4];
  const cells = families.flatMap((family) =>
    outboundFailures(wish, family).map((cell) => ({ ...cell, family })),
  );
  const out = (when: readonly Match[], verdict: FenceRule["verdict"], why: string): FenceRule => ({
    chain: "output",
    when,
    verdict,
    why,
  });
  const only = senderMatches(wish, "only");
  // A cell is judged for each of the senders that are captured; without a choice, for everybody.
  const judged = only.length === 0 ? [[]] : only.map((sender) => [sender]);
  const outbound =
    cells.length === 0
      ? []
      : [
          out([LO_OUT], RETURN, "processes of this machine may talk to each other directly"),
          ...[wish.envoyUid, wish.agentUid].map((uid) =>
            out([owner(uid)], RETURN, "Envoy and the agent reach the mesh themselves"),
          ),
          ...families.flatMap((family) => [
            out(
              [
                to(hostCidr(REDIRECTED_TO[family], family)),
                TCP,
                { is: "toPorts", ports: [PORTS.outbound, PORTS.dns] },
              ],
              RETURN,
              "captured: on its way to Envoy or to the agent",
            ),
            ...exemptions(wish, family).map(({ when, why }) => out(when.map(beforeNat), RETURN, why)),
            ...of(wish.dns?.servers ?? [], family).map((server) =>
              out(
                [to(server), TCP, { is: "toPorts", ports: [53] } as const].map(beforeNat),
                RETURN,
                "the resolver may be asked directly",
              ),
            ),
          ]),
          ...senderMatches(wish, "never").map((sender) =>
            out([sender], RETURN, "a sender excluded from capture by configuration"),
          ),
          ...cells.flatMap(({ family, ...cell }) =>
            judged.map((sender) =>
              out(
                [
                  ...sender,
                  ...(cell.to === "*" ? [{ is: "family", family } as const] : []),
                  ...outboundMatches(cell).map(beforeNat),
                  OPENING,
                ],
                cell.failure === "closed" ? RESET : COUNT,
                cell.failure === "open"
                  ? "past Envoy, as the failure policy allows"
                  : cell.mesh
                    ? "to the mesh, but past Envoy"
                    : "to a destination declared closed, but past Envoy",
              ),
            ),
          ),
        ];
  const outside: Match = { is: "in", interface: "lo", not: true };
  const listeners = [PORTS.outbound, PORTS.inbound].map(
    (port): FenceRule => ({
      chain: "input",
      when: [
        outside,
        TCP,
        { is: "toPorts", ports: [port] },
        { is: "addressedToPorts", ports: [port] },
        OPENING,
      ],
      verdict: RESET,
      why: "Envoy's listeners for captured traffic cannot be dialled from outside",
    }),
  );
  return [
    ...outbound,
    ...listeners,
    ...unique(wish.excludeInterfaces ?? []).map(
      (name): FenceRule => ({
        chain: "input",
        when: [{ is: "in", interface: name }],
        verdict: RETURN,
        why: "an interface excluded from capture by configuration",
      }),
    ),
    ...(tproxies(wish)
      ? [
          {
            chain: "input",
            when: [outside, TCP, { is: "handedOver" }],
            verdict: RETURN,
            why: "captured: handed to Envoy with its addresses as they are",
          } satisfies FenceRule,
        ]
      : []),
    ...(wish.inbound.kind === "all" ? notJudged(wish.inbound.excludePorts, wish) : []),
    ...inboundFailures(wish).flatMap((cell) =>
      portMatches(cell).map(
        (when): FenceRule => ({
          chain: "input",
          // Without IPv6 capture an IPv6 connection cannot come through Envoy, so it is not judged.
          when: [
            ...(wish.ipv6 ? [] : [{ is: "family", family: 4 } as const]),
            outside,
            TCP,
            ...when,
            OPENING,
          ],
          verdict: cell.failure === "closed" ? RESET : COUNT,
          why: inboundWhy(cell),
        }),
      ),
    ),
  ];
}

function inboundWhy({ ports, failure }: Inbound): string {
  if (failure === "open") return "past Envoy, as the failure policy allows";
  return ports === undefined ? "to a captured port, but past Envoy" : "to a declared port, but past Envoy";
}

/** When every port is captured: what came through the redirect, and the ports that are left out. */
function notJudged(excluded: readonly number[], wish: CaptureWish): FenceRule[] {
  return portGroups(unique([PORTS.inbound, ...neverCaptured(wish), ...excluded])).map((ports) => ({
    chain: "input",
    when: [TCP, { is: "toPorts", ports }],
    verdict: RETURN,
    why: "captured, or never captured",
  }));
}

/** The fence runs after NAT; who was exempt by the address that the application dialled stays exempt. */
function beforeNat(match: Match): Match {
  if (match.is === "to" && match.not === undefined) return { is: "addressedTo", cidr: match.cidr };
  return match.is === "toPorts" ? { is: "addressedToPorts", ports: match.ports } : match;
}
