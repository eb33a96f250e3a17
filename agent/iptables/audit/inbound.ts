import { PORTS } from "../../core/paths.ts";
import type { CapturePlan } from "../plan.ts";
import { CHAIN } from "../rules.ts";
import { capturesInbound } from "./captured.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, REPAIR, when } from "./finding.ts";
import { fenceInForce } from "./inForce.ts";
import { inputVerdict } from "./input.ts";

export function inboundFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const listening = evidence.listeners.map(({ port }) => port);
  const ports = [...new Set(plan.inboundPorts === "all" ? listening : plan.inboundPorts)].filter((port) =>
    capturesInbound(plan, port),
  );
  // TPROXY leaves the port as it was, and INPUT judges it.
  const judged = plan.routeTable === undefined ? ports : [];
  const arrives = (port: number): boolean => inputVerdict(evidence.input, PORTS.inbound, port) !== "denied";
  const wanted = (port: number): boolean => inputVerdict(evidence.input, port, undefined) !== "denied";
  const opened = judged.filter((port) => arrives(port) && !wanted(port));
  const blocked = judged.filter((port) => !arrives(port) && wanted(port));
  const open = blocked.map(
    (port) =>
      `iptables -I INPUT -p tcp --dport ${PORTS.inbound} -m conntrack --ctstate DNAT --ctorigdstport ${port} -j ACCEPT`,
  );
  const exposed = fenceInForce(evidence, plan)
    ? []
    : evidence.listeners.filter(
        ({ address, port }) =>
          [PORTS.outbound, PORTS.inbound, PORTS.dns].some((own) => own === port) &&
          !address.startsWith("127.") &&
          address !== "::1" &&
          inputVerdict(evidence.input, port, undefined) === "accepted",
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
      blocked.map((port) => `INPUT lets ${port} in, but it arrives as ${PORTS.inbound}, which is denied`),
      (lines) =>
        finding(
          "FW020",
          "high",
          "the machine's firewall denies captured connections from outside",
          lines,
          `Let in what was redirected, and no connection to ${PORTS.inbound} itself.`,
          open.join(" && "),
        ),
    ),
    ...when(hijacks(evidence), (lines) =>
      finding(
        "FW022",
        "critical",
        "connections of containers and pods that this machine forwards are captured too",
        lines,
        "Put our own jump back, which asks whether the destination is this machine.",
        REPAIR,
      ),
    ),
    ...when(published(evidence, plan), (lines) =>
      finding(
        "FW023",
        "high",
        "captured ports are published for containers or services of Kubernetes",
        lines,
        "Take these ports out of the workload's ports: capture runs first and keeps them from their containers.",
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

/** Interfaces of containers, pods and virtual machines. */
const VIRTUAL = /^(docker|br-|cni|cali|cilium_|veth|virbr|podman|flannel|lxc|kube-bridge|weave)/;

/** Jumps that ask nothing about the destination, on a machine that forwards. */
function hijacks({ saves, around }: Evidence): string[] {
  const virtual = around.interfaces.filter((name) => VIRTUAL.test(name));
  if (!around.forwards && virtual.length === 0) return [];
  const jumps = saves.flatMap(({ family, tables }) =>
    tables
      .filter(({ name }) => name === "nat" || name === "mangle")
      .flatMap(({ name, rules }) =>
        rules
          .filter(({ chain, target }) => chain === "PREROUTING" && target === CHAIN.inbound)
          .filter(({ words }) => words[words.indexOf("--dst-type") + 1] !== "LOCAL")
          .map(({ line }) => `${name} (IPv${family}): ${line}`),
      ),
  );
  if (jumps.length === 0) return [];
  return [
    ...jumps,
    ...(around.forwards ? ["net.ipv4.ip_forward is 1"] : []),
    ...(virtual.length > 0 ? [`interfaces: ${virtual.slice(0, 8).join(" ")}`] : []),
  ];
}

/** Chains that stand for one container or service: kube-proxy's, the CNI portmap plugin's, netavark's. */
const PUBLISHED = /^(KUBE-(EXT|SVC|XLB)-|CNI-DN-|NETAVARK-DN-)/;

function published({ saves, around }: Evidence, plan: CapturePlan): string[] {
  // Then we come after whoever publishes.
  if (plan.inboundPorts === "all" && plan.guard) return [];
  const rules = saves.flatMap(({ family, tables }) =>
    tables
      .filter(({ name }) => name === "nat")
      .flatMap((table) =>
        table.rules
          .filter(({ target }) => target === "DNAT" || PUBLISHED.test(target ?? ""))
          // Of a service address, not of a port of this machine.
          .filter(({ words, chain }) => chain !== "KUBE-SERVICES" && words.includes("tcp"))
          .filter(({ words }) => {
            const at = words.findIndex((word) => word === "--dport" || word === "--dports");
            return at >= 0 && portsIn(words[at + 1] ?? "").some((port) => capturesInbound(plan, port));
          })
          .map(({ line }) => `nat (IPv${family}): ${line}`),
      ),
  );
  return [
    ...rules,
    ...around.nftNodePorts
      .filter((port) => capturesInbound(plan, port))
      .map((port) => `table ip kube-proxy: NodePort ${port}`),
  ];
}

/** The first and the last of a range stand for it. */
function portsIn(list: string): number[] {
  return list.split(/[,:]/).map(Number);
}
