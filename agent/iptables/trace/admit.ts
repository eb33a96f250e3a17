import { PORTS } from "../../core/paths.ts";
import type { ListeningSocket } from "../parse.ts";
import type { Family } from "../rules.ts";
import type { InputRules } from "./input.ts";
import type { World } from "./model.ts";
import { addressNumber, ITS_SOURCE, type Packet, span } from "./packet.ts";
import { type Assumption, isCut, type Way, walkInput } from "./walk.ts";
import { findSocket } from "./world.ts";

/** Where connections from outside arrive. */
export interface Door {
  readonly family: Family;
  readonly device: string;
  readonly address: string;
}

/** INPUT, and what its rules can ask of a machine beside the packet. */
export interface Place {
  readonly rules: InputRules["rules"];
  /** Each address of each interface to the outside. */
  readonly doors: readonly Door[];
  readonly listeners: readonly ListeningSocket[];
  readonly world: World;
}

/** Is a new TCP connection from outside let through INPUT, whoever sends it? */
export interface Admission {
  readonly answer: "yes" | "no" | "may";
  /** What would have to be known, if the answer is "may". */
  readonly because: readonly string[];
  readonly cases: readonly Case[];
  /** The tables whose rules or policies deny it to some: `iptables-nft filter`, `nft inet firewalld`. */
  readonly deniedBy: readonly string[];
}

/** What some senders meet. */
interface Case {
  /** undefined: nobody can say. */
  readonly admitted: boolean | undefined;
  readonly assumed: readonly Assumption[];
}

/** Interfaces of containers, pods and virtual machines. */
export const VIRTUAL = /^(docker|br-|cni|cali|cilium_|veth|virbr|podman|flannel|lxc|kube-bridge|weave)/;
/** Addresses of services, for this machine alone. */
const SERVICES = /^(kube-ipvs0|nodelocaldns|dummy)/;

export function placeOf(
  { rules, ipSets }: InputRules,
  addresses: readonly { readonly device: string; readonly address: string }[],
  listeners: readonly ListeningSocket[],
): Place {
  const own = new Map(addresses.map(({ device, address }) => [addressNumber(address), device] as const));
  const isLocal = (to: bigint, family: Family): boolean =>
    own.has(to) || (family === 4 ? to >> 24n === 127n : to === 1n);
  return {
    rules,
    listeners,
    doors: addresses
      .filter(({ device }) => device !== "lo" && !VIRTUAL.test(device) && !SERVICES.test(device))
      .filter(({ address }) => !address.startsWith("fe80:"))
      .map(({ device, address }) => ({ device, address, family: address.includes(":") ? 6 : 4 })),
    world: {
      route: ({ to, family }) => ({
        type: isLocal(to, family) ? "local" : "unicast",
        device: own.get(to) ?? "lo",
        source: undefined,
      }),
      addressOf: () => undefined,
      visibleAddress: () => undefined,
      socket: (_, family, address, port) => findSocket(listeners, family, address, port),
      recent: () => undefined,
      ipSets,
    },
  };
}

/**
 * Asks INPUT alone: what comes before it may have settled the port, and has set no mark.
 *
 * @param captured by REDIRECT: it arrives at the interface's first address, on Envoy's port
 */
export function admission(
  place: Place,
  door: Door,
  port: number,
  captured: "captured" | "as it is",
): Admission {
  const packet = arriving(place, door, port, captured === "captured");
  const ways = walkInput(place.rules[door.family], place.world, packet);
  const cases = ways.map(
    (way): Case => ({
      admitted: isOpen(way) ? undefined : way.end.kind === "delivered",
      assumed: way.assumed,
    }),
  );
  const answers = new Set(cases.map(({ admitted }) => admitted));
  const [only] = answers.size === 1 ? answers : [];
  return {
    answer: only === undefined ? "may" : only ? "yes" : "no",
    because: only === undefined ? [...new Set(ways.flatMap(reasons))] : [],
    cases,
    deniedBy: [...new Set(ways.flatMap(({ end }) => ("at" in end ? [end.at.chain.table] : [])))],
  };
}

/** A program decides, or there were too many ways to follow all. */
const isOpen = (way: Way): boolean => way.end.kind === "queued" || isCut([way]);

const reasons = ({ because, end }: Way): readonly string[] =>
  end.kind === "queued"
    ? [...because, `what the program decides (in \`${end.at.rule?.text ?? ""}\`)`]
    : because;

function arriving(place: Place, { family, device, address }: Door, port: number, captured: boolean): Packet {
  const from = { address: 0n, port: span(1024, 65_535) };
  const to = { address: addressNumber(address) ?? 0n, port: span(port) };
  const first = place.doors.find((door) => door.device === device && door.family === family);
  const envoy = { address: addressNumber(first?.address ?? address) ?? 0n, port: span(PORTS.inbound) };
  return {
    family,
    protocol: "tcp",
    from,
    to: captured ? envoy : to,
    original: { from, to },
    mark: 0n,
    ctMark: 0n,
    tracking: "tracked",
    settled: { source: false, destination: true },
    translated: { source: false, destination: captured },
    in: device,
    out: undefined,
    sender: undefined,
    confirmed: false,
    proxied: undefined,
    fromAnywhere: true,
  };
}

/** What capture by REDIRECT changes about what a firewall lets in. */
export interface Difference {
  readonly plain: Admission;
  readonly captured: Admission;
  readonly effect: "opens" | "shuts" | "opens or shuts";
  /** For all senders, or for those that one rule names; else it may be that no sender is of that kind. */
  readonly certain: boolean;
  /** What it depends on; empty: the same for every sender. */
  readonly because: readonly string[];
}

/** @returns undefined if each sender meets the same, captured or not */
export function difference(place: Place, door: Door, port: number): Difference | undefined {
  const plain = admission(place, door, port, "as it is");
  const captured = admission(place, door, port, "captured");
  const met = new Set(plain.cases.flatMap((one) => captured.cases.map((two) => meets(one, two))));
  const opens = met.has("opens") || met.has("may open");
  const shuts = met.has("shuts") || met.has("may shut");
  if (!opens && !shuts && !met.has("may")) return undefined;
  return {
    plain,
    captured,
    effect: opens === shuts ? "opens or shuts" : opens ? "opens" : "shuts",
    certain: met.has("opens") || met.has("shuts"),
    because: [...new Set([...plain.because, ...captured.because])],
  };
}

/** A rule that asks only who sends, or how much has been sent, says the same to both. */
const OF_THE_SENDER = [ITS_SOURCE, "how many packets came before"];
type Met = "alike" | "opens" | "shuts" | "may open" | "may shut" | "may";

/** A sender of both kinds; "alike" if there can be none. */
function meets(plain: Case, captured: Case): Met {
  if (plain.admitted === captured.admitted && plain.admitted !== undefined) return "alike";
  const choices = new Map<string, Assumption>();
  for (const each of [...plain.assumed, ...captured.assumed]) {
    const ofSender = OF_THE_SENDER.some((reason) => each.why.startsWith(reason));
    // What is no question of the sender may be answered otherwise the second time.
    const key = ofSender ? each.question : `${choices.size}`;
    const other = choices.get(key);
    if (other !== undefined && other.choice !== each.choice) return "alike";
    choices.set(key, each);
  }
  if (plain.admitted === undefined || captured.admitted === undefined) return "may";
  // Two rules may name networks that have no address in common; a question of something else is open.
  const certain = [...choices.values()].every(({ why }) => why.startsWith(ITS_SOURCE)) && choices.size < 2;
  if (captured.admitted) return certain ? "opens" : "may open";
  return certain ? "shuts" : "may shut";
}
