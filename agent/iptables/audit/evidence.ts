import type { GenerationFile } from "../apply.ts";
import type { BaseChain, ListeningSocket, ParsedRule } from "../parse.ts";
import type { BackendEvidence, SeenTable } from "../read.ts";

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
  readonly backends: { readonly nft: BackendEvidence; readonly legacy: BackendEvidence };
  readonly legacyTables: readonly string[];
  /** Chain INPUT of table filter with the chains that it jumps to. */
  readonly input: { readonly policy: string; readonly chains: ReadonlyMap<string, readonly ParsedRule[]> };
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
