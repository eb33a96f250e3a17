import { PORTS } from "../../core/paths.ts";
import type { CapturePlan } from "../plan.ts";
import type { Evidence } from "./evidence.ts";
import { APPLY, type Finding, finding, REPAIR, when } from "./finding.ts";

/** Listeners, users, other filters, IPv6: what capture relies on. */
export function exemptionFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  return [
    ...when(deadRedirects(evidence, plan), (lines) =>
      finding(
        "FW025",
        "critical",
        "traffic is redirected to a port where nobody answers",
        lines,
        "Start Envoy and the agent, or take the rules out.",
        "systemctl start vmmesh.target",
      ),
    ),
    ...when(exemptUsers(evidence, plan), (lines) =>
      finding(
        "FW026",
        "critical",
        "the users that are exempt from capture are not those of Envoy and the agent alone",
        lines,
        "Run Envoy as vmmesh-envoy and nothing else under that user.",
      ),
    ),
    ...(evidence.ipv6Default &&
    !(plan.families.some(({ family }) => family === 6) && (plan.guard || plan.programs[6] !== undefined))
      ? [
          finding(
            "FW028",
            "high",
            "IPv6 traffic leaves this machine uncaptured",
            ["there is an IPv6 default route"],
            "Install ip6tables and capture IPv6, or switch IPv6 off.",
          ),
        ]
      : []),
    ...when(
      evidence.sshPorts
        .filter((port) =>
          plan.inboundPorts === "all" ? !plan.sshPorts.includes(port) : plan.inboundPorts.includes(port),
        )
        .map((port) => `sshd listens on ${port}, which is captured`),
      (lines) =>
        finding(
          "FW029",
          "critical",
          "logins by ssh go through Envoy",
          lines,
          "Plan again: sshd's ports are read from the machine.",
          APPLY,
        ),
    ),
    ...when(evidence.routing, (lines) =>
      finding(
        "FW037",
        "high",
        "what the application answers does not find its way back to Envoy (TPROXY)",
        lines,
        "Lay rule and route again.",
        REPAIR,
      ),
    ),
    ...(evidence.refusal === undefined
      ? []
      : [
          finding(
            "FW040",
            "critical",
            "the kernel would not take our rules now",
            [evidence.refusal],
            "Load the missing module, or boot a kernel that has it.",
          ),
        ]),
  ];
}

function deadRedirects(evidence: Evidence, plan: CapturePlan): string[] {
  const targets = new Set(
    plan.families.flatMap(({ rules }) =>
      rules.flatMap(({ verdict }) => (verdict.do === "redirect" ? [verdict.port] : [])),
    ),
  );
  const inboundUsed = plan.inboundPorts === "all" || plan.inboundPorts.length > 0;
  return [...targets]
    .filter((port) => port !== PORTS.inbound || inboundUsed)
    .filter(
      (port) =>
        !evidence.listeners.some((it) => it.port === port) ||
        (port === PORTS.dns && !evidence.udpListeners.some((it) => it.port === port)),
    )
    .map((port) => `nobody listens on ${port}`);
}

/** comm(5) of programs that belong to us; Node names its first thread since version 20. */
const OUR_PROGRAMS = /^(envoy|vmmesh|node|MainThread|node-MainThread|systemd|\(sd-pam\)|cat|sh)/;

function exemptUsers(evidence: Evidence, plan: CapturePlan): string[] {
  const uidOf = new Map(evidence.processes.map(({ pid, uid }) => [pid, uid]));
  const wrong = evidence.listeners
    .filter(({ port }) => port === PORTS.outbound || port === PORTS.inbound)
    .flatMap(({ port, processes }) =>
      processes
        .filter(({ pid }) => uidOf.has(pid) && uidOf.get(pid) !== plan.envoyUid)
        .map(
          ({ name, pid }) =>
            `${name} (pid ${pid}) listens on ${port} as uid ${uidOf.get(pid)}, exempt is ${plan.envoyUid}`,
        ),
    );
  const strangers = evidence.processes
    .filter(({ uid, name }) => (uid === plan.envoyUid || uid === plan.agentUid) && !OUR_PROGRAMS.test(name))
    .map(({ pid, uid, name }) => `${name} (pid ${pid}) runs as uid ${uid} and bypasses the mesh`);
  return [...new Set([...wrong, ...strangers])];
}
