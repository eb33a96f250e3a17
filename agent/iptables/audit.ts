import { VmmeshError } from "../core/errors.ts";
import { PORTS } from "../core/paths.ts";
import type { Host } from "../platform/host.ts";
import { type GenerationFile, readState } from "./apply.ts";
import { GUARD_PRIORITY } from "./nft.ts";
import {
  type BaseChain,
  type ListeningSocket,
  type ParsedRule,
  parseBaseChains,
  parseListeners,
  parseRule,
  parseSave,
} from "./parse.ts";
import type { CapturePlan } from "./plan.ts";
import { probeFindings } from "./probe.ts";
import {
  type BackendEvidence,
  backendEvidence,
  legacyTables,
  listNftTable,
  type Reads,
  readSshPorts,
  readTables,
  type SeenTable,
  tryRun,
} from "./read.ts";
import { renderPlan } from "./render.ts";
import { missingRouting } from "./routing.ts";
import { CHAIN, COMMENT_PREFIX, type Family } from "./rules.ts";
import { nftTables, restoreCommand } from "./undo.ts";

export type Severity = "critical" | "high" | "medium" | "low" | "info";

/** One thing that is wrong with capture, or may be soon. Ids are stable: scripts and runbooks name them. */
export interface Finding {
  readonly id: string;
  readonly severity: Severity;
  readonly title: string;
  /** Lines from the machine that show it. */
  readonly evidence: readonly string[];
  /** One sentence. */
  readonly remedy: string;
  /** To be typed as it stands; empty if there is no single command. */
  readonly command: string;
}

/** 2 if anything is critical, 1 for high or medium, else 0. */
export function auditExitCode(findings: readonly Finding[]): 0 | 1 | 2 {
  if (findings.some(({ severity }) => severity === "critical")) return 2;
  return findings.some(({ severity }) => severity === "high" || severity === "medium") ? 1 : 0;
}

/** All that `judge` may know. Gathered without writing anything. */
export interface Evidence {
  /** Why the firewall cannot be read; the rest is empty then. */
  readonly noPrivilege: string | undefined;
  /** The confirmed generation; undefined: nothing is supposed to be in force. */
  readonly confirmed: Pick<GenerationFile, "plan" | "printed" | "nft"> | undefined;
  /** A trial whose time is over but which nobody took back. */
  readonly overdueTrial: boolean;
  readonly tables: readonly SeenTable[];
  /** ISTIO_* and VMMESH_* chains that are there while nothing is supposed to be. */
  readonly strayRules: readonly string[];
  /** Our nft tables as printed now. */
  readonly nftNow: Readonly<Record<string, string | undefined>>;
  readonly baseChains: readonly BaseChain[];
  readonly backends: { readonly nft: BackendEvidence; readonly legacy: BackendEvidence };
  readonly legacyTables: readonly string[];
  /** Chain INPUT of table filter with the chains that it jumps to. */
  readonly input: { readonly policy: string; readonly chains: ReadonlyMap<string, readonly ParsedRule[]> };
  readonly listeners: readonly ListeningSocket[];
  readonly udpListeners: readonly ListeningSocket[];
  readonly processes: readonly { readonly pid: number; readonly uid: number; readonly name: string }[];
  readonly sshPorts: readonly number[];
  readonly ipv6Default: boolean;
  readonly persisted: readonly { readonly file: string; readonly line: number; readonly text: string }[];
  /** What iptables-restore --test or nft --check says to our own rules; undefined: they are accepted. */
  readonly refusal: string | undefined;
  readonly traces: readonly string[];
  /** What is missing of the way back of TPROXY, one sentence each. */
  readonly routing: readonly string[];
}

/** Every finding that the evidence supports, by id. Pure. */
export function judge(evidence: Evidence): Finding[] {
  if (evidence.noPrivilege !== undefined) {
    return [
      finding(
        "FW041",
        "critical",
        "the firewall cannot be read",
        [evidence.noPrivilege],
        "Run the audit as root on the machine itself.",
        "sudo vmmesh iptables audit",
      ),
    ];
  }
  const { confirmed } = evidence;
  return [
    ...everywhere(evidence),
    ...(confirmed === undefined ? [] : capture(evidence, confirmed.plan, confirmed.printed)),
    ...(confirmed === undefined ? [] : ownTables(evidence, confirmed)),
    ...(confirmed === undefined ? [] : surroundings(evidence, confirmed.plan)),
  ].sort((a, b) => a.id.localeCompare(b.id));
}

