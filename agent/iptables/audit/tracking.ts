import { coversCidr, parseCidr } from "../../core/net.ts";
import { PORTS } from "../../core/paths.ts";
import type { ParsedRule, ParsedTable } from "../parse.ts";
import type { CapturePlan } from "../plan.ts";
import { CHAIN, isOurs, TPROXY_MARK } from "../rules.ts";
import { capturesInbound } from "./captured.ts";
import type { Evidence } from "./evidence.ts";
import { type Finding, finding, when } from "./finding.ts";

/** Conntrack and marks: what a redirect relies on before the first rule of nat is asked. */
export function trackingFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  return [
    ...when(untracked(evidence, plan), (lines) =>
      finding(
        "FW018",
        "high",
        "captured connections are exempt from tracking, and so from every redirect",
        lines,
        "Narrow these rules: what is not tracked goes past Envoy, or is refused by the fence.",
      ),
    ),
    ...when(markConflicts(evidence, plan), (lines) =>
      finding(
        "FW036",
        "medium",
        "others write the bits of Istio's mark, on which TPROXY relies",
        lines,
        `Give them a mask outside 0x${TPROXY_MARK.mask.toString(16)}, or capture by REDIRECT.`,
      ),
    ),
    ...when(directFlows(evidence, plan), (lines) =>
      finding(
        "FW039",
        "medium",
        "connections to the mesh from before capture go past Envoy for as long as they live",
        lines,
        "Restart the client, so that it connects anew.",
      ),
    ),
  ];
}

const option = ({ words }: ParsedRule, ...names: string[]): string | undefined => {
  const at = words.findIndex((word) => names.includes(word));
  return at < 0 || words[at - 1] === "!" ? undefined : words[at + 1];
};

/** Matches whose answer is known for an ordinary connection; a rule with any other may not be meant for ours. */
const KNOWN = new Set([
  "-A",
  "-p",
  "-m",
  "-s",
  "-d",
  "-i",
  "-o",
  "--dport",
  "--dports",
  "--sport",
  "--comment",
  "-j",
]);

function untracked({ saves, around }: Evidence, plan: CapturePlan): string[] {
  return saves
    .filter(({ backend }) => plan.backend === undefined || backend === plan.backend)
    .flatMap(({ family, tables }) => {
      const raw = tables.find(({ name }) => name === "raw");
      if (raw === undefined) return [];
      return raw.rules
        .filter(
          (rule) => rule.target === "NOTRACK" || (rule.target === "CT" && rule.words.includes("--notrack")),
        )
        .filter((rule) =>
          reachedFrom(raw, rule.chain).some((hook) => takes(rule, hook, around.addresses, plan)),
        )
        .map(({ line }) => `raw (IPv${family}): ${line}`);
    });
}

/** Hooks from which a packet can come into this chain. */
function reachedFrom(table: ParsedTable, chain: string, seen: readonly string[] = []): string[] {
  if (chain === "OUTPUT" || chain === "PREROUTING") return [chain];
  if (seen.includes(chain)) return [];
  return table.rules
    .filter(({ target }) => target === chain)
    .flatMap((rule) => reachedFrom(table, rule.chain, [...seen, chain]));
}

