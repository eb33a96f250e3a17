import { VmmeshError } from "../core/errors.ts";
import { zoneRules } from "./plan/dns.ts";
import { neverCaptured } from "./plan/exemptions.ts";
import { checkFailurePolicy, describeFailures } from "./plan/failure.ts";
import { fenceRules } from "./plan/fence.ts";
import { invalidRules } from "./plan/invalid.ts";
import { leaseRules } from "./plan/lease.ts";
import { natRules } from "./plan/nat.ts";
import { checkScope, chosenUnits } from "./plan/senders.ts";
import { unique } from "./plan/terms.ts";
import { tproxies, tproxyRules } from "./plan/tproxy.ts";
import { virtualHooks, virtualRules } from "./plan/virtual.ts";
import {
  type Backend,
  type CaptureWish,
  check,
  fitsInterface,
  type MachineFacts,
  type UnitCgroup,
} from "./plan/wish.ts";
import type { Family, FenceRule, Rule, UnitList } from "./rules.ts";

export interface FamilyPlan {
  readonly family: Family;
  /** In order within each table and chain. */
  readonly rules: readonly Rule[];
}

/** Everything that will be in force, as data; it is kept in rulesDir and read back by repair, removal and audit. */
export interface CapturePlan {
  readonly version: 1;
  readonly backend: Backend | undefined;
  /** Why this one, in words. */
  readonly backendWhy: string;
  readonly programs: Readonly<Record<Family, string | undefined>>;
  readonly families: readonly FamilyPlan[];
  /** TPROXY: where the answers of the application are turned back to Envoy (`routing.ts`). */
  readonly routeTable?: number;
  readonly guard: boolean;
  /** Empty: no fence. */
  readonly fence: readonly FenceRule[];
  readonly envoyUid: number;
  readonly agentUid: number;
  readonly inboundPorts: readonly number[] | "all";
  readonly sshPorts: readonly number[];
  /** Whose port 53 is captured; undefined: nobody's. */
  readonly resolvers?: readonly string[];
  /** The rules carry no reasons; what is ours is known by the record alone. */
  readonly comments?: false;
  /** Systemd units by which capture chooses; undefined: by none. */
  readonly units?: readonly (UnitCgroup & { readonly list: UnitList })[] | undefined;
  /** The failure policy in words. */
  readonly failures: readonly string[];
  /** Sentences for a person: what this machine cannot have, and why. */
  readonly notes: readonly string[];
}

/**
 * The rules for this wish on this machine. Pure.
 *
 * @throws {VmmeshError} USAGE for an address, port or uid that is none; RULES_REJECTED if the machine has neither iptables nor nft
 */
export function planCapture(wish: CaptureWish, machine: MachineFacts): CapturePlan {
  check(wish);
  checkScope(wish);
  if (machine.backend === undefined && !machine.nft) {
    throw new VmmeshError("RULES_REJECTED", "neither iptables nor nft works on this machine", {
      next: "Install the package `iptables` (or `nftables`), and see that the kernel has netfilter; then join again.",
    });
  }
  const units = chosenUnits(wish);
  if (units !== undefined && !machine.nft) {
    throw new VmmeshError(
      "RULES_REJECTED",
      "capture by systemd unit needs nf_tables, which is not usable here",
      {
        next: "Install the package `nftables`, or choose by user: --include-outbound-user, --exclude-outbound-user.",
      },
    );
  }
  if (units !== undefined && machine.backendAsked === true && machine.backend !== undefined) {
    throw new VmmeshError(
      "USAGE",
      `capture by systemd unit and the backend ${machine.backend} exclude each other: iptables cannot follow a unit through a restart`,
      { next: "Take --backend nftables or auto (VMMESH_BACKEND in sidecar.env), or choose no unit." },
    );
  }
  const notes: string[] = [];
  if (units !== undefined)
    notes.push(
      "units are chosen, and iptables cannot follow one through a restart: the guard captures alone",
    );
  if (!machine.nft) {
    notes.push(
      "nf_tables is not usable here: guard and fence are left out, only the order of the iptables rules protects capture",
    );
  }
  if (machine.backend !== undefined && wish.ipv6 && machine.ipv6 && machine.programs[6] === undefined) {
    notes.push(
      machine.nft
        ? "ip6tables is missing: the guard table captures IPv6 alone"
        : "ip6tables is missing: IPv6 traffic is not captured",
    );
  }
  for (const name of unique([...(wish.excludeInterfaces ?? []), ...(wish.virtualInterfaces ?? [])])) {
    if (machine.interfaces?.some((there) => fitsInterface(name, there)) === false)
      notes.push(`there is no interface ${name} now; its rules wait for it`);
  }
  const sshPorts = unique([...wish.sshPorts, ...machine.sshPorts]);
  const settled: CaptureWish = { ...wish, sshPorts, ipv6: wish.ipv6 && machine.ipv6 };
  checkFailurePolicy(settled);
  const families: Family[] = settled.ipv6 ? [4, 6] : [4];
  const inboundPorts =
    wish.inbound.kind === "all"
      ? ("all" as const)
      : unique(wish.inbound.ports).filter((port) => !neverCaptured(settled).includes(port));
  return {
    version: 1,
    // A redirect there would take what the guard lets go.
    backend: units === undefined ? machine.backend : undefined,
    backendWhy: units === undefined ? machine.backendWhy : "units are chosen",
    ...(units === undefined ? {} : { units }),
    ...(wish.dns === undefined ? {} : { resolvers: wish.dns.servers }),
    ...(wish.ruleComments === false ? { comments: false as const } : {}),
    programs: machine.programs,
    families: families.map((family) => ({
      family,
      rules: [
        ...zoneRules(settled, family),
        ...leaseRules(settled, family),
        ...invalidRules(settled),
        ...tproxyRules(settled, machine.nft),
        ...virtualRules(settled, family),
        ...natRules(settled, family, machine.nft),
        ...virtualHooks(settled, family),
      ],
    })),
    ...(wish.interception?.mode === "TPROXY" && tproxies(settled)
      ? { routeTable: wish.interception.routeTable }
      : {}),
    guard: machine.nft,
    fence: machine.nft ? fenceRules(settled) : [],
    envoyUid: wish.envoyUid,
    agentUid: wish.agentUid,
    inboundPorts,
    sshPorts,
    failures: describeFailures(settled),
    notes,
  };
}
