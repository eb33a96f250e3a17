import { renderFence, renderGuard, renderHeld } from "./nft.ts";
import type { CapturePlan, FamilyPlan } from "./plan.ts";
import { renderRouting } from "./routing.ts";
import {
  COMMENT_PREFIX,
  type Family,
  isHook,
  LEASE_SECONDS,
  type Match,
  type Rule,
  type Table,
  TPROXY_MARK,
} from "./rules.ts";
import { renderScope } from "./scope.ts";
import { renderUndoScript } from "./undo.ts";

/** nat comes last: until then nothing is redirected, and every table commits alone. */
export const TABLES: readonly Table[] = ["raw", "mangle", "nat"];

/** Texts for `iptables-restore --noflush`, `ip6tables-restore --noflush`, `nft -f` and `sh`. */
export interface RenderedPlan {
  readonly plan: CapturePlan;
  /** For a machine without any jump of ours; `applyPlan` renders again with those it finds. undefined: no iptables. */
  readonly ipv4: string | undefined;
  readonly ipv6: string | undefined;
  readonly guard: string | undefined;
  readonly fence: string | undefined;
  /** A shell script that lays the way back of TPROXY. */
  readonly routing: string | undefined;
  /** For the process that holds a second fence. */
  readonly held: string | undefined;
  /** A shell script that keeps the cgroups of chosen units in the sets of guard and fence; undefined: none are chosen. */
  readonly scope: string | undefined;
  /** A shell script that takes all of it out again, whatever is left of it, and needs no Node. */
  readonly undo: string;
}

/** A rule of ours in a built-in chain, as `iptables -S` printed it (`-A OUTPUT … -j ISTIO_OUTPUT`). */
export interface SeenJump {
  readonly table: Table;
  readonly line: string;
}

/** Whether the rules of a plan carry their reasons. */
export const commentsOf = ({ comments }: Pick<CapturePlan, "comments">): { comments: boolean } => ({
  comments: comments !== false,
});

