import { VmmeshError } from "../../core/errors.ts";
import type { Command, CommandResult, Host } from "../../platform/host.ts";
import { UNITS } from "../../platform/services.ts";
import { parseAddresses, parseSave } from "../parse.ts";
import { legacyTables, tryRun } from "../read.ts";
import type { Save, Surroundings, Unit } from "./evidence.ts";
import { OUR_UNITS, RIVAL_CONFIG, RIVAL_UNITS } from "./rivals.ts";

export type Gathers = Pick<Host, "run" | "files" | "clock">;

/** A machine of which nothing is known. */
export const NOTHING_AROUND: Surroundings = {
  interfaces: [],
  addresses: [],
  forwards: false,
  socketPrograms: [],
  nftNodePorts: [],
  uidMap: "",
  units: [],
  config: {},
  firewalldVersion: undefined,
  repairs: [],
  lock: { waitedMs: 0, strangers: [] },
  routingRules: [],
  conntrack: { count: 0, max: 0, lost: 0 },
  flows: [],
  socketOwners: new Map(),
};

/** Nobody waits longer for what is only one fact among many. */
const PATIENCE_MS = 2000;

/** undefined if it is not installed, fails or takes too long: then there is no such evidence. */
async function quick(host: Gathers, argv: Command["argv"]): Promise<string | undefined> {
  try {
    const result: CommandResult | undefined = await tryRun(host, { argv, timeoutMs: PATIENCE_MS });
    return result?.code === 0 ? result.stdout : undefined;
  } catch (thrown) {
    if (thrown instanceof VmmeshError && thrown.code === "COMMAND_FAILED") return undefined;
    throw thrown;
  }
}

/** Everything that both backends hold in both families. Without -t, legacy's save registers no table. */
export async function readSaves(host: Pick<Host, "run">): Promise<Save[]> {
  const wanted = (["nft", "legacy"] as const).flatMap((backend) =>
    ([4, 6] as const).map((family) => ({ backend, family })),
  );
  const saves = await Promise.all(
    wanted.map(async ({ backend, family }) => {
      const program = `ip${family === 6 ? "6" : ""}tables-${backend}-save`;
      const result = await tryRun(host, { argv: [program] });
      // A link to a program that is not there is no program either.
      if (result === undefined || result.code === 127) return [];
      return [{ backend, family, tables: parseSave(result.stdout), complaints: complaintsOf(result) }];
    }),
  );
  return saves.flat();
}

