import { bracketed } from "../../core/net.ts";
import type { Host } from "../../platform/host.ts";
import { tryRun } from "../read.ts";
import type { Question, TraceReport } from "./trace.ts";

/** What the kernel itself said of one real connection attempt. */
export interface LiveReport {
  /** The kernel's words, one line a rule or policy; rules of iptables-legacy are not among them. */
  readonly steps: readonly string[];
  /** Where the packet was last seen with which destination. */
  readonly end: "delivered" | "leaves" | "stopped";
  readonly destination: string;
  readonly attempt: "connected" | "refused" | "no answer" | "sent";
  /** Does the walk through the rules say the same? */
  readonly agrees: boolean;
}

/** Held by one process and gone with it; `audit` knows the name. */
export const TRACE_TABLE = "inet vmmesh-trace";

/**
 * The table belongs to `nft -i` (flag owner), which lives as long as the pipe into it; the attempt is what keeps that pipe
 * open. Whoever of them is killed, and however, the table goes with it, and after eight seconds in any case.
 * A chain named after this shell says that the table is the one of this very trace, and not of another one at work; it is
 * made in one transaction with the table.
 * $1 commands for nft in one line, $2 uid, $3 gid, $4 tcp or udp, $5 address, $6 port.
 */
const SCRIPT = `
exec 3>&2
timeout 8 nft monitor trace &
monitor=$!
{
  printf '%s\\n' "$1; add chain ${TRACE_TABLE} of$$"
  tries=0
  while :; do
    case $(nft list table ${TRACE_TABLE} 2>/dev/null) in
    *"chain of$$ "*) break ;;
    ?*)
      printf 'the table is taken\\n' >&3
      exit 1
      ;;
    esac
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || exit 1
    sleep 0.02
  done
  # Nobody says when the monitor has subscribed.
  sleep 0.1
  said=$(timeout 3 setpriv --reuid "$2" --regid "$3" --clear-groups \\
    bash -c 'exec 3<>"/dev/$0/$1/$2" && { [ "$0" = tcp ] || printf . >&3; }' "$4" "$5" "$6" 2>&1)
  printf 'attempt ended with %s: %s\\n' "$?" "$said" >&3
  sleep 0.2
} | timeout 8 nft -i >/dev/null 2>&1
kill "$monitor" 2>/dev/null
wait "$monitor" 2>/dev/null
true
`;

/**
 * Makes the connection and lets the kernel tell of its first packet.
 *
 * @returns why not, in words, where it cannot be done
 */
export async function traceLive(
  host: Pick<Host, "run">,
  question: Question,
  report: Pick<TraceReport, "ends">,
): Promise<LiveReport | string> {
  if (!("sender" in question.by)) return "a connection from outside cannot be made from here";
  if ((await tryRun(host, { argv: ["nft", "--version"] }))?.code !== 0)
    return "nft is not installed, so the kernel cannot be asked to trace";
  const { sender } = question.by;
  const { to, protocol } = question;
  if (protocol === "icmp") return "--live makes connections of TCP and UDP only";
  const result = await host.run({
    argv: [
      "sh",
      "-c",
      SCRIPT,
      "vmmesh-trace",
      traceRules(question, sender.uid),
      String(sender.uid),
      String(sender.gid ?? sender.uid),
      protocol,
      to.address,
      String(to.port),
    ],
    timeoutMs: 20_000,
  });
  if (result.stderr.includes("the table is taken"))
    return "another `vmmesh iptables trace --live` is at work; it takes ten seconds at most";
  if (!result.stderr.includes("attempt ended"))
    return "the kernel did not take the trace table; it needs nf_tables with owned tables (Linux 5.12) and CAP_NET_ADMIN";
  return parseLive(result.stdout, result.stderr, protocol, report);
}

/** Exactly this flow and its first packet, before every other chain; the empty chains show it at its end. */
function traceRules({ to, protocol }: Question, uid: number): string {
  const ip = to.address.includes(":") ? "ip6" : "ip";
  const opening = protocol === "tcp" ? " tcp flags & (syn | ack) == syn" : "";
  const last = (hook: string): string =>
    `add chain ${TRACE_TABLE} ${hook} { type filter hook ${hook} priority 500; policy accept; }`;
  return [
    `add table ${TRACE_TABLE} { flags owner; }`,
    `add chain ${TRACE_TABLE} output { type filter hook output priority -500; policy accept; }`,
    `add rule ${TRACE_TABLE} output meta skuid ${uid} ${ip} daddr ${to.address} ${protocol} dport ${to.port}${opening} meta nftrace set 1`,
    last("postrouting"),
    last("input"),
  ].join("; ");
}

/** Pure. @param text lines of `nft monitor trace` @param words what the attempt said */
export function parseLive(
  text: string,
  words: string,
  protocol: "tcp" | "udp",
  report: Pick<TraceReport, "ends">,
): LiveReport | string {
  const traced = text.split("\n").filter((line) => line.startsWith("trace id "));
  const [first] = traced;
  if (first === undefined)
    return "the kernel traced nothing: the connection was not tried, or another program took the trace away";
  let destination = "";
  let end: LiveReport["end"] = "stopped";
  const steps: string[] = [];
  for (const [index, line] of traced.entries()) {
    const [, table = "", chain = "", rest = ""] = /^trace id \S+ (\S+ \S+) (\S+) (.*)$/.exec(line) ?? [];
    // The same connection's next packet: it was not answered and is sent again.
    if (index > 0 && table === TRACE_TABLE && chain === "output" && rest.startsWith("packet:")) break;
    const packet = /^packet: .*?\bip6? daddr (\S+) .*?\b(?:tcp|udp) dport (\d+)/.exec(rest);
    if (packet !== null) destination = `${bracketed(packet[1] ?? "")}:${packet[2]}`;
    if (table === TRACE_TABLE) {
      if (chain === "postrouting") end = "leaves";
      if (chain === "input") end = "delivered";
      if (chain === "input") break;
      continue;
    }
    if (packet === null)
      steps.push(`${table} ${chain}: ${rest.replace(/ counter packets \d+ bytes \d+/, "").trim()}`);
  }
  // A packet for this machine passes POSTROUTING too, on its way over lo.
  const last = steps.at(-1) ?? "";
  if (end === "leaves" && /(verdict drop|policy drop)/.test(last)) end = "stopped";
  const attempt =
    protocol === "udp"
      ? "sent"
      : /refused/i.test(words)
        ? "refused"
        : words.includes("attempt ended with 0")
          ? "connected"
          : "no answer";
  const agrees = report.ends.some((ending) => {
    const stopped = ["dropped", "queued", "unroutable"].includes(ending.kind);
    if (end === "stopped") return stopped || ending.kind === "refused";
    return ending.destination === destination && (end === "leaves") === (ending.kind === "leaves");
  });
  return { steps, end, destination, attempt, agrees };
}
