import { bracketed } from "../core/net.ts";
import { PROBE_ADDRESS, RESOLV_CONF } from "../core/paths.ts";
import { capturedServers } from "../dns/resolvConf.ts";
import type { CaptureWish, Senders } from "../iptables/plan/wish.ts";
import { type CapturePlan, planCapture } from "../iptables/plan.ts";
import { parsePolicyRule } from "../iptables/policy.ts";
import { readMachine } from "../iptables/read.ts";
import type { OwnerNames, Workload } from "../mesh/types.ts";
import type { Host } from "../platform/host.ts";
import { unitPlace } from "../platform/units.ts";
import { idOf, type Owners } from "../platform/users.ts";
import { istiodTarget } from "./workloadFiles.ts";

/**
 * What is captured, and how it fails: the part of the wish that needs no user and no resolver.
 *
 * @throws {VmmeshError} USAGE for a failure policy that cannot be read
 */
export function policyScope(
  workload: Workload,
  net: Pick<Host["net"], "addresses">,
): Pick<
  CaptureWish,
  | "inbound"
  | "outbound"
  | "meshCidrs"
  | "ipv6"
  | "interception"
  | "excludeInterfaces"
  | "virtualInterfaces"
  | "dropInvalid"
  | "ruleComments"
  | "failurePolicy"
> {
  return {
    inbound:
      workload.inbound.kind === "all"
        ? { kind: "all", excludePorts: workload.inboundExcludePorts }
        : workload.inbound,
    outbound: {
      cidrs: workload.outboundCidrs,
      excludeCidrs: workload.outboundExcludeCidrs,
      excludePorts: workload.outboundExcludePorts,
      includePorts: workload.outboundPorts,
    },
    // With the probe's addresses, which are captured and fenced like a service's.
    meshCidrs: [...workload.meshCidrs, ...Object.values(PROBE_ADDRESS)],
    ipv6: net.addresses().some(({ family }) => family === 6),
    excludeInterfaces: workload.excludeInterfaces,
    virtualInterfaces: workload.virtualInterfaces,
    dropInvalid: workload.dropInvalid,
    ruleComments: workload.ruleComments,
    interception:
      workload.interception.mode === "TPROXY"
        ? { mode: "TPROXY", routeTable: workload.interception.routeTable }
        : { mode: "REDIRECT" },
    failurePolicy: workload.failurePolicy.map(parsePolicyRule),
  };
}

/**
 * Whose connections are captured, as numbers.
 *
 * @throws {VmmeshError} USAGE for a user, group or unit that does not exist
 */
export async function sendersOf(
  host: Pick<Host, "run" | "files">,
  { outboundOwners: { only, never } }: Pick<Workload, "outboundOwners">,
): Promise<NonNullable<CaptureWish["senders"]>> {
  const ids = async ({ users, groups, units }: OwnerNames): Promise<Senders> => ({
    uids: await Promise.all(users.map((name) => idOf(host, "user", name))),
    gids: await Promise.all(groups.map((name) => idOf(host, "group", name))),
    units: await Promise.all(units.map((name) => unitPlace(host, name))),
  });
  return { only: await ids(only), never: await ids(never) };
}

/** What is to be captured on this machine for this workload. */
export async function captureWish(host: Host, workload: Workload, owners: Owners): Promise<CaptureWish> {
  const target = await istiodTarget(host, workload, "");
  const servers = capturedServers((await host.files.readText(RESOLV_CONF)) ?? "");
  return {
    ...policyScope(workload, host.net),
    senders: await sendersOf(host, workload),
    agentUid: owners.agent.uid,
    envoyUid: owners.envoy.uid,
    sshPorts: [],
    dns: workload.dnsCapture ? { servers } : undefined,
    istiod: target.addresses.map((address) => `${bracketed(address)}:${target.port}`),
    keep: [],
  };
}

export async function planFor(host: Host, workload: Workload, owners: Owners): Promise<CapturePlan> {
  const [wish, machine] = await Promise.all([
    captureWish(host, workload, owners),
    readMachine(host, workload.backend),
  ]);
  return planCapture(wish, machine);
}

/** What `vmmesh status` says on capture. */
export function captureWords(workload: Workload): {
  inbound: string;
  outbound: string;
  failurePolicy: readonly string[];
} {
  const list = (items: readonly (string | number)[]): string =>
    items.length === 0 ? "nothing" : items.join(", ");
  const { inbound } = workload;
  return {
    failurePolicy: workload.failurePolicy,
    inbound:
      inbound.kind === "all"
        ? `all ports but ${list(workload.inboundExcludePorts)}`
        : `ports ${list(inbound.ports)}`,
    outbound: [
      workload.outboundCidrs[0] === "*"
        ? `everything${workload.outboundExcludeCidrs.length > 0 ? ` but ${list(workload.outboundExcludeCidrs)}` : ""}`
        : list([...workload.outboundCidrs, ...workload.outboundPorts.map((port) => `port ${port}`)]),
      ...ownerWords("only", workload.outboundOwners.only),
      ...ownerWords("never", workload.outboundOwners.never),
    ].join("; "),
  };
}

function ownerWords(which: string, { users, groups, units }: OwnerNames): string[] {
  const names = [
    ...users.map((name) => `user ${name}`),
    ...groups.map((name) => `group ${name}`),
    ...units.map((name) => `unit ${name}`),
  ];
  return names.length === 0 ? [] : [`${which} of ${names.join(", ")}`];
}
