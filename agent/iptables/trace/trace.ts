import { bracketed } from "../../core/net.ts";
import { PORTS } from "../../core/paths.ts";
import { type Reads, tryRun } from "../read.ts";
import type { Family } from "../rules.ts";
import type { Ruleset } from "./model.ts";
import {
  addressNumber,
  endpointText,
  type Packet,
  type Protocol,
  type Sender,
  type Span,
  span,
} from "./packet.ts";
import { buildRuleset, readListing } from "./ruleset.ts";
import { type HopLine, hopLine, verdictOf } from "./tell.ts";
import { isBalanced, isCut, sameEnd, type Way, walkIn, walkOut } from "./walk.ts";
import { type Machine, readWorld } from "./world.ts";

/** The first packet of one connection. */
export interface Question {
  /** Port: 0 of ICMP. */
  readonly to: { readonly address: string; readonly port: number };
  readonly protocol: Protocol;
  /** Who sends it, or from where it comes. */
  readonly by: { readonly sender: Sender; readonly label: string } | { readonly from: string };
  /** Default: any that the kernel may choose. */
  readonly fromPort?: number;
}

/** The rules and the state of one machine at one moment, for one family. */
export interface Trace {
  readonly rules: Ruleset;
  readonly machine: Machine;
  readonly forwards: boolean;
  readonly ephemeral: { readonly low: number; readonly high: number };
}

/**
 * Reads everything that decides where a packet goes. Nothing is written.
 *
 * @throws {VmmeshError} RULES_PRIVILEGE
 */
export async function openTrace(host: Reads, family: Family): Promise<Trace> {
  const listing = await readListing(host, family);
  const saves = `${listing.nftSave}\n${listing.legacySave}`;
  const lists = [...saves.matchAll(/-m recent .*?--name (\S+)/g)];
  const open = await openWorld(host, family, {
    recentLists: [...new Set(lists.map(([, name = ""]) => name))],
    ipSets: saves.includes("--match-set"),
  });
  return { ...open, rules: buildRuleset(listing, family) };
}

/** Everything but the rules: any user may read it. @param asked what of it the rules ask for */
export async function openWorld(
  host: Reads,
  family: Family,
  asked: Parameters<typeof readWorld>[1],
): Promise<Omit<Trace, "rules">> {
  const sysctl = async (name: string): Promise<string> =>
    (await tryRun(host, { argv: ["sysctl", "-n", name] }))?.stdout.trim() ?? "";
  const [machine, forwarding, range] = await Promise.all([
    readWorld(host, asked),
    sysctl(family === 4 ? "net.ipv4.ip_forward" : "net.ipv6.conf.all.forwarding"),
    sysctl("net.ipv4.ip_local_port_range"),
  ]);
  const [low, high] = range.split(/\s+/).map(Number);
  return {
    machine,
    forwards: forwarding === "1",
    ephemeral: { low: low || 32_768, high: high || 60_999 },
  };
}

/** More questions than a walk ever asks: the kernel's answers lead to new ones only where a rule changes the packet. */
const MAX_ROUNDS = 12;

/** Every way that the packet may take, the ways with the same end side by side. One entry: the answer is certain. */
export async function ways(trace: Trace, question: Question): Promise<Way[][]> {
  let found: Way[] = [];
  for (let round = 0; round < MAX_ROUNDS; round++) {
    found = walkOnce(trace, question);
    if (!(await trace.machine.answer())) break;
  }
  return sameEnd(found);
}