function takes(
  rule: ParsedRule,
  hook: string,
  addresses: Evidence["around"]["addresses"],
  plan: CapturePlan,
): boolean {
  if (rule.words.some((word) => word.startsWith("-") && !KNOWN.has(word) && word !== "--notrack"))
    return false;
  const protocol = option(rule, "-p");
  if (protocol !== undefined && protocol !== "tcp") return false;
  const ports = option(rule, "--dport", "--dports");
  // An answer, not a question.
  if (option(rule, "--sport") !== undefined && ports === undefined) return false;
  if (hook === "PREROUTING") {
    if (option(rule, "-i") === "lo" || rule.words.includes("-d")) return false;
    if (ports === undefined) return plan.inboundPorts === "all" || plan.inboundPorts.length > 0;
    return ports.split(/[,:]/).some((port) => capturesInbound(plan, Number(port)));
  }
  if (option(rule, "-o") === "lo") return false;
  const to = parseCidr(option(rule, "-d") ?? "0.0.0.0/0");
  if (to === undefined) return false;
  const left = [
    "127.0.0.0/8",
    "::1/128",
    ...addresses.map(({ address }) => address),
    ...plan.families.flatMap(({ rules }) =>
      rules
        .filter(
          ({ table, chain, verdict }) => table === "nat" && chain === CHAIN.output && verdict.do === "return",
        )
        .flatMap(({ when: matches }) =>
          matches.length === 1 && matches[0]?.is === "to" ? [matches[0].cidr] : [],
        ),
    ),
  ].flatMap((text) => parseCidr(text) ?? []);
  return !left.some((outer) => coversCidr(outer, to));
}

/** `V/M` of iptables and iproute2; without a mask every bit is meant. */
function maskOf(text: string): { value: number; mask: number } {
  const [value, mask = "0xffffffff"] = text.split("/");
  return { value: Number(value), mask: Number(mask) };
}

function markConflicts({ saves, around }: Evidence, plan: CapturePlan): string[] {
  if (plan.routeTable === undefined) return [];
  const rules = saves.flatMap(({ family, tables }) =>
    tables.flatMap(({ name, rules: all }) =>
      all
        .filter((rule) => !isOurs(rule))
        .filter((rule) => {
          const set = option(rule, "--set-xmark", "--tproxy-mark");
          if (set !== undefined) {
            const { value, mask } = maskOf(set);
            return ((value | mask) & TPROXY_MARK.mask) !== 0;
          }
          const copied = rule.words.includes("--save-mark") ? "--ctmask" : "--nfmask";
          return (
            rule.target === "CONNMARK" &&
            (Number(option(rule, copied) ?? 0xffff_ffff) & TPROXY_MARK.mask) !== 0
          );
        })
        .map(({ line }) => `${name} (IPv${family}): ${line}`),
    ),
  );
  const routing = around.routingRules.filter((line) => {
    const text = /fwmark (\S+)/.exec(line)?.[1];
    const table = /lookup (\S+)/.exec(line)?.[1];
    if (text === undefined || table === String(plan.routeTable)) return false;
    const { value, mask } = maskOf(text);
    return (mask & TPROXY_MARK.mask) !== 0 && ((value ^ TPROXY_MARK.value) & mask & TPROXY_MARK.mask) === 0;
  });
  return [...rules, ...routing.map((line) => `ip rule: ${line}`)];
}

/** @see /proc/net/nf_conntrack: the tuple as sent, then the tuple of the answers */
function directFlows({ around }: Evidence, plan: CapturePlan): string[] {
  const mesh = plan.families.flatMap(({ rules }) =>
    rules
      .filter(
        ({ chain, verdict }) =>
          chain === CHAIN.output && verdict.do === "jump" && verdict.chain === CHAIN.redirect,
      )
      .flatMap(({ when: matches }) =>
        matches.flatMap((match) =>
          match.is === "to" && match.not !== true ? (parseCidr(match.cidr) ?? []) : [],
        ),
      ),
  );
  return around.flows.flatMap((line) => {
    const values = (name: string): string[] =>
      [...line.matchAll(new RegExp(`\\b${name}=(\\S+)`, "g"))].map(([, value = ""]) => value);
    const [to = ""] = values("dst");
    const [sport, answers] = values("sport");
    const [dport] = values("dport");
    const address = parseCidr(to);
    const uid = around.socketOwners.get(Number(sport));
    const ours = uid === undefined || uid === plan.envoyUid || uid === plan.agentUid;
    if (ours || address === undefined || Number(answers) === PORTS.outbound) return [];
    return mesh.some((outer) => coversCidr(outer, address))
      ? [`uid ${uid}, port ${sport}, is connected to ${to}:${dport} directly`]
      : [];
  });
}
