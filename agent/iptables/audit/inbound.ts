import { PORTS } from "../../core/paths.ts";
import type { CapturePlan } from "../plan.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, REPAIR, when } from "./finding.ts";
import { fenceInForce } from "./inForce.ts";
import { inputVerdict } from "./input.ts";

export function inboundFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const ports = plan.inboundPorts === "all" ? evidence.listeners.map(({ port }) => port) : plan.inboundPorts;
  // TPROXY leaves the port as it was, and INPUT judges it.
  const open =
    plan.routeTable === undefined && inputVerdict(evidence.input, PORTS.inbound, true) !== "denied";
  const opened = open
    ? [...new Set(ports)].filter((port) => inputVerdict(evidence.input, port, false) === "denied")
    : [];
  const exposed = fenceInForce(evidence, plan)
    ? []
    : evidence.listeners.filter(
        ({ address, port }) =>
          [PORTS.outbound, PORTS.inbound, PORTS.dns].some((own) => own === port) &&
          !address.startsWith("127.") &&
          address !== "::1" &&
          inputVerdict(evidence.input, port, false) === "accepted",
      );
  return [
    ...when(
      opened.map(
        (port) => `INPUT denies ${port}, but it is captured and arrives as ${PORTS.inbound}, which is let in`,
      ),
      (lines) =>
        finding(
          "FW019",
          "critical",
          "capture opens ports that the machine's firewall closes",
          lines,
          "Do not declare these ports, or use TPROXY, which leaves the port as it was.",
        ),
    ),
    ...when(
      exposed.map(({ address, port }) => `${address}:${port} is let in from outside`),
      (lines) =>
        finding(
          "FW021",
          "high",
          "a listener for captured traffic can be dialled from outside",
          lines,
          "Load the fence, or close these ports.",
          REPAIR,
        ),
    ),
  ];
}
