import { PORTS } from "../../core/paths.ts";
import { ownerOfChain } from "../parse.ts";
import { COMMENT_PREFIX, isOurs } from "../rules.ts";
import { endpointText, type Packet } from "./packet.ts";
import type { Hop, Way } from "./walk.ts";

/** One hop, for people (`sentence`) and for programs. */
export interface HopLine {
  readonly hook: string;
  readonly table: string;
  readonly chain: string;
  /** The rule as its program prints it; empty for the policy of a chain. */
  readonly rule: string;
  /** The program whose rule it probably is; empty if nobody can say. */
  readonly owner: string;
  readonly sentence: string;
}

/** By words in an nft table's name. */
const TABLE_OWNERS: readonly (readonly [RegExp, string])[] = [
  [/ vmmesh(-fence|-trace)?$/, "vmmesh"],
  [/ kube-proxy$/, "kube-proxy"],
  [/ docker-bridges$/, "docker"],
  [/ firewalld$/, "firewalld"],
  [/ calico/, "calico"],
  [/ netavark$/, "podman"],
  [/ libvirt/, "libvirt"],
  [/ istio/, "istio-iptables"],
];

/** By what is known of names of chains and tables, and of comments that programs write. */
export function ownerOfHop({ chain, rule, does }: Hop): string {
  if (rule !== undefined && isOurs(rule)) return "vmmesh";
  const byTable = TABLE_OWNERS.find(([pattern]) => pattern.test(chain.table))?.[1];
  const target = typeof does === "object" && "chain" in does ? ownerOfChain(does.chain) : undefined;
  const byComment = rule?.comment?.startsWith("kubernetes ") ? "kube-proxy" : undefined;
  return byTable ?? ownerOfChain(chain.name) ?? target ?? byComment ?? "";
}

export function hopLine(hop: Hop): HopLine {
  const owner = ownerOfHop(hop);
  const { rule, chain } = hop;
  const whose =
    rule === undefined
      ? `the policy of ${chain.name}`
      : owner === "vmmesh"
        ? "our rule"
        : owner === ""
          ? "a rule"
          : `a rule of ${owner}`;
  const reason = rule?.comment === undefined ? "" : ` (${rule.comment.replace(COMMENT_PREFIX, "")})`;
  return {
    hook: hop.hook,
    table: chain.table,
    chain: chain.name,
    rule: rule?.text ?? "",
    owner,
    sentence: `In ${hop.hook.toUpperCase()}, ${chain.table} ${chain.name}, ${whose} ${effect(hop)}${reason}.`,
  };
}

function effect({ before, after, does }: Hop): string {
  const changes = changesOf(before, after);
  if (does === "on") return changes === "" ? "changes nothing" : changes;
  const also = changes === "" ? "" : ` and ${changes}`;
  switch (does.do) {
    case "accept":
      return changes === "" ? "lets it pass" : changes;
    case "drop":
      return `drops it${also}`;
    case "reject":
      return `refuses it with ${does.with}`;
    case "queue":
      return "hands it to a program that decides";
    case "return":
      return `takes it back to where the chain was called${also}`;
    case "jump":
    case "goto":
      return `sends it on to chain ${does.chain}${also}`;
  }
}

function changesOf(before: Packet, after: Packet): string {
  const hex = (mark: bigint): string => `0x${mark.toString(16)}`;
  const differs = (side: "from" | "to"): boolean =>
    endpointText(before[side], before.family) !== endpointText(after[side], after.family);
  const settled = (side: "source" | "destination"): boolean => !before.settled[side] && after.settled[side];
  return [
    differs("to")
      ? `changes its destination from ${endpointText(before.to, before.family)} to ${endpointText(after.to, after.family)}`
      : settled("destination")
        ? "settles that its destination stays what it is"
        : "",
    differs("from")
      ? `changes its source to ${endpointText(after.from, after.family)}`
      : settled("source")
        ? "settles that its source stays what it is"
        : "",
    before.mark === after.mark ? "" : `marks it ${hex(after.mark)}`,
    before.ctMark === after.ctMark ? "" : `marks its connection ${hex(after.ctMark)}`,
    before.tracking === after.tracking
      ? ""
      : after.tracking === "untracked"
        ? "takes it out of conntrack, so that nothing can redirect it"
        : "puts it into a conntrack zone",
    after.proxied === undefined || before.proxied !== undefined
      ? ""
      : `hands it to the local port ${after.proxied.port.low} with its addresses as they are`,
  ]
    .filter((part) => part !== "")
    .join(" and ");
}

const ENVOY: Readonly<Record<number, string>> = {
  [PORTS.outbound]: "Envoy's outbound listener",
  [PORTS.inbound]: "Envoy's inbound listener",
};

/**
 * The one sentence at the end; it begins with a verb, its subject is the packet.
 *
 * @param others that chance may choose as well (`isBalanced`)
 */
export function verdictOf({ packet, hops, end }: Way, others: readonly Way[] = []): string {
  const { family, original, to, translated } = packet;
  const here = endpointText(to, family);
  const first = endpointText(original.to, family);
  const from =
    translated.destination || packet.proxied !== undefined ? ` with original destination ${first}` : "";
  // Envoy has no part in it.
  const past = packet.protocol === "icmp" ? "" : " past Envoy";
  switch (end.kind) {
    case "delivered": {
      if (packet.protocol === "icmp") return `is answered by this machine's kernel as ${here}`;
      if (end.listener === undefined)
        return `is refused: nobody listens on ${here}${translated.destination ? `, to which it was redirected from ${first}` : ""}`;
      const port = Number(end.port.low);
      const envoy = ENVOY[port];
      if (envoy !== undefined) return `reaches ${envoy} ${port}${from}`;
      if (port === PORTS.dns) return `reaches the agent's DNS listener ${port}${from}`;
      return `reaches ${end.listener === "" ? "the listener" : end.listener} on ${here} past Envoy${from}`;
    }
    case "leaves": {
      const byKube = hops.some(
        (hop) => ownerOfHop(hop) === "kube-proxy" && hop.after.to.address !== hop.before.to.address,
      );
      const targets = [here, ...others.map((each) => endpointText(each.packet.to, family))];
      const target =
        others.length > 0
          ? `one of the ${byKube ? "pods" : "targets"} ${targets.join(", ")}`
          : `${byKube ? "pod " : ""}${here}`;
      return translated.destination
        ? `reaches ${target} by ${end.device}${past}${from}`
        : `leaves by ${end.device} to ${here}${past}`;
    }
    case "unroutable":
      return `goes nowhere: ${end.why}`;
    default: {
      const what = { dropped: "is dropped", rejected: "is refused", queued: "is handed to a program" }[
        end.kind
      ];
      const line = hopLine(end.at);
      const silent = end.kind === "dropped" && typeof end.at.does === "object" && end.at.does.do === "reject";
      const owner = line.owner === "vmmesh" ? "our" : line.owner === "" ? "the" : `${line.owner}'s`;
      return line.rule === ""
        ? `${what} by the policy of ${line.table} ${line.chain}`
        : `${what} by ${owner} rule \`${line.rule}\`${silent ? ", whose refusal is lost: it would come from an address that only a mark makes local" : ""}`;
    }
  }
}
