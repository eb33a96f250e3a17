import { VmmeshError } from "../../core/errors.ts";
import { readState } from "../apply.ts";
import { type ParsedRule, parseBaseChains, parseListeners, parseRule, parseSave } from "../parse.ts";
import type { CapturePlan } from "../plan.ts";
import {
  type BackendEvidence,
  backendEvidence,
  legacyTables,
  listNftTable,
  type Reads,
  readSshPorts,
  readTables,
  tryRun,
} from "../read.ts";
import { renderPlan } from "../render.ts";
import { missingRouting } from "../routing.ts";
import { CHAIN, type Family } from "../rules.ts";
import { nftTables, restoreCommand } from "../undo.ts";
import type { Evidence } from "./evidence.ts";

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
export async function gather(host: Reads, rulesDir: string | undefined): Promise<Evidence> {
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
      backends: { nft: none, legacy: none },
      legacyTables: [],
      input: { policy: "ACCEPT", chains: new Map() },
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

async function gatherAll(host: Reads, rulesDir: string | undefined): Promise<Evidence> {
  await checkPrivilege(host);
  const confirmed =
    rulesDir === undefined ? undefined : (await readState(host.files, rulesDir, "confirmed"))?.state;
  const plan = confirmed?.plan;
  const tables = plan === undefined ? [] : await readTables(host, plan);
  const nftNow: Record<string, string | undefined> = {};
  for (const name of plan === undefined ? [] : nftTables(plan)) nftNow[name] = await listNftTable(host, name);
  const [nft, legacy] = await Promise.all([backendEvidence(host, "nft"), backendEvidence(host, "legacy")]);
  const [chains, tcp, udp, ps, routes] = await Promise.all([
    tryRun(host, { argv: ["nft", "list", "chains"] }),
    tryRun(host, { argv: ["ss", "-ltnpH"] }),
    tryRun(host, { argv: ["ss", "-lunpH"] }),
    tryRun(host, { argv: ["ps", "-eo", "pid=,uid=,comm="] }),
    tryRun(host, { argv: ["ip", "-6", "route", "show", "default"] }),
  ]);
  const backend = plan?.backend ?? (nft.rules >= legacy.rules ? "nft" : "legacy");
  const save = await readSave(host, backend);
  const baseChains = parseBaseChains(chains?.stdout ?? "");
  return {
    noPrivilege: undefined,
    confirmed,
    overdueTrial: rulesDir !== undefined && (await isOverdue(host, rulesDir)),
    tables,
    strayRules: plan === undefined ? strayRules(save) : [],
    nftNow,
    baseChains,
    backends: { nft, legacy },
    legacyTables: await legacyTables(host, 4),
    input: inputOf(save),
    listeners: parseListeners(tcp?.stdout ?? ""),
    udpListeners: parseListeners(udp?.stdout ?? ""),
    processes: parseProcesses(ps?.stdout ?? ""),
    sshPorts: await readSshPorts(host),
    ipv6Default: (routes?.stdout ?? "").trim() !== "",
    persisted: await persistedRules(host),
    refusal: plan === undefined ? undefined : await refusalOf(host, plan),
    routing: plan === undefined ? [] : await missingRouting(host, plan),
    traces: [
      ...parseSave(save).flatMap(({ rules }) =>
        rules.filter(({ target }) => target === "TRACE").map(({ line }) => line),
      ),
      ...baseChains
        .filter(({ table }) => table.endsWith(" vmmesh-trace"))
        .map(({ table }) => `table ${table}`),
    ],
  };
}

async function checkPrivilege(host: Reads): Promise<void> {
  const status = (await host.files.readText("/proc/self/status")) ?? "";
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? "0"}`);
  // CAP_NET_ADMIN is bit 12 (capability.h).
  if ((effective & (1n << 12n)) === 0n) {
    throw new VmmeshError("RULES_PRIVILEGE", "this process has no CAP_NET_ADMIN");
  }
}

async function readSave(host: Reads, backend: "nft" | "legacy"): Promise<string> {
  return (await tryRun(host, { argv: [`iptables-${backend}-save`] }))?.stdout ?? "";
}

const OUR_CHAINS: ReadonlySet<string> = new Set(Object.values(CHAIN));

function strayRules(save: string): string[] {
  return parseSave(save).flatMap(({ name, rules, chains }) => [
    ...rules.filter(({ chain }) => OUR_CHAINS.has(chain)).map(({ line }) => `${name}: ${line}`),
    ...[...chains.keys()]
      .filter((chain) => OUR_CHAINS.has(chain) && !rules.some((rule) => rule.chain === chain))
      .map((chain) => `${name}: empty chain ${chain}`),
  ]);
}

function inputOf(save: string): Evidence["input"] {
  const filter = parseSave(save).find(({ name }) => name === "filter");
  const chains = new Map<string, ParsedRule[]>();
  for (const chain of filter?.chains.keys() ?? []) chains.set(chain, []);
  for (const rule of filter?.rules ?? []) chains.get(rule.chain)?.push(rule);
  return { policy: filter?.chains.get("INPUT") ?? "ACCEPT", chains };
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
  const rendered = renderPlan(plan, { comments: true });
  const texts: [Family, string | undefined][] = [
    [4, rendered.ipv4],
    [6, rendered.ipv6],
  ];
  for (const [family, text] of texts) {
    if (text === undefined) continue;
    const [program, ...args] = restoreCommand(plan, family);
    const result = await host.run({ argv: [program, "--test", ...args], input: text });
    if (result.code !== 0) return result.stderr.trim().split("\n")[0];
  }
  const nft = `${rendered.guard ?? ""}${rendered.fence ?? ""}`;
  if (nft === "") return undefined;
  const result = await tryRun(host, { argv: ["nft", "--check", "-f", "-"], input: nft });
  return result?.code === 0 ? undefined : (result?.stderr.trim().split("\n")[0] ?? "nft is not installed");
}
