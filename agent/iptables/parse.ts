/** One line of `iptables -S` or `iptables-save`, as far as we judge it. */
export interface ParsedRule {
  readonly chain: string;
  /** As printed, without counters. */
  readonly line: string;
  /** Of `-j` or `-g`; undefined for a rule that only counts. */
  readonly target: string | undefined;
  readonly comment: string | undefined;
  readonly words: readonly string[];
}

/** A table as `iptables-save` prints it. */
export interface ParsedTable {
  readonly name: string;
  /** Built-in chains with their policy, others with `-`. */
  readonly chains: ReadonlyMap<string, string>;
  readonly rules: readonly ParsedRule[];
}

/** Words of a line; double quotes group, a backslash escapes within them (iptables' own quoting). */
export function splitWords(line: string): string[] {
  const words: string[] = [];
  for (const [, quoted, plain] of line.matchAll(/"((?:[^"\\]|\\.)*)"|(\S+)/g)) {
    words.push(plain ?? (quoted ?? "").replace(/\\(.)/g, "$1"));
  }
  return words;
}

/** `-A CHAIN …`, with or without `[packets:bytes]` before it; undefined for any other line. */
export function parseRule(text: string): ParsedRule | undefined {
  const line = text.trim().replace(/^\[\d+:\d+\] /, "");
  const words = splitWords(line);
  const chain = words[1];
  if (words[0] !== "-A" || chain === undefined) return undefined;
  const after = (...options: string[]): string | undefined => {
    const at = words.findIndex((word) => options.includes(word));
    return at < 0 ? undefined : words[at + 1];
  };
  return { chain, line, words, target: after("-j", "-g"), comment: after("--comment") };
}

/** Rules of `iptables -S [CHAIN]`. Lines with `#` (warnings on standard output), `-P` and `-N` are skipped. */
export function parseRules(text: string): ParsedRule[] {
  return text
    .split("\n")
    .map(parseRule)
    .filter((rule) => rule !== undefined);
}

/** Output of `iptables-save`, one entry a table. */
export function parseSave(text: string): ParsedTable[] {
  const tables: { name: string; chains: Map<string, string>; rules: ParsedRule[] }[] = [];
  for (const line of text.split("\n")) {
    const table = tables.at(-1);
    const chain = /^:(\S+) (\S+)/.exec(line);
    if (line.startsWith("*")) tables.push({ name: line.slice(1).trim(), chains: new Map(), rules: [] });
    else if (chain !== null) table?.chains.set(chain[1] ?? "", chain[2] ?? "-");
    else {
      const rule = parseRule(line);
      if (rule !== undefined) table?.rules.push(rule);
    }
  }
  return tables;
}

/**
 * What a machine's firewall says without counters, dates and empty lines: two of these are equal exactly when nobody
 * changed anything.
 */
export function withoutCounters(save: string): string[] {
  return save
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("#"))
    .map((line) => line.replace(/ \[\d+:\d+\]$/, "").replace(/^\[\d+:\d+\] /, ""));
}

/** Targets that change nothing about where a packet goes (they may mark, count or log it). */
export const HARMLESS: ReadonlySet<string> = new Set([
  "RETURN",
  "LOG",
  "NFLOG",
  "MARK",
  "CONNMARK",
  "TRACE",
  "CT",
  "CLASSIFY",
  "TOS",
  "DSCP",
  "CHECKSUM",
  "SET",
]);
/** Targets that end the hook for a packet, or send it elsewhere. */
export const DIVERTING: ReadonlySet<string> = new Set([
  "ACCEPT",
  "DROP",
  "REJECT",
  "DNAT",
  "REDIRECT",
  "SNAT",
  "MASQUERADE",
  "NETMAP",
  "TPROXY",
  "QUEUE",
  "NFQUEUE",
  "NOTRACK",
]);

/** Chains whose content need not be read (KUBE-SERVICES can have thousands of rules): they exist to divert. */
export const KNOWN_DIVERTERS: ReadonlySet<string> = new Set(["KUBE-SERVICES", "DOCKER", "DOCKER_OUTPUT"]);

/** Can this rule itself keep a packet from the rules after it? "chain" means: as its target chain does. */
export function diverts(rule: ParsedRule): "yes" | "no" | "chain" {
  if (rule.target === undefined || HARMLESS.has(rule.target)) return "no";
  return DIVERTING.has(rule.target) ? "yes" : "chain";
}

const OWNERS: readonly (readonly [RegExp, string])[] = [
  [/^KUBE-/, "kube-proxy"],
  [/^DOCKER/, "docker"],
  [/^cali-/, "calico"],
  [/^CILIUM_/, "cilium"],
  [/^ts-/, "tailscale"],
  [/^LIBVIRT_/, "libvirt"],
  [/^(OUTPUT|PREROUTING)_direct$/, "firewalld"],
  [/^ufw-/, "ufw"],
  [/^NETAVARK/, "podman"],
  [/^ISTIO_/, "istio-iptables"],
];