/** The lines for tables of nft on standard output, those for rules on standard error (iptables 1.8). */
function complaintsOf({ stdout, stderr }: CommandResult): string[] {
  return [
    ...stdout.split("\n").filter((line) => /^# Table `.*incompatible/.test(line)),
    ...stderr.split("\n").filter((line) => line.includes("Parsing nftables rule failed")),
  ];
}

export async function readSurroundings(host: Gathers): Promise<Surroundings> {
  const { files } = host;
  const text = async (path: string): Promise<string> => (await files.readText(path)) ?? "";
  const before = lostPackets(await text("/proc/net/stat/nf_conntrack"));
  const [devices, addresses, forward, uidMap, rules4, rules6, count, max, tcp, tcp6, rest] =
    await Promise.all([
      text("/proc/net/dev"),
      quick(host, ["ip", "-o", "addr", "show"]),
      text("/proc/sys/net/ipv4/ip_forward"),
      text("/proc/self/uid_map"),
      quick(host, ["ip", "-4", "-N", "rule", "show"]),
      quick(host, ["ip", "-6", "-N", "rule", "show"]),
      text("/proc/sys/net/netfilter/nf_conntrack_count"),
      text("/proc/sys/net/netfilter/nf_conntrack_max"),
      text("/proc/net/tcp"),
      text("/proc/net/tcp6"),
      Promise.all([
        socketPrograms(host),
        nodePorts(host),
        readUnits(host),
        readConfig(host),
        firewalldVersion(host),
        recentRepairs(host),
        lockOf(host),
      ]),
    ]);
  const [programs, ports, units, config, version, repairs, lock] = rest;
  const connections = Number(count);
  return {
    interfaces: [...devices.matchAll(/^\s*(\S+):/gm)].map(([, name = ""]) => name),
    addresses: parseAddresses(addresses ?? ""),
    forwards: forward.trim() === "1",
    socketPrograms: programs,
    nftNodePorts: ports,
    uidMap,
    units,
    config,
    firewalldVersion: version,
    repairs,
    lock,
    routingRules: `${rules4 ?? ""}${rules6 ?? ""}`.split("\n").filter((line) => line !== ""),
    conntrack: {
      count: connections,
      max: Number(max),
      lost: lostPackets(await text("/proc/net/stat/nf_conntrack")) - before,
    },
    flows: connections > MANY_FLOWS ? [] : await establishedFlows(host),
    socketOwners: socketOwners(`${tcp}\n${tcp6}`),
  };
}

/** Above this, reading the flows takes longer than all the rest. */
const MANY_FLOWS = 20_000;

async function establishedFlows(host: Gathers): Promise<string[]> {
  const listed =
    (await host.files.readText("/proc/net/nf_conntrack")) ??
    (await quick(host, ["conntrack", "-L", "-p", "tcp", "--state", "ESTABLISHED"]));
  return (listed ?? "").split("\n").filter((line) => / ESTABLISHED /.test(line));
}

/** Columns `drop` and `early_drop`, in hexadecimal, one line a processor. @see net/netfilter/nf_conntrack_standalone.c */
function lostPackets(stat: string): number {
  const [header = "", ...lines] = stat.trim().split("\n");
  const columns = header.split(/\s+/);
  const wanted = ["drop", "early_drop"].map((name) => columns.indexOf(name)).filter((at) => at >= 0);
  return lines
    .map((line) => line.split(/\s+/))
    .reduce(
      (sum, values) => sum + wanted.reduce((own, at) => own + Number.parseInt(values[at] ?? "0", 16), 0),
      0,
    );
}

/** @see proc_pid_net(5): second column the local address, eighth the uid */
function socketOwners(text: string): Map<number, number> {
  const owners = new Map<number, number>();
  for (const line of text.split("\n")) {
    const match = /^\s*\d+: [0-9A-F]+:([0-9A-F]{4}) \S+ 01 \S+ \S+ \S+\s+(\d+)/.exec(line);
    if (match !== null) owners.set(Number.parseInt(match[1] ?? "0", 16), Number(match[2]));
  }
  return owners;
}

/** Where Cilium pins its programs on connect(2) (cilium, pkg/socketlb); Calico's are seen by bpftool alone. */
const CILIUM_LINKS = "/sys/fs/bpf/cilium/socketlb/links/cgroup";

/** bpftool names the attach type `connect4` up to Linux 5.x tools, `cgroup_inet4_connect` since. */
async function socketPrograms(host: Gathers): Promise<string[]> {
  const [tree, links] = await Promise.all([
    quick(host, ["bpftool", "cgroup", "tree"]),
    host.files.list(CILIUM_LINKS),
  ]);
  let cgroup = "";
  const found: string[] = [];
  for (const line of (tree ?? "").split("\n")) {
    if (line.startsWith("/")) cgroup = line.trim();
    if (/^\s*\d+\s+(connect[46]|cgroup_inet[46]_connect)\s/.test(`${line} `))
      found.push(`${cgroup}: ${line.trim().replace(/\s+/g, " ")}`);
  }
  return [
    ...found,
    ...(links ?? []).filter((name) => name.endsWith("_connect")).map((name) => `${CILIUM_LINKS}/${name}`),
  ];
}

/** Elements of kube-proxy's own map: `tcp . 30080 : goto external-…`. */
async function nodePorts(host: Gathers): Promise<number[]> {
  const map = await quick(host, ["nft", "list", "map", "ip", "kube-proxy", "service-nodeports"]);
  return [...(map ?? "").matchAll(/\btcp \. (\d+) :/g)].map(([, port]) => Number(port));
}

async function readUnits(host: Gathers): Promise<Unit[]> {
  const shown = await quick(host, [
    "systemctl",
    "show",
    "-p",
    "Id,ActiveState,UnitFileState,After",
    ...RIVAL_UNITS,
    ...OUR_UNITS,
  ]);
  return (shown ?? "").split("\n\n").flatMap((block) => {
    const value = (key: string): string => new RegExp(`^${key}=(.*)$`, "m").exec(block)?.[1] ?? "";
    const id = value("Id");
    if (id === "") return [];
    return [
      {
        id,
        active: value("ActiveState") === "active",
        enabled: value("UnitFileState") === "enabled",
        after: value("After")
          .split(" ")
          .filter((name) => name !== ""),
      },
    ];
  });
}

async function readConfig(host: Gathers): Promise<Record<string, string>> {
  const read = await Promise.all(
    RIVAL_CONFIG.map(async (path) => [path, await host.files.readText(path)] as const),
  );
  return Object.fromEntries(read.flatMap(([path, text]) => (text === undefined ? [] : [[path, text]])));
}

/** Read off its code: `firewall-cmd --version` takes as long as all the rest. */
async function firewalldVersion(host: Gathers): Promise<string | undefined> {
  const pythons = ((await host.files.list("/usr/lib")) ?? []).filter((name) => /^python3/.test(name));
  for (const python of pythons) {
    for (const packages of ["dist-packages", "site-packages"]) {
      const code = await host.files.readText(`/usr/lib/${python}/${packages}/firewall/config/__init__.py`);
      const version = /^VERSION = ["'](.+)["']/m.exec(code ?? "")?.[1];
      if (version !== undefined) return version;
    }
  }
  return undefined;
}

/** What the journal has of repairs, one entry a run. */
async function recentRepairs(host: Gathers): Promise<string[][]> {
  const lines = await quick(host, [
    ...(["journalctl", "-q", "-o", "json", "--since=-10min"] as const),
    ...["--output-fields=MESSAGE,_SYSTEMD_INVOCATION_ID", "-u", UNITS.repairRun],
  ]);
  const runs = new Map<string, string[]>();
  for (const line of (lines ?? "").split("\n")) {
    const entry = readEntry(line);
    if (entry?.MESSAGE?.startsWith("repaired: ") !== true) continue;
    const run = entry._SYSTEMD_INVOCATION_ID ?? "";
    runs.set(run, [...(runs.get(run) ?? []), entry.MESSAGE.replace("repaired: ", "")]);
  }
  return [...runs.values()];
}

/** @see systemd.journal-fields(7); undefined for what is no entry */
function readEntry(line: string): { MESSAGE?: string; _SYSTEMD_INVOCATION_ID?: string } | undefined {
  try {
    const entry: unknown = JSON.parse(line);
    // Printed by journalctl; a message that is no text comes as a list of bytes.
    return typeof entry === "object" &&
      entry !== null &&
      "MESSAGE" in entry &&
      typeof entry.MESSAGE === "string"
      ? (entry as { MESSAGE: string })
      : undefined;
  } catch {
    return undefined;
  }
}

const LOCK = "/run/xtables.lock";
/** Programs that write rules out of a container. */
const RULE_WRITERS = /^(kube-proxy|calico-node|cilium-agent|flanneld|kube-router|antrea-agent)$/;

/** Only where iptables-legacy is in use: nothing else has a lock. */
async function lockOf(host: Gathers): Promise<Surroundings["lock"]> {
  const [table] = await legacyTables(host, 4);
  if (table === undefined) return NOTHING_AROUND.lock;
  const started = host.clock.monotonicMs();
  // `-w` waits for the lock; listing takes it (iptables-legacy 1.8).
  await quick(host, ["iptables-legacy", "-w", "2", "-t", table, "-S", "OUTPUT"]);
  const waitedMs = host.clock.monotonicMs() - started;
  const ps = (await quick(host, ["ps", "-eo", "pid=,comm="])) ?? "";
  const writers = [...ps.matchAll(/^\s*(\d+) (.+)$/gm)].filter(([, , name = ""]) =>
    RULE_WRITERS.test(name.trim()),
  );
  if (writers.length === 0) return { waitedMs, strangers: [] };
  const own = await quick(host, ["stat", "-L", "-c", "%d:%i", LOCK]);
  const strangers = await Promise.all(
    writers.map(async ([, pid = "", name = ""]) => {
      const theirs = await quick(host, ["stat", "-L", "-c", "%d:%i", `/proc/${pid}/root${LOCK}`]);
      return theirs === own ? [] : [`${name.trim()} (pid ${pid}) has another ${LOCK} than this machine`];
    }),
  );
  return { waitedMs, strangers: strangers.flat() };
}
