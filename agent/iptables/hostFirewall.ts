import { readSaves } from "./audit/surroundings.ts";
import { parseAddresses, parseBaseChains, parseListeners } from "./parse.ts";
import { type Reads, tryRun } from "./read.ts";
import { admission, difference, type Place, placeOf } from "./trace/admit.ts";
import { readInput } from "./trace/input.ts";

/** Does the kernel take a TPROXY rule? Nothing is committed (nft(8), --check). */
const TPROXY_PROBE = `table ip vmmesh-probe {
	chain handover { type filter hook prerouting priority -150; policy accept;
		meta l4proto tcp tproxy to :1 meta mark set 1
	}
}
`;

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
  const place = await readPlace(host);
  const captured = ports === "all" ? place.listeners.map(({ port }) => port) : ports;
  for (const door of place.doors) {
    for (const port of captured) {
      const differs = difference(place, door, port);
      if (differs === undefined) continue;
      const { certain, because } = differs;
      const why = because.length === 0 ? "" : `: it depends on ${because.join(", ")}`;
      return `the machine's firewall ${certain ? "judges" : "may judge"} port ${port} otherwise than a redirected connection${why}`;
    }
    const { answer, because } = admission(place, door, ANY_OTHER, "captured");
    if (answer === "no" || admission(place, door, ANY_OTHER, "as it is").answer === "no")
      return "the machine's firewall lets nothing in that it does not know";
    if (answer === "may")
      return `the machine's firewall may not let in a redirected connection: it depends on ${because.join(", ")}`;
  }
  return undefined;
}

/** It stands for one that may be declared, opened or closed later: no rule names it. */
const ANY_OTHER = 0;

/** INPUT as it is now, with what its rules can ask. */
export async function readPlace(host: Reads): Promise<Place> {
  const text = async (argv: readonly [string, ...string[]]): Promise<string> =>
    (await tryRun(host, { argv }))?.stdout ?? "";
  const [input, sockets, addresses] = await Promise.all([
    readInput(host, readSaves(host), text(["nft", "list", "chains"]).then(parseBaseChains)),
    text(["ss", "-ltnpH"]),
    text(["ip", "-o", "addr", "show"]),
  ]);
  return placeOf(input, parseAddresses(addresses), parseListeners(sockets));
}
