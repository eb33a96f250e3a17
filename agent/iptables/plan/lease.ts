import { PORTS } from "../../core/paths.ts";
import { CHAIN, type Family, hostCidr, LEASE_ADDRESS, OPENING, type Rule, TCP } from "../rules.ts";
import { agentAnswers } from "./dns.ts";
import { anyOpen } from "./failure.ts";
import { jump, of, type RuleWords, rulesIn, to } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** Table mangle: who keeps the leases alive. Nobody but Envoy may knock at the lease's address. */
export function leaseRules(wish: CaptureWish, family: Family): Rule[] {
  const servers = of(wish.dns?.servers ?? [], family);
  const address = hostCidr(LEASE_ADDRESS[family], family);
  const rule = (...of: RuleWords): Rule => rulesIn("mangle")(CHAIN.lease, ...of);
  const leased = anyOpen(wish, family);
  const envoy = [
    rule(
      [
        to(address),
        TCP,
        { is: "toPorts", ports: [PORTS.outbound] },
        OPENING,
        { is: "owner", uid: wish.envoyUid, not: true },
      ],
      { do: "drop" },
      "only Envoy itself may prove that Envoy is alive",
    ),
    rule(
      [{ is: "from", cidr: address }, TCP, { is: "fromPorts", ports: [PORTS.outbound] }, { is: "accepted" }],
      { do: "refresh", lease: "envoy" },
      "Envoy's health check of its own listener was answered",
    ),
  ];
  const dns = [rule(agentAnswers(family), { do: "refresh", lease: "dns" }, "the agent answered a question")];
  if (!leased && servers.length === 0) return [];
  return [
    ...(leased ? envoy : []),
    ...(servers.length > 0 ? dns : []),
    {
      table: "mangle",
      chain: "OUTPUT",
      when: [],
      verdict: jump(CHAIN.lease),
      why: "signs of life of Envoy and of the agent",
    },
  ];
}
