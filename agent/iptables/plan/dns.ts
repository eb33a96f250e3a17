import { PORTS } from "../../core/paths.ts";
import { CHAIN, type Family, hostCidr, type Match, REDIRECTED_TO, type Rule, UDP } from "../rules.ts";
import { senderMatches } from "./senders.ts";
import { jump, of, owner, rulesIn, to, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** A conntrack zone for the agent's own questions, one for those redirected to it: both may have the same 5-tuple (ch. 7.3). */
const DIRECT_ZONE = 1;
const REDIRECTED_ZONE = 2;

/**
 * By address, not by user: a socket that systemd made and handed over belongs to root for the kernel. Nobody else can send
 * from this address and port while it is bound.
 */
export function agentAnswers(family: Family): Match[] {
  return [
    { is: "from", cidr: hostCidr(REDIRECTED_TO[family], family) },
    UDP,
    { is: "fromPorts", ports: [PORTS.dns] },
  ];
}

/**
 * Table raw: conntrack zones for questions over UDP. A question that is not redirected (agent, Envoy, or the lease has
 * lapsed) shares the zone of the answers from outside, so that a stateful firewall still sees them as one flow.
 */
export function zoneRules(wish: CaptureWish, family: Family): Rule[] {
  const servers = of(wish.dns?.servers ?? [], family);
  if (servers.length === 0) return [];
  const question: readonly Match[] = [UDP, { is: "toPorts", ports: [53] }];
  const rule = (chain: string, when: readonly Match[], zone: number, why: string): Rule =>
    rulesIn("raw")(chain, when, { do: "zone", zone }, why);
  const only = senderMatches(wish, "only");
  return [
    ...unique(wish.excludeInterfaces ?? []).map((name) =>
      rule(
        CHAIN.dns,
        [...question, { is: "out", interface: name }],
        DIRECT_ZONE,
        "questions through an interface excluded from capture",
      ),
    ),
    ...[wish.agentUid, wish.envoyUid].map((uid) =>
      rule(
        CHAIN.dns,
        [...question, owner(uid)],
        DIRECT_ZONE,
        "questions of agent and Envoy to the real resolver",
      ),
    ),
    rule(CHAIN.dns, agentAnswers(family), REDIRECTED_ZONE, "the agent's answers"),
    ...senderMatches(wish, "never").map((sender) =>
      rule(CHAIN.dns, [...question, sender], DIRECT_ZONE, "questions of a sender excluded from capture"),
    ),
    ...servers.flatMap((server) => [
      ...(only.length === 0 ? [[]] : only.map((sender) => [sender])).map((sender) =>
        rule(
          CHAIN.dns,
          [to(server), ...question, { is: "leased", lease: "dns" }, ...sender],
          REDIRECTED_ZONE,
          "questions that will be redirected to the agent",
        ),
      ),
      rule(
        CHAIN.dns,
        [to(server), ...question],
        DIRECT_ZONE,
        only.length === 0
          ? "questions that go to the real resolver because the agent does not answer"
          : "questions that go to the real resolver: not captured, or the agent does not answer",
      ),
      rule(
        CHAIN.inbound,
        [{ is: "from", cidr: server }, UDP, { is: "fromPorts", ports: [53] }],
        DIRECT_ZONE,
        "answers of the real resolver",
      ),
    ]),
    {
      table: "raw",
      chain: "PREROUTING",
      when: [UDP],
      verdict: jump(CHAIN.inbound),
      why: "answers of the resolver get their conntrack zone",
    },
    // First in raw, because the first zone or NOTRACK wins: node-local-dns writes NOTRACK rules here.
    {
      table: "raw",
      chain: "OUTPUT",
      when: [UDP],
      verdict: jump(CHAIN.dns),
      why: "questions get their conntrack zone before anybody untracks them",
    },
  ];
}