const REPAIR = "vmmesh iptables repair";
const APPLY = "vmmesh iptables apply";

function finding(
  id: string,
  severity: Severity,
  title: string,
  evidence: readonly string[],
  remedy: string,
  command = "",
): Finding {
  return { id, severity, title, evidence, remedy, command };
}

/** A finding if there is evidence for it. */
function when(evidence: readonly string[], make: (evidence: readonly string[]) => Finding): Finding[] {
  return evidence.length === 0 ? [] : [make(evidence)];
}

const place = (seen: SeenTable): string => `${seen.table} (IPv${seen.family})`;
const isOurs = (line: string): boolean => line.includes(`"${COMMENT_PREFIX}`);

/** Nobody can say whose an empty chain was; it captures nothing. */
const isEmptyChain = (line: string): boolean => line.includes("empty chain");

/** What can be wrong whether or not this machine is joined. */
function everywhere(evidence: Evidence): Finding[] {
  const strayOurs = evidence.strayRules.filter((line) => isOurs(line) || isEmptyChain(line));
  const foreign = [
    ...evidence.strayRules,
    ...evidence.tables.flatMap((seen) => seen.own.map((line) => `${place(seen)}: ${line}`)),
  ].filter((line) => !isOurs(line) && !isEmptyChain(line));
  const { nft, legacy } = evidence.backends;
  return [
    ...when(strayOurs, (lines) =>
      finding(
        "FW006",
        "medium",
        "chains of vmmesh are there although nothing is confirmed",
        lines,
        "Take them out.",
        "vmmesh iptables clean",
      ),
    ),
    ...when(foreign, (lines) =>
      finding(
        "FW007",
        "high",
        "ISTIO_* rules that vmmesh did not write",
        lines,
        "Stop the other owner: istio-iptables, pilot-agent or istio-cni.",
      ),
    ),
    ...(nft.natRules > 0 && legacy.natRules > 0
      ? [
          finding(
            "FW013",
            "high",
            "both iptables backends hold nat rules, and both are in force",
            [`iptables-nft: ${nft.natRules} nat rules`, `iptables-legacy: ${legacy.natRules} nat rules`],
            "Let every program use one backend (update-alternatives --config iptables).",
          ),
        ]
      : []),
    ...(evidence.legacyTables.length > 0 && legacy.rules === 0
      ? [
          finding(
            "FW014",
            "low",
            "legacy tables are registered but empty",
            [`/proc/net/ip_tables_names: ${evidence.legacyTables.join(" ")}`],
            "Nothing to do; they go at the next boot. Some program asked iptables-legacy for them.",
          ),
        ]
      : []),
    ...when(
      evidence.persisted.map(({ file, line, text }) => `${file}:${line}: ${text}`),
      (lines) =>
        finding(
          "FW031",
          "critical",
          "capture rules were saved into the machine's own firewall files",
          lines,
          "Delete these lines: at boot they redirect to ports where nobody listens.",
        ),
    ),
    ...when(evidence.traces, (lines) =>
      finding("FW044", "medium", "packet tracing was left on", lines, "Delete the trace rules."),
    ),
    ...(evidence.overdueTrial
      ? [
          finding(
            "FW045",
            "medium",
            "a trial of rules is over but was not taken back",
            ["rules/trial is still there"],
            "Let it be taken back now.",
            REPAIR,
          ),
        ]
      : []),
  ];
}

