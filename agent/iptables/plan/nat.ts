import { PORTS, PROBE_ADDRESS } from "../../core/paths.ts";
import {
  CHAIN,
  type Family,
  hostCidr,
  LOOPBACK,
  OPENING,
  OWN_PORTS,
  PASSTHROUGH,
  type Rule,
  TCP,
  UDP,
} from "../rules.ts";
import { exemptions } from "./exemptions.ts";
import { type Outbound, outboundFailures, outboundMatches } from "./failure.ts";
import { inboundMatches, inboundRules, leavesPublished } from "./inbound.ts";
import { senderMatches } from "./senders.ts";
import { jump, LO_OUT, of, owner, RETURN, type RuleWords, rulesIn, to } from "./terms.ts";
import { tproxies } from "./tproxy.ts";
import type { CaptureWish } from "./wish.ts";

/** Table nat: the redirects and what is left out of them. */
export function natRules(wish: CaptureWish, family: Family, native: boolean): Rule[] {
  const { agentUid, envoyUid } = wish;
  const servers = of(wish.dns?.servers ?? [], family);
  const mesh = of(wish.meshCidrs, family);
  const cells = outboundFailures(wish, family);
  const only = senderMatches(wish, "only");
  const captured = only.length === 0 ? CHAIN.output : CHAIN.scope;
  // Whoever dials the probe's address asks whether capture works at all.
  const isProbe = ({ to: place }: Outbound): boolean => place === hostCidr(PROBE_ADDRESS[family], family);
  const rule = rulesIn("nat");
  const selfCall = inboundMatches(wish).map((when) =>
    rule(
      CHAIN.output,
      [{ is: "to", cidr: LOOPBACK[family], not: true }, LO_OUT, TCP, ...when, owner(envoyUid)],
      jump(CHAIN.inRedirect),
      "a call of this machine to its own service arrives through the inbound listener",
    ),
  );
  const byTproxy = tproxies(wish);
  const late = leavesPublished(wish, native);
  const inTheClientsName = rule(
    CHAIN.output,
    [LO_OUT, TCP, owner(envoyUid), { is: "marked", on: "packet" }],
    RETURN,
    "Envoy's inbound side reaches the application in the client's name, with this mark",
  );
  return [
    rule(
      CHAIN.redirect,
      [TCP, OPENING],
      { do: "redirect", port: PORTS.outbound },
      "to Envoy's outbound listener",
    ),
    rule(
      CHAIN.inRedirect,
      [TCP, OPENING],
      { do: "redirect", port: PORTS.inbound },
      "to Envoy's inbound listener",
    ),
    ...(byTproxy ? [] : inboundRules(wish, "nat", CHAIN.inRedirect)).map(
      (it): Rule => (late ? { ...it, guardOnly: true } : it),
    ),
    rule(
      CHAIN.output,
      [owner(agentUid)],
      RETURN,
      "the agent itself is not captured: it serves Envoy and the resolver",
    ),
    rule(
      CHAIN.output,
      [{ is: "from", cidr: hostCidr(PASSTHROUGH[family], family) }, LO_OUT],
      RETURN,
      "Envoy's inbound side and the agent's probes reach the application from this address",
    ),
    rule(
      CHAIN.output,
      [LO_OUT, TCP, { is: "toPorts", ports: OWN_PORTS }],
      RETURN,
      "vmmesh's own listeners on this machine",
    ),
    ...exemptions(wish, family).map(({ when, why }) => rule(CHAIN.output, when, RETURN, why)),
    // Before every `-o lo` rule: with kube-proxy in IPVS mode a service address is local and leaves through lo.
    ...mesh.map((cidr) =>
      rule(
        CHAIN.output,
        [to(cidr), owner(envoyUid)],
        RETURN,
        "Envoy reaches services of the mesh directly, also where their address is local",
      ),
    ),
    ...(byTproxy ? [inTheClientsName] : []),
    ...selfCall,
    rule(CHAIN.output, [owner(envoyUid)], RETURN, "what Envoy sends must not come back to Envoy"),
    ...cells.filter(isProbe).flatMap((cell) => outboundRedirect(cell, CHAIN.output)),
    ...senderMatches(wish, "never").map((sender) =>
      rule(CHAIN.output, [sender], RETURN, "a sender excluded from capture by configuration"),
    ),
    ...only.map((sender) =>
      rule(
        CHAIN.output,
        [sender],
        jump(CHAIN.scope),
        "a sender whose connections are captured, no others are",
      ),
    ),
    ...servers.flatMap((server) => [
      rule(
        captured,
        [to(server)],
        jump(CHAIN.dns),
        "questions to this resolver may be for names of the mesh",
      ),
      ...([TCP, UDP] as const).map((protocol) =>
        rule(
          CHAIN.dns,
          [
            to(server),
            protocol,
            { is: "toPorts", ports: [53] },
            ...(protocol === TCP ? [OPENING] : []),
            { is: "leased", lease: "dns" },
          ],
          { do: "redirect", port: PORTS.dns },
          "names are answered by the agent, as long as it answers at all",
        ),
      ),
      rule(
        captured,
        [to(server), TCP, { is: "toPorts", ports: [53] }],
        RETURN,
        "when the agent does not answer, the resolver is asked directly",
      ),
    ]),
    ...cells
      .filter((cell) => cell.mesh && !isProbe(cell))
      .flatMap((cell) => outboundRedirect(cell, captured)),
    rule(captured, [LO_OUT], RETURN, "processes of this machine may talk to each other directly"),
    ...cells.filter((cell) => !cell.mesh).flatMap((cell) => outboundRedirect(cell, captured)),
    ...(!byTproxy && inboundMatches(wish).length > 0
      ? [
          {
            ...rule(
              "PREROUTING",
              [TCP, { is: "toThisMachine" }],
              jump(CHAIN.inbound),
              "inbound connections to this machine, never forwarded ones",
            ),
            ...(late ? { late: true as const, guardOnly: true as const } : {}),
          },
        ]
      : []),
    rule("OUTPUT", [], jump(CHAIN.output), "outbound connections of this machine, ahead of KUBE-SERVICES"),
  ];
}

/** Where an open destination is followed by a wider closed one, it leaves before that while Envoy does not answer. */
export function outboundRedirect(cell: Outbound, chain: string): Rule[] {
  const when = outboundMatches(cell);
  const rule = (...of: RuleWords): Rule => rulesIn("nat")(chain, ...of);
  if (cell.failure === "closed")
    return [
      rule(
        when,
        jump(CHAIN.redirect),
        cell.mesh
          ? "services of the mesh are reached through Envoy only"
          : "declared closed: through Envoy only",
      ),
    ];
  const whole = cell.to === "*" && cell.port === undefined;
  return [
    rule(
      [...when, { is: "leased", lease: "envoy" }],
      jump(CHAIN.redirect),
      whole
        ? "everything else goes through Envoy, direct while it does not answer"
        : cell.to === "*"
          ? "a captured port, direct while Envoy does not answer"
          : "a captured network, direct while Envoy does not answer",
    ),
    ...(cell.beforeClosed ? [rule(when, RETURN, "declared open: direct while Envoy does not answer")] : []),
  ];
}
