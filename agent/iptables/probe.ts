import { VmmeshError } from "../core/errors.ts";
import { bracketed } from "../core/net.ts";
import { PORTS, PROBE_ADDRESS, PROBE_ANSWER } from "../core/paths.ts";
import type { Host } from "../platform/host.ts";
import { type Finding, finding, REPAIR, type Severity } from "./audit/finding.ts";
import { readState } from "./generation.ts";
import { type Family, hostCidr } from "./rules.ts";

/**
 * What a connection of an ordinary user to an address that only Envoy answers has met:
 * - `envoy`: capture works, whatever the rules look like;
 * - `no listener`: it was refused, and Envoy has no outbound listener for this family;
 * - `refused`: it was refused although the listener is there: the fence held it;
 * - `past`: somebody else answered, or nobody did: the packet left the machine or was dropped;
 * - `no route`: nothing can be said, the kernel sends such packets nowhere;
 * - `impossible`: the probe itself could not be made.
 */
export interface ProbeResult {
  readonly family: Family;
  readonly met: "envoy" | "no listener" | "refused" | "past" | "no route" | "impossible";
  /** What was seen, for the evidence. */
  readonly seen: string;
}

/** The kernel's "nobody" (include/linux/highuid.h); neither Envoy nor the agent runs as it. */
const NOBODY = "65534";
/** A connection inside one machine needs no second of this. */
const PROBE_SECONDS = "2";
/** bash(1): a connection as a file; what came before the time was out is printed. */
const READ_ONE_LINE = 'exec 3<>"/dev/tcp/$1/$2" || exit 1; IFS= read -r -t 1 -u 3 line; printf "%s" "$line"';
/** timeout(1): the time ran out. */
const TIMED_OUT = 124;

/** @returns what was met; never throws for what the machine does to the connection */
export async function probeCapture(host: Pick<Host, "run" | "files">, family: Family): Promise<ProbeResult> {
  const address = PROBE_ADDRESS[family];
  const result = (met: ProbeResult["met"], seen: string): ProbeResult => ({ family, met, seen });
  try {
    const { code, stdout, stderr } = await host.run({
      argv: [
        "setpriv",
        ...[`--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups"],
        ...["timeout", PROBE_SECONDS],
        ...["bash", "-c", READ_ONE_LINE, "probe"],
        ...[address, String(PORTS.probe)],
      ],
      env: { LC_ALL: "C" },
    });
    if (stdout.startsWith(PROBE_ANSWER)) return result("envoy", stdout.trim());
    if (stderr.includes("Connection refused")) {
      return (await listens(host, family))
        ? result("refused", "the connection was refused, although Envoy's outbound listener is there")
        : result("no listener", `nothing listens on ${PORTS.outbound} for IPv${family}`);
    }
    if (stderr.includes("unreachable")) return result("no route", "the kernel has no route for it");
    if (code === TIMED_OUT) return result("past", `no answer within ${PROBE_SECONDS} s`);
    if (code === 0) return result("past", `somebody else answered: ${JSON.stringify(stdout.slice(0, 40))}`);
    return result("impossible", stderr.trim().split("\n")[0] ?? `exit code ${code}`);
  } catch (thrown) {
    if (thrown instanceof VmmeshError) return result("impossible", thrown.message);
    throw thrown;
  }
}

/** @see proc_pid_net(5): state 0A is TCP_LISTEN, the port is in hexadecimal */
async function listens(host: Pick<Host, "files">, family: Family): Promise<boolean> {
  const sockets = (await host.files.readText(family === 4 ? "/proc/net/tcp" : "/proc/net/tcp6")) ?? "";
  const port = PORTS.outbound.toString(16).toUpperCase().padStart(4, "0");
  return new RegExp(`^ *\\d+: [0-9A-F]+:${port} [0-9A-F]+:0000 0A `, "m").test(sockets);
}

/** The last word of the audit: what a connection meets, for each family that is captured. */
export async function probeFamilies(
  host: Pick<Host, "run" | "files">,
  rulesDir: string | undefined,
): Promise<ProbeResult[]> {
  const plan =
    rulesDir === undefined ? undefined : (await readState(host.files, rulesDir, "confirmed"))?.state.plan;
  const probed = (plan?.families ?? []).filter(({ family, rules }) => {
    const cidr = hostCidr(PROBE_ADDRESS[family], family);
    return rules.some(({ when }) => when.some((match) => match.is === "to" && match.cidr === cidr));
  });
  return Promise.all(probed.map(({ family }) => probeCapture(host, family)));
}

/** What a probe's result means for an operator. Pure. */
export function judgeProbe({ family, met, seen }: ProbeResult): Finding[] {
  const place = `${bracketed(PROBE_ADDRESS[family])}:${PORTS.probe}`;
  const judged = (severity: Severity, title: string, remedy: string, command = ""): Finding[] => [
    finding("FW046", severity, title, [`${place} as uid ${NOBODY}: ${seen}`], remedy, command),
  ];
  switch (met) {
    case "envoy":
      return [];
    case "past":
      return judged(
        "critical",
        `a real connection went past Envoy (IPv${family})`,
        "Let trace say at which rule it left the way; repair puts our rules first again.",
        `vmmesh iptables trace --to ${place} --as ${NOBODY}`,
      );
    case "refused":
      return judged(
        "high",
        `a real connection to the mesh was refused (IPv${family})`,
        "Our rules are not first, and the fence held the connection.",
        REPAIR,
      );
    case "no listener":
      return judged(
        // istiod gives Envoy [::] listeners only with ISTIO_DUAL_STACK and a dual-stack workload.
        family === 4 ? "high" : "info",
        `the mesh cannot be reached by IPv${family}: Envoy has no listener for it`,
        family === 4
          ? "Envoy is down or has no configuration yet; see its unit and the agent's."
          : "If the mesh is meant to carry IPv6, turn ISTIO_DUAL_STACK on in istiod; until then such calls are refused.",
        family === 4 ? "systemctl status vmmesh-envoy vmmesh-agent" : "",
      );
    case "no route":
    case "impossible":
      return judged(
        "info",
        `capture could not be proven by a connection (IPv${family})`,
        "The other findings say what the rules look like; nothing was seen to be wrong.",
      );
  }
}
