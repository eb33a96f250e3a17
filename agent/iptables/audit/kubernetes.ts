import { coversCidr, parseCidr } from "../../core/net.ts";
import type { CapturePlan } from "../plan.ts";
import { CHAIN, type Rule } from "../rules.ts";
import type { Evidence } from "./evidence.ts";
import { APPLY, type Finding, finding, when } from "./finding.ts";

/** Interface on which kube-proxy in IPVS mode binds every service address (pkg/proxy/ipvs). */
const IPVS_INTERFACE = "kube-ipvs0";

/** How services are balanced here, whether or not this machine is joined. */
export function kubernetesFindings(evidence: Evidence): Finding[] {
  const modes = proxyModes(evidence);
  return [
    ...(modes.length === 0
      ? []
      : [
          finding(
            "FW010",
            modes.length > 1 ? "high" : "info",
            modes.length > 1
              ? "kube-proxy has left rules of another mode behind"
              : "kube-proxy balances services on this machine",
            modes,
            modes.length > 1
              ? "Let kube-proxy clean up, then start it in the one mode that is meant."
              : "Nothing to do: it says which of the other findings can apply.",
            modes.length > 1 ? "kube-proxy --cleanup" : "",
          ),
        ]),
    ...when(orphanedServices(evidence), (lines) =>
      finding(
        "FW034",
        "high",
        "kube-proxy's chain is there, but nothing jumps to it: services do not work",
        lines,
        "Start kube-proxy again: its start writes everything anew, while a running one may not notice for an hour.",
        "kubectl -n kube-system rollout restart daemonset kube-proxy",
      ),
    ),
    ...when(evidence.around.socketPrograms, (lines) =>
      finding(
        "FW012",
        "critical",
        "an eBPF program rewrites service addresses before any rule sees them",
        lines,
        "Switch the socket load balancer off for the host (Cilium: socketLB.enabled=false; Calico: bpfConnectTimeLoadBalancing: Disabled): no order of rules can get ahead of it.",
      ),
    ),
  ];
}

function proxyModes({ saves, baseChains, around }: Evidence): string[] {
  const iptables = saves.filter(({ tables }) =>
    tables.some(({ name, chains }) => name === "nat" && chains.has("KUBE-SERVICES")),
  );
  const nft = baseChains.filter(({ table }) => /^ip6? kube-proxy$/.test(table)).map(({ table }) => table);
  const ipvs = around.interfaces.includes(IPVS_INTERFACE);
  return [
    ...(ipvs ? [`ipvs: interface ${IPVS_INTERFACE}`] : []),
    // IPVS mode has a KUBE-SERVICES of its own.
    ...(iptables.length > 0 && !ipvs
      ? [
          `iptables: chain KUBE-SERVICES in nat (${[...new Set(iptables.map(({ backend }) => backend))].join(", ")})`,
        ]
      : []),
    ...(nft.length > 0 ? [`nftables: table ${[...new Set(nft)].join(", table ")}`] : []),
  ];
}

function orphanedServices({ saves }: Evidence): string[] {
  return saves.flatMap(({ backend, family, tables }) => {
    const nat = tables.find(({ name }) => name === "nat");
    if (nat === undefined || !nat.chains.has("KUBE-SERVICES")) return [];
    return ["OUTPUT", "PREROUTING"]
      .filter((hook) => !nat.rules.some((rule) => rule.chain === hook && rule.target === "KUBE-SERVICES"))
      .map((hook) => `nat (IPv${family}, ${backend}): no jump to KUBE-SERVICES in ${hook}`);
  });
}

/** FW011: the rules let everything through that leaves by `lo`, and these service addresses do. */
export function localServiceFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const published = new Set(
    evidence.saves.flatMap(({ tables }) =>
      tables.flatMap(({ rules }) =>
        rules
          .filter(({ chain }) => chain === "KUBE-SERVICES")
          .flatMap(({ words }) => {
            const at = words.indexOf("-d");
            return at < 0 || words[at - 1] === "!" ? [] : [(words[at + 1] ?? "").replace(/\/(32|128)$/, "")];
          }),
      ),
    ),
  );
  const bypassed = evidence.around.addresses.filter(
    ({ device, address }) =>
      (device === IPVS_INTERFACE || published.has(address)) && !redirectedBeforeLoopback(plan, address),
  );
  return when(
    bypassed.map(({ device, address }) => `${address} is a service and an address of ${device}`),
    (lines) =>
      finding(
        "FW011",
        "critical",
        "calls to these services leave through lo, which is not captured",
        lines,
        "Name the service network in ISTIO_SERVICE_CIDR, so that it is captured before the rule for lo.",
        APPLY,
      ),
  );
}

function redirectedBeforeLoopback(plan: CapturePlan, address: string): boolean {
  const inner = parseCidr(address);
  if (inner === undefined) return true;
  const isLoopback = (rule: Rule): boolean =>
    rule.verdict.do === "return" && rule.when.length === 1 && rule.when[0]?.is === "out";
  return plan.families.some(({ rules }) => {
    const output = rules.filter(({ table, chain }) => table === "nat" && chain === CHAIN.output);
    return output
      .slice(
        0,
        Math.max(
          0,
          output.findIndex((rule) => isLoopback(rule)),
        ),
      )
      .some(
        ({ when: matches, verdict }) =>
          verdict.do === "jump" &&
          verdict.chain === CHAIN.redirect &&
          matches.some((match) => {
            const outer = match.is === "to" && match.not !== true ? parseCidr(match.cidr) : undefined;
            return outer !== undefined && coversCidr(outer, inner);
          }),
      );
  });
}