export function renderPlan(plan: CapturePlan): RenderedPlan {
  const options = commentsOf(plan);
  const nft = (parts: string): string => (options.comments ? parts : parts.replace(/ comment "[^"]*"/g, ""));
  const text = (family: Family): string | undefined => {
    const wanted = plan.families.find((it) => it.family === family);
    return wanted === undefined || plan.backend === undefined || plan.programs[family] === undefined
      ? undefined
      : TABLES.map((table) => renderTable(wanted, table, [], options)).join("");
  };
  return {
    plan,
    ipv4: text(4),
    ipv6: text(6),
    guard: plan.guard ? nft(plan.families.map((family) => renderGuard(family)).join("")) : undefined,
    fence: plan.fence.length > 0 ? nft(renderFence(plan.fence)) : undefined,
    routing: renderRouting(plan),
    // Nobody but its owner could tell the held fence of a unit's new cgroup.
    held: plan.fence.length > 0 && plan.units === undefined ? nft(renderHeld(plan.fence)) : undefined,
    scope: renderScope(plan),
    undo: renderUndoScript(plan),
  };
}

/** Rules of one table that iptables can have. */
export function tableRules(plan: FamilyPlan, table: Table): Rule[] {
  return plan.rules.filter((rule) => rule.table === table && rule.guardOnly !== true);
}

/** Our own chains in one table, in the order in which they are first needed. */
export function ownChains(plan: FamilyPlan, table: Table): string[] {
  const rules = tableRules(plan, table);
  const named = rules.flatMap((rule) => [
    rule.chain,
    ...(rule.verdict.do === "jump" ? [rule.verdict.chain] : []),
  ]);
  return [...new Set(named)].filter((chain) => !isHook(chain));
}

/**
 * One table as one transaction: our chains are created or emptied, jumps that were seen go, new ones come first. Giving it
 * twice changes nothing, provided `seen` is what is there: `-D` of a missing rule makes the kernel refuse the table.
 *
 * @returns empty if the plan has nothing in this table
 */
export function renderTable(
  plan: FamilyPlan,
  table: Table,
  seen: readonly SeenJump[],
  options: { comments: boolean },
): string {
  const rules = tableRules(plan, table);
  if (rules.length === 0) return "";
  return [
    `*${table}`,
    ...ownChains(plan, table).map((chain) => `:${chain} - [0:0]`),
    ...seen.filter((jump) => jump.table === table).map((jump) => jump.line.replace(/^-A /, "-D ")),
    ...rules.map(
      (rule) =>
        `${isHook(rule.chain) ? `-I ${rule.chain} 1` : `-A ${rule.chain}`} ${renderRule(rule, plan.family, options)}`,
    ),
    "COMMIT",
    "",
  ].join("\n");
}

/** One rule without its chain, in the order in which `iptables -S` prints it back. */
export function renderRule(rule: Rule, family: Family, options: { comments: boolean }): string {
  return [
    ...addresses(rule.when),
    ...transport(rule.when),
    ...rule.when.flatMap((match) => extension(match, family)),
    ...(rule.verdict.do === "refresh" ? recent(rule.verdict.lease, family, "--set") : []),
    ...(options.comments ? [`-m comment --comment "${COMMENT_PREFIX}${rule.why}"`] : []),
    ...target(rule, family),
  ].join(" ");
}

function not(match: Match): string {
  return "not" in match && match.not === true ? "! " : "";
}

function addresses(when: readonly Match[]): string[] {
  const of = (is: Match["is"], render: (match: Match) => string): string[] =>
    when.filter((match) => match.is === is).map(render);
  return [
    ...of("from", (match) => (match.is === "from" ? `-s ${match.cidr}` : "")),
    ...of("to", (match) => (match.is === "to" ? `${not(match)}-d ${match.cidr}` : "")),
    ...of("in", (match) => (match.is === "in" ? `${not(match)}-i ${match.interface}` : "")),
    ...of("out", (match) => (match.is === "out" ? `${not(match)}-o ${match.interface}` : "")),
  ];
}

/** `-p`, and everything that belongs to the protocol's own match in one `-m tcp`. */
function transport(when: readonly Match[]): string[] {
  const protocol = when.find((match) => match.is === "protocol")?.protocol;
  if (protocol === undefined) return [];
  const single: string[] = [];
  const multi: string[] = [];
  for (const match of when) {
    if (match.is !== "fromPorts" && match.is !== "toPorts") continue;
    const option = match.is === "fromPorts" ? "sport" : "dport";
    if (match.ports.length === 1) single.push(`--${option} ${match.ports[0]}`);
    else multi.push(`-m multiport --${option}s ${match.ports.join(",")}`);
  }
  if (when.some((match) => match.is === "opening")) single.push("--tcp-flags FIN,SYN,RST,ACK SYN");
  if (when.some((match) => match.is === "accepted")) single.push("--tcp-flags FIN,SYN,RST,ACK SYN,ACK");
  return [`-p ${protocol}`, ...(single.length > 0 ? [`-m ${protocol} ${single.join(" ")}`] : []), ...multi];
}

/** @see iptables-extensions(8): owner, addrtype, conntrack, recent */
function extension(match: Match, family: Family): string[] {
  switch (match.is) {
    case "owner":
      return [`-m owner ${not(match)}--uid-owner ${match.uid}`];
    case "ownerGroup":
      return [`-m owner --gid-owner ${match.gid}`];
    // A wish for units leaves iptables out: its match stays with the cgroup that was there when the rule was loaded.
    case "unit":
      return [];
    case "toThisMachine":
      return ["-m addrtype --dst-type LOCAL"];
    case "invalid":
      return ["-m conntrack --ctstate INVALID"];
    case "leased":
      return recent(match.lease, family, `--rcheck --seconds ${LEASE_SECONDS}`);
    case "marked":
      return [`-m ${match.on === "packet" ? "mark" : "connmark"} --mark ${MARK}`];
    case "protocol":
    case "from":
    case "to":
    case "in":
    case "out":
    case "fromPorts":
    case "toPorts":
    case "opening":
    case "accepted":
    case "family":
    // The fence's own; it is never rendered for iptables.
    case "handedOver":
    case "addressedTo":
    case "addressedToPorts":
      return [];
  }
}

/** With an empty mask the list has one entry: not "which address" but "when last". */
function recent(lease: string, family: Family, what: string): string[] {
  return [
    `-m recent ${what} --name vmmesh-${lease}${family} --mask ${family === 4 ? "0.0.0.0" : "::"} --rsource`,
  ];
}

const hex = (bits: number): string => `0x${bits.toString(16)}`;
const MARK = `${hex(TPROXY_MARK.value)}/${hex(TPROXY_MARK.mask)}`;

function target({ verdict }: Rule, family: Family): string[] {
  switch (verdict.do) {
    case "return":
      return ["-j RETURN"];
    case "drop":
      return ["-j DROP"];
    case "reset":
      return ["-j REJECT --reject-with tcp-reset"];
    case "jump":
      return [`-j ${verdict.chain}`];
    case "redirect":
      return [`-j REDIRECT --to-ports ${verdict.port}`];
    case "tproxy":
      // The mark stays as it is: the packet is for an address of this machine already and needs no other route.
      return [
        `-j TPROXY --on-port ${verdict.port} --on-ip ${family === 4 ? "0.0.0.0" : "::"} --tproxy-mark 0x0/0x0`,
      ];
    case "saveMark":
    case "restoreMark": {
      const mask = hex(TPROXY_MARK.mask);
      return [
        `-j CONNMARK --${verdict.do === "saveMark" ? "save" : "restore"}-mark --nfmask ${mask} --ctmask ${mask}`,
      ];
    }
    case "zone":
      return [`-j CT --zone ${verdict.zone}`];
    case "refresh":
      return [];
  }
}