/** The ISTIO_* chains against the record of what was applied. */
function capture(evidence: Evidence, plan: CapturePlan, printed: GenerationFile["printed"]): Finding[] {
  const nat = evidence.tables.filter(({ table }) => table === "nat");
  const lost = nat.flatMap((seen) => seen.missing.map((hook) => `${place(seen)}: no jump in ${hook}`));
  const ahead = nat.flatMap((seen) =>
    seen.ahead.map(
      (it) =>
        `${place(seen)}, position ${it.position}: ${it.line}${it.by === undefined ? "" : ` (${it.by})`}`,
    ),
  );
  const benign = nat.flatMap((seen) => seen.benign.map((line) => `${place(seen)}: ${line}`));
  const twice = evidence.tables.flatMap((seen) => {
    const lines = seen.jumps.map(({ line }) => line);
    const hooks = lines.map((line) => line.split(" ")[1]);
    return new Set(hooks).size < hooks.length ? lines.map((line) => `${place(seen)}: ${line}`) : [];
  });
  const drift = evidence.tables.flatMap((seen) => {
    const wanted = printed.find((it) => it.family === seen.family && it.table === seen.table)?.own ?? [];
    return [
      ...wanted.filter((line) => !seen.own.includes(line)).map((line) => `${place(seen)} lacks: ${line}`),
      ...seen.own
        .filter((line) => isOurs(line) && !wanted.includes(line))
        .map((line) => `${place(seen)} has: ${line}`),
      ...(wanted.length === seen.own.length &&
      wanted.every((line) => seen.own.includes(line)) &&
      wanted.some((line, index) => line !== seen.own[index])
        ? [`${place(seen)}: the order is different`]
        : []),
    ];
  });
  const untracked = evidence.tables
    .filter(({ table }) => table === "raw")
    .flatMap((seen) => seen.untracking.map((line) => `${place(seen)}: ${line}`));
  return [
    ...when(lost, (lines) =>
      finding("FW001", "critical", "the jump to our chains is missing", lines, "Put it back.", REPAIR),
    ),
    ...when(ahead, (lines) =>
      finding(
        "FW002",
        "critical",
        "a rule ahead of ours takes captured traffic away",
        lines,
        "Move ours ahead again; the guard captures meanwhile.",
        REPAIR,
      ),
    ),
    ...when(benign, (lines) =>
      finding("FW003", "info", "rules ahead of ours that divert nothing", lines, "Nothing to do."),
    ),
    ...when(twice, (lines) =>
      finding(
        "FW004",
        "medium",
        "a jump to our chains is there more than once",
        lines,
        "Write the table again.",
        REPAIR,
      ),
    ),
    ...when(drift, (lines) =>
      finding(
        "FW005",
        "high",
        "our chains are not what was applied",
        lines,
        "Write the table again.",
        REPAIR,
      ),
    ),
    ...(guardInForce(evidence, plan)
      ? []
      : when(untracked, (lines) =>
          finding(
            "FW017",
            "high",
            "questions for names are untracked before they can be redirected",
            lines,
            "Move our jump in raw to the front.",
            REPAIR,
          ),
        )),
  ];
}

function guardInForce(evidence: Evidence, plan: CapturePlan): boolean {
  return (
    plan.guard &&
    nftTables(plan)
      .filter((name) => name.endsWith(" vmmesh"))
      .every((name) => evidence.nftNow[name] !== undefined)
  );
}

function fenceInForce(evidence: Evidence, plan: CapturePlan): boolean {
  return plan.fence.length > 0 && evidence.nftNow["inet vmmesh-fence"] !== undefined;
}

/** Tables that iptables-nft itself makes. */
const IPTABLES_TABLES = new Set([
  "ip nat",
  "ip6 nat",
  "ip filter",
  "ip6 filter",
  "ip mangle",
  "ip6 mangle",
  "ip raw",
  "ip6 raw",
]);

/** nft: our own tables, and base chains of others that come earlier or at an undefined moment. */
function ownTables(evidence: Evidence, { plan, nft }: Pick<GenerationFile, "plan" | "nft">): Finding[] {
  const ours = nftTables(plan);
  const changed = ours.flatMap((name) => {
    const now = evidence.nftNow[name];
    if (now === undefined) return [`table ${name} is gone`];
    return now === nft[name] ? [] : [`table ${name} is not what was loaded`];
  });
  const first = guardInForce(evidence, plan) ? GUARD_PRIORITY : -100;
  const foreign = evidence.baseChains.filter(
    ({ table, type, hook }) =>
      type === "nat" &&
      (hook === "output" || hook === "prerouting") &&
      !IPTABLES_TABLES.has(table) &&
      !ours.includes(table),
  );
  const say = ({ table, chain, hook, priority }: BaseChain): string =>
    `table ${table}, chain ${chain}: nat hook ${hook} priority ${priority}`;
  return [
    ...when(changed, (lines) =>
      finding("FW042", "high", "guard or fence is not as it was loaded", lines, "Load them again.", REPAIR),
    ),
    ...when(foreign.filter(({ priority }) => priority === first).map(say), (lines) =>
      finding(
        "FW008",
        "critical",
        "another nat chain has our priority: which runs first is not defined",
        lines,
        "Load the guard, which runs ahead of it.",
        REPAIR,
      ),
    ),
    ...when(foreign.filter(({ priority }) => priority < first).map(say), (lines) =>
      finding(
        "FW009",
        "critical",
        "another nat chain runs before ours",
        lines,
        "Ask its owner for a later priority, or let it be.",
      ),
    ),
  ];
}

