import { PORTS } from "../../core/paths.ts";
import type { CapturePlan } from "../plan.ts";
import { CHAIN } from "../rules.ts";
import {
  admission,
  type Difference,
  type Door,
  difference,
  type Place,
  placeOf,
  VIRTUAL,
} from "../trace/admit.ts";
import { capturesInbound } from "./captured.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, REPAIR, when } from "./finding.ts";
import { fenceInForce } from "./inForce.ts";

export function inboundFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const { input, around, listeners } = evidence;
  const place = placeOf(input, around.addresses, listeners);
  return [
    ...judgedFindings(place, plan),
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
    ...when(fenceInForce(evidence, plan) ? [] : exposed(place), (lines) =>
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

/** One captured port at one door that INPUT judges otherwise than before. */
interface Judged extends Difference {
  readonly port: number;
  readonly door: Door;
}

/** REDIRECT changes the port before INPUT judges it. */
function judgedFindings(place: Place, plan: CapturePlan): Finding[] {
  // TPROXY leaves the port as it was.
  if (plan.routeTable !== undefined) return [];
  const listening = place.listeners.map(({ port }) => port);
  const ports = [...new Set(plan.inboundPorts === "all" ? listening : plan.inboundPorts)].filter((port) =>
    capturesInbound(plan, port),
  );
  const judged = place.doors
    .filter(({ family }) => plan.families.some((of) => of.family === family))
    .flatMap((door) =>
      ports.flatMap((port): Judged[] => {
        const differs = difference(place, door, port);
        return differs === undefined ? [] : [{ ...differs, port, door }];
      }),
    );
  const opened = judged.filter(({ effect }) => effect !== "shuts");
  const shut = judged.filter(({ effect }) => effect === "shuts");
  const certain = opened.some((each) => each.certain);
  return [
    ...when(toldOnce(opened), (lines) =>
      finding(
        "FW019",
        certain ? "critical" : "medium",
        certain
          ? "capture opens ports that the machine's firewall closes"
          : "capture may open ports that the machine's firewall closes",
        lines,
        "Do not declare these ports, or use TPROXY, which leaves the port as it was.",
      ),
    ),
    ...when(toldOnce(shut), (lines) =>
      finding(
        "FW020",
        "high",
        shut.some((each) => each.certain)
          ? "the machine's firewall denies captured connections from outside"
          : "the machine's firewall may deny captured connections from outside",
        lines,
        `Let in what was redirected, and no connection to ${PORTS.inbound} itself; or use TPROXY, which leaves the port as it was.`,
        [...new Set(shut.flatMap(letIn))].join(" && "),
      ),
    ),
  ];
}

/** One line for all doors that are judged alike. */
function toldOnce(judged: readonly Judged[]): string[] {
  const lines = Map.groupBy(judged, ({ port, plain, captured, because }) => {
    const why = because.length === 0 ? "" : `; it depends on ${because.join(", ")}`;
    return `INPUT ${SAYS[plain.answer]} ${port}, but it is captured and arrives as ${PORTS.inbound}, which it ${SAYS[captured.answer]}${why}`;
  });
  return [...lines].map(
    ([line, at]) => `${line} (${at.map(({ door }) => `${door.device}, ${door.address}`).join("; ")})`,
  );
}

const SAYS = { yes: "lets in", no: "denies", may: "may let in" } as const;

/** Only where a rule of iptables denies it, and one for every sender does no harm. */
function letIn({ port, door: { family }, plain, captured }: Judged): string[] {
  const [backend, ...others] = captured.deniedBy.map((table) => /^iptables-(nft|legacy)/.exec(table)?.[1]);
  if (plain.answer !== "yes" || backend === undefined || others.length > 0) return [];
  return [
    `ip${family === 6 ? "6" : ""}tables-${backend} -I INPUT -p tcp --dport ${PORTS.inbound} -m conntrack --ctstate DNAT --ctorigdstport ${port} -j ACCEPT`,
  ];
}

/** Listeners for captured traffic that INPUT lets others dial. */
function exposed(place: Place): string[] {
  const own = place.listeners.filter(
    ({ address, port }) =>
      [PORTS.outbound, PORTS.inbound, PORTS.dns].some((each) => each === port) &&
      !address.startsWith("127.") &&
      address !== "::1",
  );
  return own.flatMap(({ address, port }) => {
    const answers = place.doors
      .filter(({ family }) => address === "*" || (family === 6) === address.includes(":"))
      .map((door) => admission(place, door, port, "as it is"));
    const may = answers.find(({ answer }) => answer === "may");
    if (answers.some(({ answer }) => answer === "yes")) return [`${address}:${port} is let in from outside`];
    return may === undefined
      ? []
      : [`${address}:${port} may be let in from outside; it depends on ${may.because.join(", ")}`];
  });
}

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
