import { VmmeshError } from "../../core/errors.ts";
import { accepted, acceptedElsewhere } from "../accept.ts";
import { type BackendEvidence, evidenceOf } from "../backend.ts";
import { readState } from "../generation.ts";
import { lackOf } from "../lack.ts";
import { type ParsedTable, parseBaseChains, parseListeners, parseRule } from "../parse.ts";
import type { CapturePlan } from "../plan.ts";
import {
  legacyTables,
  listNftTable,
  type Reads,
  readSshPorts,
  readTables,
  type SeenTable,
  tryRun,
} from "../read.ts";
import { renderPlan } from "../render.ts";
import { missingRouting } from "../routing.ts";
import { CHAIN, type Family } from "../rules.ts";
import { mayReadRules } from "../trace/glimpse.ts";
import { NO_INPUT, readInput } from "../trace/input.ts";
import { nftTables, restoreCommand } from "../undo.ts";
import type { Evidence, Save } from "./evidence.ts";
import { type Gathers, NOTHING_AROUND, readSaves, readSurroundings } from "./surroundings.ts";

/** Files that other programs load at boot (firewall.md, FW031). */
const PERSISTED = [
  "/etc/iptables/rules.v4",
  "/etc/iptables/rules.v6",
  "/etc/sysconfig/iptables",
  "/etc/sysconfig/ip6tables",
  "/etc/nftables.conf",
  "/etc/ufw/before.rules",
  "/etc/ufw/before6.rules",
  "/etc/ufw/after.rules",
  "/etc/ufw/user.rules",
];

/** Everything that `judge` needs, without writing anything; with `noPrivilege` if the firewall cannot be read. */
export async function gather(host: Gathers, rulesDir: string | undefined): Promise<Evidence> {
  try {
    return await gatherAll(host, rulesDir);
  } catch (thrown) {
    if (!(thrown instanceof VmmeshError) || thrown.code !== "RULES_PRIVILEGE") throw thrown;
    const why = thrown.cause instanceof Error ? thrown.cause.message : thrown.message;
    const none: BackendEvidence = { installed: false, rules: 0, natRules: 0, kubernetes: false };
    return {
      noPrivilege: why,
      confirmed: undefined,
      overdueTrial: false,
      tables: [],
      strayRules: [],
      nftNow: {},
      baseChains: [],
      saves: [],
      dormant: [],
      around: NOTHING_AROUND,
      backends: { nft: none, legacy: none },
      legacyTables: [],
      input: NO_INPUT,
      listeners: [],
      udpListeners: [],
      processes: [],
      sshPorts: [],
      ipv6Default: false,
      persisted: [],
      refusal: undefined,
      traces: [],
      routing: [],
    };
  }
}

async function gatherAll(host: Gathers, rulesDir: string | undefined): Promise<Evidence> {
  if (!(await mayReadRules(host.files)))
    throw new VmmeshError("RULES_PRIVILEGE", "this process has no CAP_NET_ADMIN");
  const confirmed =
    rulesDir === undefined ? undefined : (await readState(host.files, rulesDir, "confirmed"))?.state;
  const plan = confirmed?.plan;
  const reading = readSaves(host);
  const listing = tryRun(host, { argv: ["nft", "list", "chains"] }).then((result) =>
    parseBaseChains(result?.stdout ?? ""),
  );
  const [seen, saves, baseChains, input, tcp, udp, ps, routes, around, ours, rest] = await Promise.all([
    readTablesOrWhy(host, plan),
    reading,
    listing,
    readInput(host, reading, listing),
    tryRun(host, { argv: ["ss", "-ltnpH"] }),
    tryRun(host, { argv: ["ss", "-lunpH"] }),
    tryRun(host, { argv: ["ps", "-eo", "pid=,uid=,comm="] }),
    tryRun(host, { argv: ["ip", "-6", "route", "show", "default"] }),
    readSurroundings(host),
    Promise.all(
      (plan === undefined ? [] : nftTables(plan)).map(
        async (name) => [name, await listNftTable(host, name)] as const,
      ),
    ),
    Promise.all([
      plan === undefined ? undefined : refusalOf(host, plan),
      readSshPorts(host),
      persistedRules(host),
      plan === undefined ? [] : missingRouting(host, plan),
      rulesDir !== undefined && isOverdue(host, rulesDir),
      legacyTables(host, 4),
    ]),
  ]);
  const [refusal, sshPorts, persisted, routing, overdueTrial, registered] = rest;
  const [nft, legacy] = (["nft", "legacy"] as const).map((backend) =>
    evidenceOf(saves.find((save) => save.backend === backend && save.family === 4)?.tables),
  );
  if (nft === undefined || legacy === undefined) throw new Error("two backends were asked for");
  const backend = plan?.backend ?? (nft.rules >= legacy.rules ? "nft" : "legacy");
  const tables = saves.find((save) => save.backend === backend && save.family === 4)?.tables ?? [];
  return {
    noPrivilege: undefined,
    confirmed,
    overdueTrial,
    tables: seen.tables,
    strayRules: plan === undefined ? strayRules(tables) : [],
    nftNow: Object.fromEntries(ours),
    baseChains,
    saves: seen.why === undefined ? saves : [...saves, seen.why],
    dormant: await dormantTables(host, ours, nft.rules),
    around,
    backends: { nft, legacy },
    legacyTables: registered,
    input,
    listeners: parseListeners(tcp?.stdout ?? ""),
    udpListeners: parseListeners(udp?.stdout ?? ""),
    processes: parseProcesses(ps?.stdout ?? ""),
    sshPorts,
    ipv6Default: (routes?.stdout ?? "").trim() !== "",
    persisted,
    refusal,
    routing,
    traces: [
      ...tables.flatMap(({ rules }) =>
        rules.filter(({ target }) => target === "TRACE").map(({ line }) => line),
      ),
      ...baseChains
        .filter(({ table }) => table.endsWith(" vmmesh-trace"))
        .map(({ table }) => `table ${table}`),
    ],
  };
}

