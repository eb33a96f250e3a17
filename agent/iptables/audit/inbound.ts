import { PORTS } from "../../core/paths.ts";
import type { CapturePlan } from "../plan.ts";
import { CHAIN } from "../rules.ts";
import {
  type Admission,
  admission,
  type Difference,
  type Door,
  difference,
  doorsOf,
  type Place,
  VIRTUAL,
} from "../trace/admit.ts";
import { capturesInbound } from "./captured.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, REPAIR, when } from "./finding.ts";
import { fenceInForce } from "./inForce.ts";

export function inboundFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const place: Place = { ...evidence, addresses: evidence.around.addresses };
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

/** One captured port at one door, as INPUT judges it. */
interface Judged {
  readonly port: number;
  readonly door: Door;
  readonly plain: Admission;
  readonly captured: Admission;
  readonly differs: Difference;
}

/** REDIRECT changes the port before INPUT judges it. */
function judgedFindings(place: Place, plan: CapturePlan): Finding[] {
  // TPROXY leaves the port as it was.
  if (plan.routeTable !== undefined) return [];
  const listening = place.listeners.map(({ port }) => port);
  const ports = [...new Set(plan.inboundPorts === "all" ? listening : plan.inboundPorts)].filter((port) =>
    capturesInbound(plan, port),
  );
  const judged = doorsOf(place.addresses)
    .filter(({ family }) => plan.families.some((of) => of.family === family))
    .flatMap((door) =>
      ports.flatMap((port): Judged[] => {
        const plain = admission(place, door, port, "as it is");
        const captured = admission(place, door, port, "captured");
        const differs = difference(plain, captured);
        return differs === undefined ? [] : [{ port, door, plain, captured, differs }];
      }),
    );
  const opened = judged.filter(({ differs }) => differs.effect !== "shuts");
  const shut = judged.filter(({ differs }) => differs.effect === "shuts");
  return [
    ...when(toldOnce(opened), (lines) =>
      finding(
        "FW019",
        opened.every(({ differs }) => differs.may.length > 0) ? "medium" : "critical",
        opened.every(({ differs }) => differs.may.length > 0)
          ? "capture may open ports that the machine's firewall closes"
          : "capture opens ports that the machine's firewall closes",
        lines,
        "Do not declare these ports, or use TPROXY, which leaves the port as it was.",
      ),
    ),
    ...when(toldOnce(shut), (lines) =>
      finding(
        "FW020",
        "high",
        shut.every(({ differs }) => differs.may.length > 0)
          ? "the machine's firewall may deny captured connections from outside"
          : "the machine's firewall denies captured connections from outside",
        lines,
        `Let in what was redirected, and no connection to ${PORTS.inbound} itself; or use TPROXY, which leaves the port as it was.`,
        [...new Set(shut.flatMap(letIn))].join(" && "),
      ),
    ),
  ];
}

/** One line for all doors that are judged alike. */
function toldOnce(judged: readonly Judged[]): string[] {
  const lines = Map.groupBy(judged, ({ port, plain, captured, differs: { may } }) => {
    const why = may.length === 0 ? "" : `; it depends on ${may.join(", ")}`;
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
    const answers = doorsOf(place.addresses)
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
