import { VmmeshError } from "../core/errors.ts";
import type { ParsedTable } from "./parse.ts";
import type { Backend, BackendWish } from "./plan/wish.ts";

/** What one backend of iptables holds at the moment. */
export interface BackendEvidence {
  /** Its program is there, and can read the kernel's tables. */
  readonly installed: boolean;
  /** Name of the program for IPv4. */
  readonly program?: string;
  /** Why a program that is there cannot be used. */
  readonly fault?: string;
  /** Rules (`-A`), not chains: others' detectors leave empty tables behind. */
  readonly rules: number;
  readonly natRules: number;
  readonly kubernetes: boolean;
}

/** Pure. @param tables undefined: the program is not installed, or cannot be used */
export function evidenceOf(tables: readonly ParsedTable[] | undefined): BackendEvidence {
  if (tables === undefined) return { installed: false, rules: 0, natRules: 0, kubernetes: false };
  const chains = tables.flatMap((table) => [...table.chains.keys()]);
  return {
    installed: true,
    rules: tables.reduce((sum, table) => sum + table.rules.length, 0),
    natRules: tables.find((table) => table.name === "nat")?.rules.length ?? 0,
    kubernetes: chains.some((chain) =>
      ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-SERVICES"].includes(chain),
    ),
  };
}

export interface BackendFacts {
  readonly nft: BackendEvidence;
  readonly legacy: BackendEvidence;
  /** What the plain `iptables` says of itself; undefined: there is none. */
  readonly plainIs: Backend | undefined;
  /** The kernel takes tables like the guard. */
  readonly nftables: boolean;
  /** What nft says where it does not; undefined: there is no nft. */
  readonly fault?: string;
}

/**
 * The backend to write to, and why, in words; `backend: undefined` is nftables, tables of our own alone. Pure.
 *
 * @throws {VmmeshError} RULES_REJECTED if the one that was asked for cannot work here
 */
export function settleBackend(
  wished: BackendWish,
  facts: BackendFacts,
): { backend: Backend | undefined; why: string } {
  if (wished === "auto") return chooseBackend(facts.nft, facts.legacy, facts.plainIs);
  const backend = wished === "nftables" ? undefined : wished;
  const { installed, fault } =
    backend === undefined ? { installed: facts.nftables, fault: facts.fault } : facts[backend];
  if (installed) return { backend, why: "it was asked for" };
  const needs = backend === undefined ? "nft" : `iptables-${backend}`;
  throw new VmmeshError(
    "RULES_REJECTED",
    `the backend ${wished} cannot work here: ${fault === undefined ? `there is no program \`${needs}\`` : `\`${needs}\` cannot use this kernel`}`,
    {
      ...(fault === undefined ? {} : { cause: new Error(fault) }),
      next: `${fault === undefined ? `Install the package \`${backend === undefined ? "nftables" : "iptables"}\`` : "Load the kernel modules that are missing"}, or leave the choice to vmmesh: --backend auto (VMMESH_BACKEND in sidecar.env).`,
    },
  );
}

/** The one that the machine really uses. */
function chooseBackend(
  nft: BackendEvidence,
  legacy: BackendEvidence,
  plainIs: Backend | undefined,
): { backend: Backend | undefined; why: string } {
  if (!nft.installed && !legacy.installed)
    return { backend: undefined, why: "there is no iptables that can be used" };
  if (!legacy.installed) return { backend: "nft", why: "the only one there is" };
  if (!nft.installed) return { backend: "legacy", why: "the only one there is" };
  if (nft.kubernetes !== legacy.kubernetes) {
    return { backend: nft.kubernetes ? "nft" : "legacy", why: "Kubernetes keeps its rules there" };
  }
  if (nft.natRules > 0 && legacy.natRules > 0)
    return { backend: "nft", why: "both backends hold nat rules: nft, with the guard ahead of both" };
  if (nft.rules !== legacy.rules) {
    return {
      backend: nft.rules > legacy.rules ? "nft" : "legacy",
      why: "the machine's other rules are there",
    };
  }
  return {
    backend: plainIs ?? "nft",
    why: "iptables-legacy holds no more rules, and this is what `iptables` means here",
  };
}

/**
 * Can the rules that nft holds, however many, change the choice? Reading 50,000 of them takes seconds, and on most machines
 * legacy is empty and `iptables` means nft. Pure.
 */
export function nftRulesMatter(legacy: BackendEvidence, plainIs: Backend | undefined): boolean {
  return legacy.installed && (plainIs !== "nft" || legacy.rules > 0 || legacy.kubernetes);
}
