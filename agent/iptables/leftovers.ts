import { VmmeshError } from "../core/errors.ts";
import type { Host } from "../platform/host.ts";
import { type ParsedRule, type ParsedTable, parseSave } from "./parse.ts";
import type { Backend } from "./plan/wish.ts";
import { tryRun } from "./read.ts";
import { refusal } from "./refusal.ts";
import { type Family, isOurs } from "./rules.ts";

/** What Istio's own tools have left on this machine, and the commands that take it out. */
export interface Leftovers {
  /** One line for each rule, chain, table and route. */
  readonly found: readonly string[];
  readonly steps: readonly Step[];
}

interface Step {
  readonly argv: readonly [string, ...string[]];
  readonly input?: string;
}

/** Chains of istio-iptables and of the shell script before it (1.0 to 1.3), of every version. */
const PEER_CHAIN = /^ISTIO_/;
/** Tables of istio-nftables and of the ambient node agent (tools/istio-nftables/pkg/constants). */
const PEER_TABLE = /^table ((?:ip6?|inet) istio-(?:proxy|ambient)-\S+)/;
/** Where istio-iptables turns packets with its mark 1337 back to Envoy (TPROXY). */
const PEER_ROUTES = "133";
/** The agent's port for DNS, written into every rule that redirects to it. */
const PEER_DNS = "15053";
/** `iptables-save` of what the script of Istio 1.1 put into INPUT of IPv6, where it was not told to capture that. */
const REJECT_ALL = [
  "-A INPUT -m state --state ESTABLISHED -j ACCEPT",
  "-A INPUT -d ::1/128 -i lo -j ACCEPT",
  "-A INPUT -j REJECT --reject-with icmp6-port-unreachable",
];
/** Programs that put such rules (back) into force. */
const OWNERS = /^(pilot-agent|istio-iptables|ztunnel|install-cni)$/;

const has = ({ words }: ParsedRule, ...wanted: string[]): boolean =>
  wanted.every((word) => words.includes(word));

/**
 * One transaction that takes a table's leftovers out, by the rules as they are printed. Chains that vmmesh fills too stay;
 * only the rules in them that do not carry its comment go. Pure.
 */
export function cleanTable(
  table: ParsedTable,
  family: Family,
): { found: readonly string[]; kept: readonly string[]; text: string } | undefined {
  const ours = new Set(table.rules.filter(isOurs).flatMap(({ chain, target }) => [chain, target ?? ""]));
  const peers = [...table.chains.keys()].filter((chain) => PEER_CHAIN.test(chain));
  const gone = peers.filter((chain) => !ours.has(chain));
  const strangers = table.rules.filter((rule) => {
    if (isOurs(rule) || gone.includes(rule.chain)) return false;
    return (
      peers.includes(rule.chain) ||
      peers.includes(rule.target ?? "") ||
      isDirect(rule, table) ||
      (family === 6 && table.name === "filter" && isRejectAll(rule, table))
    );
  });
  if (gone.length === 0 && strangers.length === 0) return undefined;
  const lines = [
    ...strangers.map(({ line }) => line.replace(/^-A /, "-D ")),
    ...gone.map((chain) => `-F ${chain}`),
    ...gone.map((chain) => `-X ${chain}`),
  ];
  const chains = new Map([...table.chains].filter(([chain]) => !gone.includes(chain)));
  const rules = table.rules.filter((rule) => !gone.includes(rule.chain) && !strangers.includes(rule));
  return {
    kept: everything({ name: table.name, chains, rules }),
    found: [...strangers.map(({ line }) => line), ...gone.map((chain) => `chain ${chain}`)],
    text: [`*${table.name}`, ...lines, "COMMIT", ""].join("\n"),
  };
}

/** Rules for DNS that Istio 1.8 and later wrote into the built-in chains themselves. */
function isDirect(rule: ParsedRule, table: ParsedTable): boolean {
  if (!["OUTPUT", "PREROUTING", "POSTROUTING"].includes(rule.chain)) return false;
  if (has(rule, "REDIRECT", "--to-ports", PEER_DNS)) return true;
  if (table.name === "raw" && rule.target === "CT" && has(rule, "udp", "--zone"))
    return (has(rule, "53") || has(rule, PEER_DNS)) && (has(rule, "1") || has(rule, "2"));
  return (
    table.name === "nat" &&
    rule.target === "RETURN" &&
    has(rule, "53", "-m", "owner") &&
    table.rules.some((other) => other.chain === rule.chain && has(other, "REDIRECT", "--to-ports", PEER_DNS))
  );
}

/** These three, one after the other, the last of all. */
function isRejectAll({ line }: ParsedRule, { rules }: ParsedTable): boolean {
  const input = rules.filter(({ chain }) => chain === "INPUT").map((rule) => rule.line);
  return (
    REJECT_ALL.every((wanted, at) => input.at(at - REJECT_ALL.length) === wanted) && REJECT_ALL.includes(line)
  );
}

/**
 * Everything of Istio's own tools, of both backends and families. Changes nothing.
 *
 * @throws {VmmeshError} BUSY while a program that owns these rules runs in this network namespace
 */