function walkOnce({ rules, machine: { world }, forwards, ephemeral }: Trace, question: Question): Way[] {
  const { to, by, protocol, fromPort } = question;
  const address = addressNumber(to.address) ?? 0n;
  const family: Family = to.address.includes(":") ? 6 : 4;
  const sender = "sender" in by ? by.sender : undefined;
  const source = "from" in by ? addressNumber(by.from) : undefined;
  // A packet from outside comes in where the way back to its sender leads.
  const route = world.route({
    family,
    to: source ?? address,
    ...(sender === undefined ? {} : { uid: sender.uid }),
  });
  const anyPort = protocol === "icmp" ? span(0) : span(ephemeral.low, ephemeral.high);
  const port = fromPort === undefined ? anyPort : span(fromPort);
  const ends = {
    from: { address: source ?? route?.source ?? 0n, port },
    to: { address, port: span(to.port) },
  };
  const packet: Packet = {
    family,
    protocol,
    ...ends,
    original: ends,
    mark: 0n,
    ctMark: 0n,
    tracking: "not yet",
    settled: { source: false, destination: false },
    translated: { source: false, destination: false },
    in: source === undefined ? undefined : (route?.device ?? ""),
    out: source === undefined ? (route?.device ?? "") : undefined,
    sender,
    confirmed: false,
    proxied: undefined,
  };
  if (route?.refused !== undefined)
    return [{ packet, hops: [], end: { kind: "unroutable", why: route.refused }, because: [], assumed: [] }];
  return source === undefined ? walkOut(rules, world, packet) : walkIn(rules, world, packet, forwards);
}

/** What one end of the packet's way is, for people and for programs. */
export interface Ending {
  readonly verdict: string;
  readonly kind: "envoy" | "delivered" | "leaves" | "refused" | "dropped" | "queued" | "unroutable";
  /** Where it is in the end; its first destination if it never gets anywhere. */
  readonly destination: string;
  readonly hops: readonly HopLine[];
}

export interface TraceReport {
  readonly packet: string;
  /** One sentence; it begins with "may" if nobody but the kernel can know. */
  readonly verdict: string;
  /** Also where chance takes one of a balancer's targets: `ends` are all of them. */
  readonly certain: boolean;
  /** What is not known of the way, or what chooses between targets. */
  readonly because: readonly string[];
  readonly ends: readonly Ending[];
}

/** Walks one packet through everything in force. @throws {VmmeshError} RULES_PRIVILEGE */
export async function traceStatic(host: Reads, question: Question): Promise<TraceReport> {
  const family: Family = question.to.address.includes(":") ? 6 : 4;
  return report(question, await ways(await openTrace(host, family), question));
}

function report(question: Question, groups: readonly (readonly Way[])[]): TraceReport {
  const ends = groups.flatMap(([first]) => (first === undefined ? [] : [ending(first)]));
  const because = [...new Set(groups.flatMap((group) => group.flatMap((each) => each.because)))];
  const [first, ...others] = groups.flatMap(([each]) => (each === undefined ? [] : [each]));
  const balanced = isBalanced(groups);
  const certain = (ends.length === 1 || balanced) && !groups.some((group) => isCut(group));
  return {
    packet: packetText(question),
    verdict:
      certain && first !== undefined
        ? verdictOf(first, others)
        : `may go ${ends.length} ways: ${ends.map(({ verdict }) => verdict).join("; or ")}`,
    certain,
    because: certain && !balanced ? [] : because,
    ends,
  };
}

export function packetText({ protocol, by, to }: Question): string {
  const target = protocol === "icmp" ? to.address : `${bracketed(to.address)}:${to.port}`;
  return `${protocol} ${"sender" in by ? `of ${by.label}` : `from ${by.from}`} to ${target}`;
}

function ending(way: Way): Ending {
  const { packet, end } = way;
  const at = (address: bigint, port: Span): string => endpointText({ address, port }, packet.family);
  const kinds = {
    rejected: "refused",
    dropped: "dropped",
    queued: "queued",
    leaves: "leaves",
    unroutable: "unroutable",
  } as const;
  const envoy =
    end.kind === "delivered" &&
    end.listener !== undefined &&
    (end.port.low === BigInt(PORTS.outbound) || end.port.low === BigInt(PORTS.inbound));
  return {
    verdict: verdictOf(way),
    kind:
      end.kind === "delivered"
        ? envoy
          ? "envoy"
          : end.listener === undefined
            ? "refused"
            : "delivered"
        : kinds[end.kind],
    destination:
      end.kind === "delivered" ? at(packet.to.address, end.port) : at(packet.to.address, packet.to.port),
    hops: way.hops.map(hopLine),
  };
}
