import type { BackendEvidence } from "../backend.ts";
import type { GenerationFile } from "../generation.ts";
import type { BaseChain, ListeningSocket, ParsedTable } from "../parse.ts";
import type { Backend } from "../plan/wish.ts";
import type { SeenTable } from "../read.ts";
import type { Family } from "../rules.ts";
import type { InputRules } from "../trace/input.ts";

/** What one `ip[6]tables-BACKEND-save` printed. */
export interface Save {
  readonly backend: Backend;
  readonly family: Family;
  readonly tables: readonly ParsedTable[];
  /** What the program says that it cannot show, one line each. */
  readonly complaints: readonly string[];
}

/** A systemd unit as `systemctl show` has it. */
export interface Unit {
  readonly id: string;
  readonly active: boolean;
  readonly enabled: boolean;
  readonly after: readonly string[];
}

/** The machine beside its rules. */
export interface Surroundings {
  readonly interfaces: readonly string[];
  readonly addresses: readonly { readonly device: string; readonly address: string }[];
  readonly forwards: boolean;
  /** Programs on connect(2) of a cgroup, and what gives away that there are some. */
  readonly socketPrograms: readonly string[];
  /** Ports that kube-proxy publishes in its own nft table. */
  readonly nftNodePorts: readonly number[];
  /** Text of /proc/self/uid_map. */
  readonly uidMap: string;
  readonly units: readonly Unit[];
  /** Configuration of other firewall programs, by path; what is not there is missing. */
  readonly config: Readonly<Record<string, string>>;
  readonly firewalldVersion: string | undefined;
  /** One entry for each run that mended something in the last ten minutes: what it said. */
  readonly repairs: readonly (readonly string[])[];
  /** iptables-legacy: how long reading took, and processes whose lock is another file. */
  readonly lock: { readonly waitedMs: number; readonly strangers: readonly string[] };
  /** Lines of `ip rule`, both families. */
  readonly routingRules: readonly string[];
  /** Entries, room, and packets lost while the audit looked. */
  readonly conntrack: { readonly count: number; readonly max: number; readonly lost: number };
  /** Lines of established TCP flows, as /proc/net/nf_conntrack has them. */
  readonly flows: readonly string[];
  /** Uid by local port of open TCP sockets. */
  readonly socketOwners: ReadonlyMap<number, number>;
}

/** All that `judge` may know. Gathered without writing anything. */
export interface Evidence {
  /** Why the firewall cannot be read; the rest is empty then. */
  readonly noPrivilege: string | undefined;
  /** The confirmed generation; undefined: nothing is supposed to be in force. */
  readonly confirmed: Pick<GenerationFile, "plan" | "printed" | "nft"> | undefined;
  /** A trial whose time is over but which nobody took back. */
  readonly overdueTrial: boolean;
  readonly tables: readonly SeenTable[];
  /** ISTIO_* and VMMESH_* chains that are there while nothing is supposed to be. */
  readonly strayRules: readonly string[];
  /** Our nft tables as printed now. */
  readonly nftNow: Readonly<Record<string, string | undefined>>;
  readonly baseChains: readonly BaseChain[];
  readonly saves: readonly Save[];
  /** nft tables that are listed but not in force. */
  readonly dormant: readonly string[];
  readonly around: Surroundings;
  readonly backends: { readonly nft: BackendEvidence; readonly legacy: BackendEvidence };
  readonly legacyTables: readonly string[];
  readonly input: InputRules;
  readonly listeners: readonly ListeningSocket[];
  readonly udpListeners: readonly ListeningSocket[];
  readonly processes: readonly { readonly pid: number; readonly uid: number; readonly name: string }[];
  readonly sshPorts: readonly number[];
  readonly ipv6Default: boolean;
  readonly persisted: readonly { readonly file: string; readonly line: number; readonly text: string }[];
  /** What iptables-restore --test or nft --check says to our own rules; undefined: they are accepted. */
  readonly refusal: string | undefined;
  readonly traces: readonly string[];
  /** What is missing of the way back of TPROXY, one sentence each. */
  readonly routing: readonly string[];
}
