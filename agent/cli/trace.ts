import { messageOf, VmmeshError } from "../core/errors.ts";
import { ipFamily, parseHostPort } from "../core/net.ts";
import type { Paths } from "../core/paths.ts";
import { readCaptureState } from "../daemon/captureState.ts";
import { readState } from "../iptables/generation.ts";
import { backendWords } from "../iptables/plan/describe.ts";
import { glimpse, mayReadRules } from "../iptables/trace/glimpse.ts";
import { type LiveReport, traceLive } from "../iptables/trace/live.ts";
import type { Protocol } from "../iptables/trace/packet.ts";
import { resolveSender } from "../iptables/trace/sender.ts";
import { packetText, type Question, type TraceReport, traceStatic } from "../iptables/trace/trace.ts";
import type { Host } from "../platform/host.ts";
import type { Options } from "./commands.ts";
import { flag, openContext, print, text, wantsJson } from "./context.ts";

/** Exit status where the rules cannot be read: less than an answer, and more than an error. */
const IN_PART = 8;

/** Exit status 1 if the kernel's own trace contradicts the walk, 8 if only what lies around the rules could be told. */
export async function trace(options: Options): Promise<number> {
  const { host, paths } = openContext(options);
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
  const report = await walk(host, question);
  if (typeof report === "string") {
    const facts = [...(await glimpse(host, question)), ...(await ofVmmesh(host, paths))];
    const next =
      process.getuid?.() === 0
        ? "Run it on the machine itself, or give this container CAP_NET_ADMIN."
        : `Run it with sudo: sudo vmmesh ${process.argv.slice(2).join(" ")}`;
    const packet = packetText(question);
    if (wantsJson(options)) print({ packet, rulesRead: false, because: report, facts, next });
    else
      print(
        [
          packet,
          "",
          `Where it goes is not known: the rules cannot be read (${report})${live ? ", and nothing was sent" : ""}.`,
          "What /proc, /sys and the routes tell, without a single rule:",
          ...facts.map((fact) => `  ${fact}`),
          "",
          next,
        ].join("\n"),
      );
    return IN_PART;
  }
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

/** @returns why not, where the rules cannot be read */
async function walk(host: Host, question: Question): Promise<TraceReport | string> {
  if (!(await mayReadRules(host.files))) return "this process has no CAP_NET_ADMIN";
  try {
    return await traceStatic(host, question);
  } catch (thrown) {
    if (!(thrown instanceof VmmeshError) || thrown.code !== "RULES_PRIVILEGE") throw thrown;
    return thrown.cause === undefined ? thrown.message : messageOf(thrown.cause);
  }
}

/** What vmmesh itself has written down, as far as this user may read it. */
async function ofVmmesh({ files }: Host, at: Paths): Promise<string[]> {
  const seen = await readCaptureState(files, at);
  const recorded = await readState(files, at.rules, "confirmed").catch(() => undefined);
  return [
    seen.inForce
      ? `vmmesh's rules were in force when it last looked: inbound ${seen.inbound}; outbound ${seen.outbound} (${at.captureState})`
      : `vmmesh has written down no rules in force (${at.captureState})`,
    ...(recorded === undefined
      ? []
      : [
          `it has recorded what it applied: ${backendWords(recorded.state.plan)} (${recorded.here}/plan.json)`,
        ]),
  ];
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
