import { PORTS } from "../core/paths.ts";
import { inputOf, inputVerdict } from "./audit/input.ts";
import { parseBaseChains, parseListeners, parseSave } from "./parse.ts";
import { legacyTables, type Reads, tryRun } from "./read.ts";

/** Does the kernel take a TPROXY rule? Nothing is committed (nft(8), --check). */
const TPROXY_PROBE = `table ip vmmesh-probe {
	chain handover { type filter hook prerouting priority -150; policy accept;
		meta l4proto tcp tproxy to :1 meta mark set 1
	}
}
`;

/** What iptables-nft itself makes is judged in iptables' own words. */
const OF_IPTABLES = /^ip6? filter$/;
const OURS = /^(inet|ip6?) vmmesh/;

/**
 * Why a redirected inbound connection would not be judged by the machine's own firewall as the port deserves: REDIRECT
 * changes the port before INPUT sees it, so that a closed port can become reachable and an open one closed. TPROXY leaves
 * it as it was.
 *
 * @param ports that will be captured
 * @returns one sentence; undefined if both are judged alike, or TPROXY cannot be had here
 */
export async function judgesByPort(
  host: Reads,
  ports: readonly number[] | "all",
): Promise<string | undefined> {
  const check = await tryRun(host, { argv: ["nft", "--check", "-f", "-"], input: TPROXY_PROBE });
  if (check?.code !== 0) return undefined;
  const chains = parseBaseChains((await tryRun(host, { argv: ["nft", "list", "chains"] }))?.stdout ?? "");
  const foreign = chains.find(
    ({ table, type, hook }) =>
      type === "filter" && hook === "input" && !OF_IPTABLES.test(table) && !OURS.test(table),
  );
  if (foreign !== undefined && (await refuses(host, foreign.table)))
    return `the machine's firewall (nft table ${foreign.table}) judges connections by their port`;
  const listeners = parseListeners((await tryRun(host, { argv: ["ss", "-ltnpH"] }))?.stdout ?? "");
  const captured = ports === "all" ? listeners.map(({ port }) => port) : ports;
  const legacy = (await legacyTables(host, 4)).includes("filter");
  for (const backend of legacy ? (["nft", "legacy"] as const) : (["nft"] as const)) {
    const save = await tryRun(host, { argv: [`iptables-${backend}-save`] });
    const input = inputOf(parseSave(save?.stdout ?? ""));
    const redirected = (from: number) => inputVerdict(input, PORTS.inbound, from);
    const differs = captured.find((port) => inputVerdict(input, port, undefined) !== redirected(port));
    if (differs !== undefined)
      return `the machine's firewall (iptables INPUT) judges port ${differs} otherwise than a redirected connection`;
    if (input.policy === "DROP" && redirected(0) !== "accepted")
      return "the machine's firewall (iptables INPUT) lets nothing in that it does not know";
  }
  return undefined;
}

/** A table that only counts or accepts is no firewall. */
async function refuses(host: Reads, table: string): Promise<boolean> {
  const text = (await tryRun(host, { argv: ["nft", "list", "table", ...table.split(" ")] }))?.stdout ?? "";
  return /\b(drop|reject)\b/.test(text);
}