/** A table that iptables cannot show ends its reading (exit code 3): a finding, not the end of the audit. */
async function readTablesOrWhy(
  host: Reads,
  plan: CapturePlan | undefined,
): Promise<{ tables: SeenTable[]; why?: Save }> {
  if (plan === undefined) return { tables: [] };
  try {
    return { tables: await readTables(host, plan) };
  } catch (thrown) {
    if (!(thrown instanceof VmmeshError) || thrown.code !== "RULES_REJECTED") throw thrown;
    const why = thrown.cause instanceof Error ? thrown.cause.message : thrown.message;
    return { tables: [], why: { backend: plan.backend ?? "nft", family: 4, tables: [], complaints: [why] } };
  }
}

/** Listing a table takes a second beside 20,000 rules, and nothing cheaper shows the flag. */
const SMALL = 2000;

async function dormantTables(
  host: Reads,
  ours: readonly (readonly [string, string | undefined])[],
  rules: number,
): Promise<string[]> {
  const shared = rules === 0 || rules > SMALL ? [] : ["ip nat", "ip6 nat", "ip mangle", "ip raw"];
  const texts = [
    ...ours,
    ...(await Promise.all(shared.map(async (name) => [name, await listNftTable(host, name)] as const))),
  ];
  return texts.flatMap(([name, text]) => (/^\s*flags [^;\n]*dormant/m.test(text ?? "") ? [name] : []));
}

const OUR_CHAINS: ReadonlySet<string> = new Set(Object.values(CHAIN));

function strayRules(tables: readonly ParsedTable[]): string[] {
  return tables.flatMap(({ name, rules, chains }) => [
    ...rules.filter(({ chain }) => OUR_CHAINS.has(chain)).map(({ line }) => `${name}: ${line}`),
    ...[...chains.keys()]
      .filter((chain) => OUR_CHAINS.has(chain) && !rules.some((rule) => rule.chain === chain))
      .map((chain) => `${name}: empty chain ${chain}`),
  ]);
}

function parseProcesses(text: string): Evidence["processes"] {
  return text.split("\n").flatMap((line) => {
    const match = /^\s*(\d+)\s+(\d+)\s+(.+)$/.exec(line);
    return match === null ? [] : [{ pid: Number(match[1]), uid: Number(match[2]), name: match[3] ?? "" }];
  });
}

async function isOverdue(host: Reads, rulesDir: string): Promise<boolean> {
  const trial = await readState(host.files, rulesDir, "trial");
  const uptime = Number(((await host.files.readText("/proc/uptime")) ?? "0").split(" ")[0]);
  return trial !== undefined && uptime > trial.state.deadline + 10;
}

async function persistedRules(host: Reads): Promise<Evidence["persisted"]> {
  const found: { file: string; line: number; text: string }[] = [];
  for (const file of PERSISTED) {
    const text = await host.files.readText(file);
    for (const [index, line] of (text ?? "").split("\n").entries()) {
      const rule = parseRule(line);
      const names = rule === undefined ? [] : [rule.chain, rule.target ?? ""];
      if (
        names.some((name) => OUR_CHAINS.has(name)) ||
        /^table (ip|ip6|inet) (vmmesh|istio-proxy)/.test(line)
      ) {
        found.push({ file, line: index + 1, text: line.trim() });
      }
    }
  }
  return found;
}

async function refusalOf(host: Reads, plan: CapturePlan): Promise<string | undefined> {
  const rendered = renderPlan(plan);
  const texts: [Family, string | undefined][] = [
    [4, rendered.ipv4],
    [6, rendered.ipv6],
  ];
  const nft = `${rendered.guard ?? ""}${rendered.fence ?? ""}`;
  const refusals = await Promise.all([
    ...texts.map(([family, text]) =>
      text === undefined ? undefined : refusalOfText(host, plan, family, text),
    ),
    nft === "" ? undefined : refusalOfNft(host, nft),
  ]);
  return refusals.find((why) => why !== undefined);
}

async function refusalOfText(
  host: Reads,
  plan: CapturePlan,
  family: Family,
  input: string,
): Promise<string | undefined> {
  const command = restoreCommand(plan, family);
  // What stands in the way in the tables themselves is a finding of its own; legacy's test costs nothing.
  if (plan.backend === "nft" && (await acceptedElsewhere(host, command, input))) return undefined;
  const [program, ...args] = command;
  const result = await host.run({ argv: [program, "--test", ...args], input });
  return accepted(result)
    ? undefined
    : (lackOf(result.stderr)?.sentence ?? result.stderr.trim().split("\n")[0]);
}

async function refusalOfNft(host: Reads, input: string): Promise<string | undefined> {
  const result = await tryRun(host, { argv: ["nft", "--check", "-f", "-"], input });
  return result?.code === 0 ? undefined : (result?.stderr.trim().split("\n")[0] ?? "nft is not installed");
}
