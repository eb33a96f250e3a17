import type { CapturePlan } from "../plan.ts";
import { CHAIN } from "../rules.ts";

/** Does a new connection from outside to this port of the machine come to Envoy? By the plan; a lease that it needs is there. */
export function capturesInbound(plan: CapturePlan, port: number): boolean {
  const rule = plan.families[0]?.rules.find(
    ({ chain, when, verdict }) =>
      chain === CHAIN.inbound &&
      (verdict.do === "return" || verdict.do === "jump") &&
      when.some((match) => match.is === "protocol" && match.protocol === "tcp") &&
      when.every((match) => match.is !== "toPorts" || match.ports.includes(port)),
  );
  return rule?.verdict.do === "jump";
}