export async function findLeftovers(host: Pick<Host, "run" | "files">): Promise<Leftovers> {
  await refuseOwner(host);
  const found: string[] = [];
  const steps: Step[] = [];
  for (const backend of ["nft", "legacy"] as const) {
    for (const family of [4, 6] as const) {
      const { program, save } = await readSave(host, backend, family);
      const cleaned = parseSave(save).flatMap((table) => {
        const change = cleanTable(table, family);
        return change === undefined ? [] : [{ name: table.name, ...change }];
      });
      if (cleaned.length === 0) continue;
      found.push(
        ...cleaned.flatMap(({ name, found: lines }) => lines.map((line) => `${program} ${name}: ${line}`)),
      );
      steps.push({
        argv: [`${program}-restore`, "--noflush", ...(backend === "legacy" ? ["-w", "5"] : [])],
        input: cleaned.map(({ text }) => text).join(""),
      });
    }
  }
  const chains = (await tryRun(host, { argv: ["nft", "list", "chains"] }))?.stdout ?? "";
  const tables = chains.split("\n").flatMap((line) => PEER_TABLE.exec(line)?.[1] ?? []);
  if (tables.length > 0) {
    found.push(...tables.map((table) => `nft: table ${table}`));
    steps.push({
      argv: ["nft", "-f", "-"],
      input: tables.map((table) => `delete table ${table}\n`).join(""),
    });
  }
  for (const family of [4, 6] as const) {
    const way = await readWayBack(host, family);
    found.push(...way.map(({ line }) => line));
    steps.push(...way.map(({ argv }) => ({ argv })));
  }
  return { found, steps };
}

/**
 * Takes them out, each table in one transaction.
 *
 * @returns whether every other rule is as it was, by what iptables and nft print
 * @throws {VmmeshError} RULES_REJECTED, RULES_PRIVILEGE
 */
export async function removeLeftovers(
  host: Pick<Host, "run" | "files">,
  { steps }: Leftovers,
): Promise<{ foreignUnchanged: boolean }> {
  const before = await foreignRules(host);
  for (const { argv, input } of steps) {
    const result = await host.run({ argv, ...(input === undefined ? {} : { input }) });
    if (result.code !== 0) throw await refusal(host, result, argv.join(" "));
  }
  const after = await foreignRules(host);
  return { foreignUnchanged: before.join("\n") === after.join("\n") };
}

async function readSave(
  host: Pick<Host, "run">,
  backend: Backend,
  family: Family,
): Promise<{ program: string; save: string }> {
  const program = `ip${family === 6 ? "6" : ""}tables-${backend}`;
  // Without -t, legacy's save registers no table.
  return { program, save: (await tryRun(host, { argv: [`${program}-save`] }))?.stdout ?? "" };
}

function everything({ chains, rules }: ParsedTable): string[] {
  return [...[...chains].map(([chain, policy]) => `:${chain} ${policy}`), ...rules.map(({ line }) => line)];
}

/** The saves without what `cleanTable` takes. */
async function foreignRules(host: Pick<Host, "run">): Promise<string[]> {
  const lines: string[] = [];
  for (const backend of ["nft", "legacy"] as const) {
    for (const family of [4, 6] as const) {
      const { program, save } = await readSave(host, backend, family);
      lines.push(
        ...parseSave(save).flatMap((table) =>
          (cleanTable(table, family)?.kept ?? everything(table)).map(
            (line) => `${program} ${table.name} ${line}`,
          ),
        ),
      );
    }
  }
  return lines;
}

/** Rule and route of TPROXY; ours carry a protocol number (`routing.ts`) and stay. */
async function readWayBack(
  host: Pick<Host, "run">,
  family: Family,
): Promise<{ line: string; argv: Step["argv"] }[]> {
  const [rules, routes] = await Promise.all([
    tryRun(host, { argv: ["ip", `-${family}`, "-N", "rule", "show"] }),
    tryRun(host, { argv: ["ip", `-${family}`, "route", "show", "table", PEER_ROUTES] }),
  ]);
  const foreign = (text: string | undefined, pattern: RegExp): string[] =>
    (text ?? "").split("\n").filter((line) => pattern.test(line) && !/\bproto(col)? \S*133\b/.test(line));
  return [
    ...foreign(rules?.stdout, /fwmark 0x539(\/\S+)? lookup 133\b/).map((line) => ({
      line: `IPv${family} routing rule ${line.trim()}`,
      argv: [
        ...(["ip", `-${family}`, "rule", "del", "priority", line.split(":")[0] ?? ""] as const),
        ...["fwmark", /fwmark (\S+)/.exec(line)?.[1] ?? "", "lookup", PEER_ROUTES],
      ] as const,
    })),
    ...foreign(routes?.stdout, /^local default dev lo /).map((line) => ({
      line: `IPv${family} route ${line.trim()} in table ${PEER_ROUTES}`,
      argv: [
        "ip",
        `-${family}`,
        "route",
        "del",
        "local",
        "default",
        "dev",
        "lo",
        "table",
        PEER_ROUTES,
      ] as const,
    })),
  ];
}

/** A process of a pod has a network of its own: only those that share ours own our rules. */
async function refuseOwner(host: Pick<Host, "run" | "files">): Promise<void> {
  const ps = (await tryRun(host, { argv: ["ps", "-eo", "pid=,comm="] }))?.stdout ?? "";
  const here = await host.files.readLink("/proc/self/ns/net");
  for (const [, pid = "", name = ""] of ps.matchAll(/^\s*(\d+) (\S+)/gm)) {
    if (!OWNERS.test(name) || (await host.files.readLink(`/proc/${pid}/ns/net`)) !== here) continue;
    throw new VmmeshError("BUSY", `${name} (pid ${pid}) runs on this machine and owns these rules`, {
      next: "Stop it (`systemctl stop istio`), then run the same command again.",
    });
  }
}
