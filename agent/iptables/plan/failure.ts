import { VmmeshError } from "../../core/errors.ts";
import {
  bySpecificity,
  type Failure,
  formatPolicyRule,
  inside,
  type PolicyRule,
  samePlace,
} from "../policy.ts";
import { type Family, type Match, TCP } from "../rules.ts";
import { neverCaptured } from "./exemptions.ts";
import { of, portGroups, to, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** Captured connections that fail alike. The first one that fits a connection decides. */
export interface Outbound {
  /** `*`: everything. */
  readonly to: string;
  readonly port: number | undefined;
  readonly failure: Failure;
  /** A place of the mesh: captured also where its address is local. */
  readonly mesh: boolean;
  /** A wider one that is closed follows: what this one lets go must not meet it. */
  readonly beforeClosed: boolean;
}

export interface Inbound {
  /** undefined: every port but those before it. */
  readonly ports: readonly number[] | undefined;
  readonly failure: Failure;
}

type Wish = Pick<CaptureWish, "inbound" | "outbound" | "meshCidrs" | "sshPorts" | "ipv6" | "failurePolicy">;

/** Mesh destinations are closed and the rest is open, unless a rule as specific says otherwise. */
function outboundRules(wish: Wish): PolicyRule[] {
  const said = (wish.failurePolicy ?? []).filter(({ direction }) => direction === "outbound");
  const defaults: PolicyRule[] = [
    ...wish.meshCidrs.map((cidr): PolicyRule => outbound(cidr, "closed")),
    outbound("*", "open"),
  ];
  return [...said, ...defaults.filter((rule) => !said.some((own) => samePlace(own, rule)))].sort(
    bySpecificity,
  );
}

function outbound(cidr: string, failure: Failure): PolicyRule {
  return { direction: "outbound", to: cidr, port: undefined, failure };
}

/** What is captured outbound in this family and how it fails, the most specific first; mesh places first of all. */
export function outboundFailures(wish: Wish, family: Family): Outbound[] {
  const mesh = of(wish.meshCidrs, family);
  const captured = [
    ...mesh,
    ...(wish.outbound.cidrs.includes("*") ? ["*"] : of(wish.outbound.cidrs, family)),
  ];
  const cells: Omit<Outbound, "beforeClosed">[] = [];
  for (const rule of outboundRules(wish)) {
    const place = rule.to === "*" ? "*" : of([rule.to], family)[0];
    if (place === undefined) continue;
    for (const whole of captured) {
      const common = inside(place, whole) ? place : inside(whole, place) ? whole : undefined;
      if (common === undefined) continue;
      const decided = cells.some(
        (cell) => (cell.port === undefined || cell.port === rule.port) && inside(common, cell.to),
      );
      if (decided) continue;
      cells.push({
        to: common,
        port: rule.port,
        failure: rule.failure,
        mesh: mesh.some((cidr) => inside(common, cidr)),
      });
    }
  }
  const ports = unique(wish.outbound.includePorts ?? []);
  for (const rule of outboundRules(wish)) {
    const place = rule.to === "*" ? "*" : of([rule.to], family)[0];
    if (place === undefined) continue;
    for (const port of ports) {
      if (rule.port !== undefined && rule.port !== port) continue;
      const decided = cells.some(
        (cell) => (cell.port === undefined || cell.port === port) && inside(place, cell.to),
      );
      if (!decided) cells.push({ to: place, port, failure: rule.failure, mesh: false });
    }
  }
  const sorted = [...cells.filter((cell) => cell.mesh), ...cells.filter((cell) => !cell.mesh)];
  return sorted.map((cell, index) => ({
    ...cell,
    beforeClosed: sorted
      .slice(index + 1)
      .some(
        (later) => later.failure === "closed" && (inside(cell.to, later.to) || inside(later.to, cell.to)),
      ),
  }));
}

/** TCP to destination and port of a cell. */
export function outboundMatches({ to: place, port }: Pick<Outbound, "to" | "port">): Match[] {
  return [
    ...(place === "*" ? [] : [to(place)]),
    TCP,
    ...(port === undefined ? [] : [{ is: "toPorts", ports: [port] } as const]),
  ];
}

/** Captured ports by how they fail; the first that fits decides. */
export function inboundFailures(wish: Wish): Inbound[] {
  const said = (wish.failurePolicy ?? []).filter(({ direction }) => direction === "inbound");
  const whole =
    said.find(({ port }) => port === undefined)?.failure ?? (wish.inbound.kind === "all" ? "open" : "closed");
  const failureOf = (port: number): Failure => said.find((rule) => rule.port === port)?.failure ?? whole;
  const never = neverCaptured(wish);
  if (wish.inbound.kind === "all") {
    const others = said.filter(({ port, failure }) => port !== undefined && failure !== whole);
    const ports = unique(others.flatMap(({ port }) => (port === undefined ? [] : [port])));
    return [
      ...(ports.length === 0 ? [] : [{ ports, failure: whole === "open" ? "closed" : "open" } as const]),
      { ports: undefined, failure: whole },
    ];
  }
  const ports = unique(wish.inbound.ports).filter((port) => !never.includes(port));
  return (["closed", "open"] as const)
    .map((failure) => ({ ports: ports.filter((port) => failureOf(port) === failure), failure }))
    .filter((cell) => cell.ports.length > 0);
}

/** Ports of a cell as matches, one list for each group that one rule can hold. */
export function portMatches({ ports }: Inbound): Match[][] {
  return ports === undefined ? [[]] : portGroups(ports).map((group) => [{ is: "toPorts", ports: group }]);
}

/** Does anything at all go direct while Envoy does not answer? */
export function anyOpen(wish: Wish, family: Family): boolean {
  return [...outboundFailures(wish, family), ...inboundFailures(wish)].some(
    ({ failure }) => failure === "open",
  );
}

/**
 * @throws {VmmeshError} USAGE for two rules that contradict each other, and for one that can never apply
 */
export function checkFailurePolicy(wish: Wish): void {
  const policy = wish.failurePolicy ?? [];
  for (const [index, rule] of policy.entries()) {
    const other = policy.slice(0, index).find((it) => samePlace(it, rule) && it.failure !== rule.failure);
    if (other !== undefined)
      throw refused(rule, `it contradicts ${formatPolicyRule(other)}`, "Leave one of the two out.");
    if (rule.direction === "inbound") checkInbound(rule, wish);
    else checkOutbound(rule, wish);
  }
}

function checkInbound(rule: PolicyRule, wish: Wish): void {
  const { port } = rule;
  if (port === undefined) return;
  const { inbound } = wish;
  if (neverCaptured(wish).includes(port))
    throw refused(rule, `port ${port} never goes through Envoy`, "Leave it out.");
  const captured =
    inbound.kind === "all" ? !inbound.excludePorts.includes(port) : inbound.ports.includes(port);
  if (!captured)
    throw refused(
      rule,
      `port ${port} is not captured`,
      inbound.kind === "all"
        ? "Take the port out of the excluded ones, or leave the rule out."
        : "Declare the port in the WorkloadGroup (ISTIO_INBOUND_PORTS in sidecar.env), or leave the rule out.",
    );
}

function checkOutbound(rule: PolicyRule, wish: Wish): void {
  const { excludeCidrs, excludePorts, cidrs } = wish.outbound;
  const excluded = excludeCidrs.find((cidr) => inside(rule.to, cidr));
  if (excluded !== undefined)
    throw refused(rule, `${excluded} is excluded from capture`, "Leave one of the two out.");
  if (rule.port !== undefined && excludePorts.includes(rule.port))
    throw refused(rule, `port ${rule.port} is excluded from capture`, "Leave one of the two out.");
  if (!wish.ipv6 && rule.to.includes(":"))
    throw refused(rule, "this machine has no IPv6 that is captured", "Leave it out.");
  const captured = [...wish.meshCidrs, ...cidrs];
  const everywhere = wish.outbound.includePorts ?? [];
  if (rule.port === undefined ? everywhere.length > 0 : everywhere.includes(rule.port)) return;
  if (!captured.some((whole) => inside(rule.to, whole) || inside(whole, rule.to)))
    throw refused(
      rule,
      "nothing of it is captured",
      "Capture it (ISTIO_SERVICE_CIDR in sidecar.env, --mesh-cidr), or leave the rule out.",
    );
}

function refused(rule: PolicyRule, why: string, next: string): VmmeshError {
  return new VmmeshError("USAGE", `failure policy ${formatPolicyRule(rule)}: ${why}`, { next });
}

/** For people: each kind of captured connection and what happens to it while Envoy does not answer, one line each. */
export function describeFailures(wish: Wish): string[] {
  const families: Family[] = wish.ipv6 ? [4, 6] : [4];
  const lines = [
    ...inboundFailures(wish).map(
      ({ ports, failure }) =>
        `inbound ${ports === undefined ? "every other port" : `port ${ports.join(", ")}`}: ${failure}`,
    ),
    ...families.flatMap((family) =>
      outboundFailures(wish, family).map(
        ({ to: place, port, failure }) =>
          `outbound ${place === "*" ? "everything else" : place}${port === undefined ? "" : ` port ${port}`}: ${failure}`,
      ),
    ),
  ];
  return unique(lines);
}
