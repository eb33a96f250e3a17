import { PORTS } from "../../core/paths.ts";
import type { ListeningSocket } from "../parse.ts";
import type { Family } from "../rules.ts";
import type { InputRules } from "./input.ts";
import type { World } from "./model.ts";
import { addressNumber, ITS_SOURCE, type Packet, span } from "./packet.ts";
import { type Assumption, assumptionKey, type Way, walkInput } from "./walk.ts";
import { findSocket } from "./world.ts";

/** Where connections from outside arrive. */
export interface Door {
  readonly family: Family;
  readonly device: string;
  readonly address: string;
}

/** INPUT, and what its rules can ask of a machine beside the packet. */
export interface Place {
  readonly addresses: readonly { readonly device: string; readonly address: string }[];
  readonly listeners: readonly ListeningSocket[];
  readonly input: InputRules;
}

/** Is a new TCP connection from outside let through INPUT, whoever sends it? */
export interface Admission {
  readonly answer: "yes" | "no" | "may";
  /** What would have to be known, if the answer is "may". */
  readonly because: readonly string[];
  readonly assumed: readonly Assumption[];
  /** The tables whose rules or policies deny it to some: `iptables-nft filter`, `nft inet firewalld`. */
  readonly deniedBy: readonly string[];
}

/** Interfaces of containers, pods and virtual machines. */
export const VIRTUAL = /^(docker|br-|cni|cali|cilium_|veth|virbr|podman|flannel|lxc|kube-bridge|weave)/;
/** Addresses of services, for this machine alone. */
const SERVICES = /^(kube-ipvs0|nodelocaldns|dummy)/;

/** Each address of each interface to the outside. */
export function doorsOf(addresses: Place["addresses"]): Door[] {
  return addresses
    .filter(({ device }) => device !== "lo" && !VIRTUAL.test(device) && !SERVICES.test(device))
    .filter(({ address }) => !address.startsWith("fe80:"))
    .map(({ device, address }) => ({ device, address, family: address.includes(":") ? 6 : 4 }));
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
  const admitted = under(place, door, port, captured, new Map());
  if (admitted === undefined) throw new Error("without an assumption every packet has a way");
  return admitted;
}

/** @returns undefined: there is no such choice */
function under(
  place: Place,
  door: Door,
  port: number,
  captured: "captured" | "as it is",
  assumed: ReadonlyMap<string, number>,
): Admission | undefined {
  const packet = arriving(place, door, port, captured === "captured");
  const ways = walkInput(place.input.rules[door.family], { ...worldOf(place), assumed }, packet);
  if (ways.length === 0) return undefined;
  const because = [...new Set([...ways.flatMap((way) => way.because), ...ways.flatMap(decidedElsewhere)])];
  const admits = new Set(ways.map(({ end }) => end.kind === "delivered"));
  const certain = admits.size === 1 && !because.some((why) => OPEN.test(why));
  return {
    answer: certain ? (admits.has(true) ? "yes" : "no") : "may",
    because: certain ? [] : because,
    assumed: ways.flatMap((way) => way.assumed),
    deniedBy: [...new Set(ways.flatMap(({ end }) => ("at" in end ? [end.at.chain.table] : [])))],
  };
}

const decidedElsewhere = ({ end }: Way): string[] =>
  end.kind === "queued" ? [`what the program decides (in \`${end.at.rule?.text ?? ""}\`)`] : [];
/** Reasons that leave the answer open whatever the ways say. */
const OPEN = /^(there are more than|what the program decides)/;

function arriving(place: Place, { family, device, address }: Door, port: number, captured: boolean): Packet {
  const from = { address: 0n, port: span(1024, 65_535) };
  const to = { address: addressNumber(address) ?? 0n, port: span(port) };
  const first = doorsOf(place.addresses).find((door) => door.device === device && door.family === family);
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

function worldOf({ addresses, listeners, input: { ipSets } }: Place): World {
  const own = new Map(addresses.map(({ device, address }) => [addressNumber(address), device] as const));
  const local = (to: bigint, family: Family): boolean =>
    own.has(to) || (family === 4 ? to >> 24n === 127n : to === 1n);
  return {
    route: ({ to, family }) => ({
      type: local(to, family) ? "local" : "unicast",
      device: own.get(to) ?? "lo",
      source: undefined,
    }),
    addressOf: () => undefined,
    visibleAddress: () => undefined,
    socket: (_, family, address, port) => findSocket(listeners, family, address, port),
    recent: () => undefined,
    ipSets,
  };
}

/** What capture by REDIRECT changes about what a firewall lets in. */
export interface Difference {
  readonly plain: Admission;
  readonly captured: Admission;
  readonly effect: "opens" | "shuts" | "opens or shuts";
  /** For some senders at least; else nobody here can say. */
  readonly certain: boolean;
  /** What it depends on; empty: the same for every sender. */
  readonly because: readonly string[];
}

/** @returns undefined if each sender meets the same, captured or not */
export function difference(place: Place, door: Door, port: number): Difference | undefined {
  const plain = admission(place, door, port, "as it is");
  const captured = admission(place, door, port, "captured");
  const met = kinds(place, door, port);
  const opens = met.has("opens");
  const shuts = met.has("shuts");
  if (!opens && !shuts && !met.has("may")) return undefined;
  return {
    plain,
    captured,
    effect: opens === shuts ? "opens or shuts" : opens ? "opens" : "shuts",
    certain: opens || shuts,
    because: [...new Set([...plain.because, ...captured.because])],
  };
}

/** A rule that asks only who sends, or how much has been sent, says the same to both. */
const OF_THE_SENDER = [ITS_SOURCE, "how many packets came before"];
/** More kinds of senders than a firewall has that a person wrote. */
const MAX_WALKS = 128;

/** What each kind of sender meets. */
function kinds(place: Place, door: Door, port: number): Set<"alike" | "opens" | "shuts" | "may"> {
  const met = new Set<"alike" | "opens" | "shuts" | "may">();
  const open: { readonly assumed: ReadonlyMap<string, number>; readonly last?: string }[] = [
    { assumed: new Map() },
  ];
  for (let walks = 0; walks < MAX_WALKS; walks++) {
    const next = open.pop();
    if (next === undefined) return met;
    const { assumed, last } = next;
    const plain = under(place, door, port, "as it is", assumed);
    const captured = under(place, door, port, "captured", assumed);
    // The rule has no such choice: it had one less.
    if (plain === undefined || captured === undefined) continue;
    if (last !== undefined)
      open.push({ assumed: new Map(assumed).set(last, (assumed.get(last) ?? 0) + 1), last });
    const asked = [...plain.assumed, ...captured.assumed].find(({ why }) =>
      OF_THE_SENDER.some((reason) => why.startsWith(reason)),
    );
    if (plain.answer !== "may" && captured.answer !== "may")
      met.add(plain.answer === captured.answer ? "alike" : plain.answer === "no" ? "opens" : "shuts");
    else if (asked === undefined) met.add("may");
    else {
      const key = assumptionKey(asked);
      open.push({ assumed: new Map(assumed).set(key, 0), last: key });
    }
  }
  return met.add("may");
}
