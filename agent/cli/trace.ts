import { VmmeshError } from "../core/errors.ts";
import { ipFamily, parseHostPort } from "../core/net.ts";
import { type LiveReport, traceLive } from "../iptables/trace/live.ts";
import type { Protocol } from "../iptables/trace/packet.ts";
import { resolveSender } from "../iptables/trace/sender.ts";
import { type Question, type TraceReport, traceStatic } from "../iptables/trace/trace.ts";
import type { Options } from "./commands.ts";
import { flag, openContext, print, requireRoot, text, wantsJson } from "./context.ts";

/** Exit status 1 if the kernel's own trace contradicts the walk. */
export async function trace(options: Options): Promise<number> {
  requireRoot("vmmesh iptables trace reads every program's rules; with --live it");
  const { host } = openContext(options);
  const protocol = text(options, "protocol") as Protocol;
  const to = target(text(options, "to") ?? "", protocol);
  const [as, from] = [text(options, "as"), text(options, "from")];
  const live = flag(options, "live");
  if ((as === undefined) === (from === undefined)) {
    throw new VmmeshError("USAGE", "a packet has one origin: give either --as or --from", {
      next: "Give --as USER for a connection that this machine makes, or --from ADDRESS for one that comes in.",
    });
  }
  if (from !== undefined && ipFamily(from) !== ipFamily(to.address)) {
    throw new VmmeshError("USAGE", `--from: \`${from}\` is not an address of the same family as --to`, {
      next: "Give two IPv4 addresses or two IPv6 addresses.",
    });
  }
  if (live && from !== undefined) {
    throw new VmmeshError("USAGE", "--live makes the connection itself, so it cannot come from elsewhere", {
      next: "Give --as USER, or leave --live out.",
    });
  }
  if (from !== undefined && host.net.addresses().some(({ address }) => address === from)) {
    throw new VmmeshError("USAGE", `--from: ${from} is an address of this machine itself`, {
      next: "Give --as USER for a connection that this machine makes.",
    });
  }
  const question: Question = {
    to,
    protocol,
    by: from === undefined ? { sender: await resolveSender(host, as ?? ""), label: as ?? "" } : { from },
  };
  const report = await traceStatic(host, question);
  const proven = live ? await traceLive(host, question, report) : undefined;
  if (wantsJson(options))
    print({
      ...report,
      ...(proven === undefined
        ? {}
        : typeof proven === "string"
          ? { liveImpossible: proven }
          : { live: proven }),
    });
  else print(tell(report, proven));
  return typeof proven === "object" && !proven.agrees ? 1 : 0;
}

function target(value: string, protocol: Protocol): Question["to"] {
  if (protocol === "icmp") {
    if (ipFamily(value) !== undefined) return { address: value, port: 0 };
    throw new VmmeshError("USAGE", `--to: \`${value}\` is not an address; ICMP has no ports`, {
      next: "Give an IP address alone, e.g. 10.96.0.10 or fd00::10.",
    });
  }
  const parsed = parseHostPort(value);
  if (parsed !== undefined && ipFamily(parsed.host) !== undefined)
    return { address: parsed.host, port: parsed.port };
  throw new VmmeshError("USAGE", `--to: \`${value}\` is not an address with a port`, {
    next: "Give an IP address, not a name, e.g. 10.96.0.10:80 or [fd00::10]:80.",
  });
}

function tell(report: TraceReport, live: LiveReport | string | undefined): string {
  const lines = [report.packet];
  for (const [index, { verdict, hops }] of report.ends.entries()) {
    if (report.ends.length > 1) lines.push("", `way ${index + 1}: ${verdict}`);
    for (const { sentence, rule } of hops)
      lines.push(`  ${sentence}`, ...(rule === "" ? [] : [`      ${rule}`]));
  }
  lines.push("", `The packet ${report.verdict}.`, ...report.because.map((why) => `  not known: ${why}`));
  if (typeof live === "string") lines.push("", `Not proven by the kernel: ${live}.`);
  if (typeof live === "object") {
    lines.push("", "The kernel's own trace:", ...live.steps.map((step) => `  ${step}`));
    const where = {
      delivered: "delivered here as",
      leaves: "sent out to",
      stopped: "stopped; last seen for",
    }[live.end];
    lines.push(
      `The packet was ${where} ${live.destination}; the connection: ${live.attempt}. ${live.agrees ? "That is what the rules say." : "That is NOT what the rules say: please report it."}`,
    );
  }
  return lines.join("\n");
}
