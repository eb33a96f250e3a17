import { PORTS } from "../../core/paths.ts";
import { type Family, type FenceRule, hostCidr, type Match, OPENING, REDIRECTED_TO, TCP } from "../rules.ts";
import { exemptions } from "./exemptions.ts";
import { inboundMatches } from "./inbound.ts";
import { LO_OUT, of, owner, RETURN, to } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/**
 * What order loss or a wipe would let slip is refused. Only first segments are judged: a connection that was open before
 * the fence stays open. New TCP to the mesh that is on its way to Envoy has been readdressed to loopback by now.
 */
export function fenceRules(wish: CaptureWish): FenceRule[] {
  const families: Family[] = wish.ipv6 ? [4, 6] : [4];
  const mesh = families.flatMap((family) => of(wish.meshCidrs, family));
  const inbound = wish.inbound.kind === "ports" ? inboundMatches(wish) : [];
  const out = (when: readonly Match[], verdict: FenceRule["verdict"], why: string): FenceRule => ({
    chain: "output",
    when,
    verdict,
    why,
  });
  const reset = { do: "reset" } as const;
  const outbound =
    mesh.length === 0
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
          ...mesh.map((cidr) =>
            out([{ is: "addressedTo", cidr }, TCP, OPENING], reset, "to the mesh, but past Envoy"),
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
      verdict: reset,
      why: "Envoy's listeners for captured traffic cannot be dialled from outside",
    }),
  );
  return [
    ...outbound,
    ...listeners,
    ...inbound.map(
      (when): FenceRule => ({
        chain: "input",
        // Without IPv6 capture an IPv6 connection cannot come through Envoy, so it is not judged.
        when: [...(wish.ipv6 ? [] : [{ is: "family", family: 4 } as const]), outside, TCP, ...when, OPENING],
        verdict: reset,
        why: "to a declared port, but past Envoy",
      }),
    ),
  ];
}

/** The fence runs after NAT; who was exempt by the address that the application dialled stays exempt. */
function beforeNat(match: Match): Match {
  if (match.is === "to" && match.not === undefined) return { is: "addressedTo", cidr: match.cidr };
  return match.is === "toPorts" ? { is: "addressedToPorts", ports: match.ports } : match;
}