/** Listeners, users, other filters, IPv6: what capture relies on. */
function surroundings(evidence: Evidence, plan: CapturePlan): Finding[] {
  return [
    ...inputFindings(evidence, plan),
    ...when(deadRedirects(evidence, plan), (lines) =>
      finding(
        "FW025",
        "critical",
        "traffic is redirected to a port where nobody answers",
        lines,
        "Start Envoy and the agent, or take the rules out.",
        "systemctl start vmmesh.target",
      ),
    ),
    ...when(exemptUsers(evidence, plan), (lines) =>
      finding(
        "FW026",
        "critical",
        "the users that are exempt from capture are not those of Envoy and the agent alone",
        lines,
        "Run Envoy as vmmesh-envoy and nothing else under that user.",
      ),
    ),
    ...(evidence.ipv6Default &&
    !(plan.families.some(({ family }) => family === 6) && (plan.guard || plan.programs[6] !== undefined))
      ? [
          finding(
            "FW028",
            "high",
            "IPv6 traffic leaves this machine uncaptured",
            ["there is an IPv6 default route"],
            "Install ip6tables and capture IPv6, or switch IPv6 off.",
          ),
        ]
      : []),
    ...when(
      evidence.sshPorts
        .filter((port) =>
          plan.inboundPorts === "all" ? !plan.sshPorts.includes(port) : plan.inboundPorts.includes(port),
        )
        .map((port) => `sshd listens on ${port}, which is captured`),
      (lines) =>
        finding(
          "FW029",
          "critical",
          "logins by ssh go through Envoy",
          lines,
          "Plan again: sshd's ports are read from the machine.",
          APPLY,
        ),
    ),
    ...when(evidence.routing, (lines) =>
      finding(
        "FW037",
        "high",
        "what the application answers does not find its way back to Envoy (TPROXY)",
        lines,
        "Lay rule and route again.",
        REPAIR,
      ),
    ),
    ...(evidence.refusal === undefined
      ? []
      : [
          finding(
            "FW040",
            "critical",
            "the kernel would not take our rules now",
            [evidence.refusal],
            "Load the missing module, or boot a kernel that has it.",
          ),
        ]),
  ];
}

function deadRedirects(evidence: Evidence, plan: CapturePlan): string[] {
  const targets = new Set(
    plan.families.flatMap(({ rules }) =>
      rules.flatMap(({ verdict }) => (verdict.do === "redirect" ? [verdict.port] : [])),
    ),
  );
  const inboundUsed = plan.inboundPorts === "all" || plan.inboundPorts.length > 0;
  return [...targets]
    .filter((port) => port !== PORTS.inbound || inboundUsed)
    .filter(
      (port) =>
        !evidence.listeners.some((it) => it.port === port) ||
        (port === PORTS.dns && !evidence.udpListeners.some((it) => it.port === port)),
    )
    .map((port) => `nobody listens on ${port}`);
}

/** comm(5) of programs that belong to us; Node names its first thread since version 20. */
const OUR_PROGRAMS = /^(envoy|vmmesh|node|MainThread|node-MainThread|systemd|\(sd-pam\)|cat|sh)/;

function exemptUsers(evidence: Evidence, plan: CapturePlan): string[] {
  const uidOf = new Map(evidence.processes.map(({ pid, uid }) => [pid, uid]));
  const wrong = evidence.listeners
    .filter(({ port }) => port === PORTS.outbound || port === PORTS.inbound)
    .flatMap(({ port, processes }) =>
      processes
        .filter(({ pid }) => uidOf.has(pid) && uidOf.get(pid) !== plan.envoyUid)
        .map(
          ({ name, pid }) =>
            `${name} (pid ${pid}) listens on ${port} as uid ${uidOf.get(pid)}, exempt is ${plan.envoyUid}`,
        ),
    );
  const strangers = evidence.processes
    .filter(({ uid, name }) => (uid === plan.envoyUid || uid === plan.agentUid) && !OUR_PROGRAMS.test(name))
    .map(({ pid, uid, name }) => `${name} (pid ${pid}) runs as uid ${uid} and bypasses the mesh`);
  return [...new Set([...wrong, ...strangers])];
}

function inputFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const ports = plan.inboundPorts === "all" ? evidence.listeners.map(({ port }) => port) : plan.inboundPorts;
  // TPROXY leaves the port as it was, and INPUT judges it.
  const open =
    plan.routeTable === undefined && inputVerdict(evidence.input, PORTS.inbound, true) !== "denied";
  const opened = open
    ? [...new Set(ports)].filter((port) => inputVerdict(evidence.input, port, false) === "denied")
    : [];
  const exposed = fenceInForce(evidence, plan)
    ? []
    : evidence.listeners.filter(
        ({ address, port }) =>
          [PORTS.outbound, PORTS.inbound, PORTS.dns].some((own) => own === port) &&
          !address.startsWith("127.") &&
          address !== "::1" &&
          inputVerdict(evidence.input, port, false) === "accepted",
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

/**
 * What filter INPUT does to a new TCP connection from outside to `port`. A match that is not understood makes a rule a
 * "may": it is passed over, and the answer is "unknown" if it could have decided.
 */
export function inputVerdict(
  input: Evidence["input"],
  port: number,
  redirected: boolean,
): "accepted" | "denied" | "unknown" {
  let unsure = false;
  const walk = (chain: string, depth: number): "accepted" | "denied" | "return" => {
    for (const rule of input.chains.get(chain) ?? []) {
      const matched = matchesNewTcp(rule, port, redirected);
      if (matched === "no") continue;
      const target = rule.target ?? "";
      const end =
        target === "ACCEPT" ? "accepted" : target === "DROP" || target === "REJECT" ? "denied" : undefined;
      if (matched === "may") {
        if (end !== undefined) unsure = true;
        continue;
      }
      if (end !== undefined) return end;
      if (target === "RETURN") return "return";
      if (depth < 8 && input.chains.has(target)) {
        const inner = walk(target, depth + 1);
        if (inner !== "return") return inner;
      }
    }
    return "return";
  };
  const verdict = walk("INPUT", 0);
  if (unsure) return "unknown";
  if (verdict !== "return") return verdict;
  return input.policy === "DROP" ? "denied" : "accepted";
}

function matchesNewTcp({ words }: ParsedRule, port: number, redirected: boolean): "yes" | "no" | "may" {
  let answer: "yes" | "may" = "yes";
  for (let at = 2; at < words.length; at += 1) {
    const value = words[at + 1] ?? "";
    const negated = words[at - 1] === "!";
    const holds = (fact: boolean): boolean => fact !== negated;
    switch (words[at]) {
      case "!":
      case "--comment":
      case "-m":
      case "--reject-with":
        if (words[at] !== "!") at += 1;
        break;
      case "-j":
      case "-g":
        return answer;
      case "-p":
        if (!holds(value === "tcp" || value === "all")) return "no";
        at += 1;
        break;
      case "-i":
        // From outside: not lo; any other name may be the interface meant.
        if (value === "lo") {
          if (!holds(false)) return "no";
        } else answer = "may";
        at += 1;
        break;
      case "--dport":
      case "--dports":
        if (!holds(inPorts(value, port))) return "no";
        at += 1;
        break;
      case "--ctstate":
      case "--state": {
        const states = value.split(",");
        if (!holds(states.includes("NEW") || (redirected && states.includes("DNAT")))) return "no";
        at += 1;
        break;
      }
      case "--tcp-flags":
        at += 2;
        break;
      default:
        answer = "may";
    }
  }
  return answer;
}

function inPorts(list: string, port: number): boolean {
  return list.split(",").some((item) => {
    const [from, to] = item.split(":").map(Number);
    return from !== undefined && port >= from && port <= (to ?? from);
  });
}

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

/**
 * What is wrong with capture on this machine. Reads only: no test rule, no legacy table that is not registered. One
 * connection is made for each family (`probe.ts`).
 *
 * @param rulesDir undefined on a machine that is not joined
 */
export async function auditCapture(
  host: Pick<Host, "run" | "files" | "random">,
  rulesDir: string | undefined,
): Promise<Finding[]> {
  return [...judge(await gather(host, rulesDir)), ...(await probeFindings(host, rulesDir))];
}

async function gather(host: Reads, rulesDir: string | undefined): Promise<Evidence> {
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
