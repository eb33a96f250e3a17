import { PORTS } from "../../core/paths.ts";
import type { ListeningSocket } from "../parse.ts";
import type { Family } from "../rules.ts";
import type { InputRules } from "./input.ts";
import type { World } from "./model.ts";
import { addressNumber, ITS_SOURCE, type Packet, span } from "./packet.ts";
import { type Assumption, type Way, walkInput } from "./walk.ts";
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
  readonly cases: readonly { readonly admitted: boolean; readonly assumed: readonly Assumption[] }[];
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
 * Asks INPUT alone: what comes before it may have settled the port.
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
  const ways = walkInput(place.input.rules[door.family], worldOf(place), packet);
  const cases = ways.map(({ end, assumed }) => ({ admitted: end.kind === "delivered", assumed }));
  const because = [...new Set([...ways.flatMap((way) => way.because), ...ways.flatMap(decidedElsewhere)])];
  const [first, ...others] = cases;
  const certain =
    others.every(({ admitted }) => admitted === first?.admitted) && !because.some((why) => OPEN.test(why));
  return {
    answer: certain ? (first?.admitted === true ? "yes" : "no") : "may",
    because: certain ? [] : because,
    cases,
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

/** What capture by REDIRECT changes about what a firewall lets in; with `may`: what would have to be known. */
export interface Difference {
  readonly effect: "opens" | "shuts" | "opens or shuts";
  readonly may: readonly string[];
}

/** @returns undefined if each sender meets the same, captured or not */
export function difference(plain: Admission, captured: Admission): Difference | undefined {
  const met = plain.cases.flatMap((one) =>
    captured.cases.filter((two) => canBeBoth(one.assumed, two.assumed)).map((two) => [one, two] as const),
  );
  const opens = met.some(([one, two]) => !one.admitted && two.admitted);
  const shuts = met.some(([one, two]) => one.admitted && !two.admitted);
  const may = [...new Set([...plain.because, ...captured.because])];
  const open = may.some((why) => OPEN.test(why));
  if (!opens && !shuts && !open) return undefined;
  return { effect: opens === shuts ? "opens or shuts" : opens ? "opens" : "shuts", may };
}

/** A rule that asks only who sends, or how much has been sent, says the same to both. */
const OF_THE_SENDER = [ITS_SOURCE, "how many packets came before"];

function canBeBoth(one: readonly Assumption[], two: readonly Assumption[]): boolean {
  return !one.some(({ why, choice }) =>
    two.some(
      (other) =>
        other.why === why &&
        other.choice !== choice &&
        OF_THE_SENDER.some((reason) => why.startsWith(reason)),
    ),
  );
}