/** The program that uses chains of this name. */
export function ownerOfChain(chain: string): string | undefined {
  return OWNERS.find(([pattern]) => pattern.test(chain))?.[1];
}

/** One listening TCP socket of `ss -ltnpH`. */
export interface ListeningSocket {
  readonly address: string;
  readonly port: number;
  /** Empty if ss may not see them. */
  readonly processes: readonly { readonly name: string; readonly pid: number }[];
}

/** @see ss(8); columns: state, queues, local, peer, `users:(("sshd",pid=812,fd=3))` */
export function parseListeners(text: string): ListeningSocket[] {
  return text.split("\n").flatMap((line) => {
    const match = /^\S+\s+\d+\s+\d+\s+(\S+):(\d+)\s/.exec(`${line} `);
    if (match === null) return [];
    const processes = [...line.matchAll(/\("([^"]+)",pid=(\d+),/g)].map(([, name = "", pid]) => ({
      name,
      pid: Number(pid),
    }));
    return [
      {
        address: (match[1] ?? "").replace(/^\[|\]$/g, "").replace(/%.*$/, ""),
        port: Number(match[2]),
        processes,
      },
    ];
  });
}

/** Lines of `ip -o addr show`: `2: eth0    inet 10.0.0.5/24 …`. */
export function parseAddresses(text: string): { readonly device: string; readonly address: string }[] {
  return [...text.matchAll(/^\d+: (\S+)\s+inet6? ([^/\s]+)/gm)].map(([, device = "", address = ""]) => ({
    device,
    address,
  }));
}

/** Names of ssh servers' processes, as a whole. */
export const SSH_SERVERS = /sshd(-session)?|dropbear|tinysshd/;

/**
 * Ports of ssh servers. With `ssh.socket` systemd itself holds the port; then the unit says which those are. Pure.
 *
 * @param ss of `ss -ltneH`: a line a socket, with `ino:`
 * @param files of `ls -l /proc/PID/fd` of the servers: `3 -> socket:[1234]`
 * @param units of `systemctl show -p Listen`
 */
export function sshPortsOf(ss: string, files: string, units: string): number[] {
  const theirs = new Set([...files.matchAll(/ -> socket:\[(\d+)\]/g)].map(([, inode]) => inode));
  const unitPorts = parseSocketUnits(units);
  const ports = ss.split("\n").flatMap((line) => {
    const held = theirs.has(/ ino:(\d+)/.exec(line)?.[1]);
    return parseListeners(line).flatMap(({ port }) => (held || unitPorts.includes(port) ? [port] : []));
  });
  return [...new Set(ports)].sort((a, b) => a - b);
}

/** Ports in `systemctl show -p Listen ssh.socket sshd.socket`: `Listen=[::]:22 (Stream)`. */
export function parseSocketUnits(text: string): number[] {
  return [...text.matchAll(/:(\d+) \(Stream\)/g)].map(([, port]) => Number(port));
}

/** A base chain of `nft list chains`. */
export interface BaseChain {
  readonly table: string;
  readonly chain: string;
  readonly type: string;
  readonly hook: string;
  readonly priority: number;
}

/** nft's names for the standard priorities that matter here (nft(8), table "standard priority names"). */
const PRIORITIES: Readonly<Record<string, number>> = {
  raw: -300,
  mangle: -150,
  dstnat: -100,
  filter: 0,
  security: 50,
  srcnat: 100,
};

/** Base chains in the text of `nft list chains` (text, not JSON: nft 1.0.x prints some foreign chains only there). */
export function parseBaseChains(text: string): BaseChain[] {
  const found: BaseChain[] = [];
  let table = "";
  let chain = "";
  for (const line of text.split("\n")) {
    const opened = /^\s*(table|chain) (.+) \{/.exec(line);
    if (opened?.[1] === "table") table = opened[2] ?? "";
    if (opened?.[1] === "chain") chain = opened[2] ?? "";
    const base = /type (\w+) hook (\w+)(?: device \S+)? priority ([a-z]+)?(?: ?([+-]) ?)?(\d+)?;/.exec(line);
    if (base === null) continue;
    const [, type = "", hook = "", name, sign, number = "0"] = base;
    const offset = Number(number) * (sign === "-" ? -1 : 1);
    found.push({
      table,
      chain,
      type,
      hook,
      priority: (name === undefined ? 0 : (PRIORITIES[name] ?? 0)) + offset,
    });
  }
  return found;
}

/** `nft list chains`: the names of the chains of each table, by the table as nft names it (`ip nat`). */
export function parseNftChains(text: string): Map<string, Set<string>> {
  const tables = new Map<string, Set<string>>();
  let chains = new Set<string>();
  for (const [, kind, name = ""] of text.matchAll(/^\s*(table|chain) (.+) \{/gm)) {
    if (kind === "chain") chains.add(name);
    else {
      chains = new Set();
      tables.set(name, chains);
    }
  }
  return tables;
}
