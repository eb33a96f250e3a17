import { VmmeshError } from "../core/errors.ts";
import { ipFamily, parseHostPort } from "../core/net.ts";
import { PORTS } from "../core/paths.ts";
import {
  CHAIN,
  type Family,
  type FenceRule,
  hostCidr,
  LEASE_ADDRESS,
  LOOPBACK,
  type Match,
  OPENING,
  OWN_PORTS,
  PASSTHROUGH,
  REDIRECTED_TO,
  type Rule,
  type Table,
  TCP,
  UDP,
} from "./rules.ts";

/** What is wanted, in words of the mesh. */
export interface CaptureWish {
  readonly agentUid: number;
  readonly envoyUid: number;
  readonly inbound:
    | { readonly kind: "ports"; readonly ports: readonly number[] }
    | { readonly kind: "all"; readonly excludePorts: readonly number[] };
  /** Added to the ports on which sshd is seen to listen. */
  readonly sshPorts: readonly number[];
  readonly outbound: {
    /** `["*"]` is everything. */
    readonly cidrs: readonly string[];
    readonly excludeCidrs: readonly string[];
    readonly excludePorts: readonly number[];
  };
  /** Where the mesh's services live: always captured, and closed when Envoy is down. */
  readonly meshCidrs: readonly string[];
  /** Servers of resolv.conf whose port 53 goes to the agent. */
  readonly dns: { readonly servers: readonly string[] } | undefined;
  readonly ipv6: boolean;
  /** `ip:port`, let through. */
  readonly istiod: readonly string[];
  /** Management networks, let through. */
  readonly keep: readonly string[];
}

/** Which iptables program writes into which tables of the kernel. */
export type Backend = "nft" | "legacy";

/** What was read from this machine (`readMachine`) and decides how the wish becomes rules. */
export interface MachineFacts {
  /** undefined: there is no usable iptables, the guard does it alone. */
  readonly backend: Backend | undefined;
  readonly backendWhy: string;
  /** Program names, e.g. `iptables-nft`; `6` is undefined where there is no ip6tables. */
  readonly programs: Readonly<Record<Family, string | undefined>>;
  /** `nft` and nf_tables work: guard and fence are possible. */
  readonly nft: boolean;
  /** The kernel has IPv6 at all (ipv6.disable=1 takes it away). */
  readonly ipv6: boolean;
  /** nft can set conntrack timeouts (CONFIG_NF_CONNTRACK_TIMEOUT). */
  readonly dnsTimeouts: boolean;
  readonly sshPorts: readonly number[];
}

export interface FamilyPlan {
  readonly family: Family;
  /** In order within each table and chain. */
  readonly rules: readonly Rule[];
}

/** Everything that will be in force, as data; it is kept in rulesDir and read back by repair, removal and audit. */
export interface CapturePlan {
  readonly version: 1;
  readonly backend: Backend | undefined;
  readonly programs: Readonly<Record<Family, string | undefined>>;
  readonly families: readonly FamilyPlan[];
  readonly guard: boolean;
  /** Empty: no fence. */
  readonly fence: readonly FenceRule[];
  readonly envoyUid: number;
  readonly agentUid: number;
  readonly inboundPorts: readonly number[] | "all";
  readonly sshPorts: readonly number[];
  /** Sentences for a person: what this machine cannot have, and why. */
  readonly notes: readonly string[];
}

/** Clouds answer for metadata and credentials here; what runs before the mesh needs it. */
const METADATA: Readonly<Record<Family, string>> = { 4: "169.254.169.254/32", 6: "fd00:ec2::254/128" };

/** A conntrack zone for the agent's own questions, one for those redirected to it: both may have the same 5-tuple (ch. 7.3). */
const DIRECT_ZONE = 1;
const REDIRECTED_ZONE = 2;

/**
 * The rules for this wish on this machine. Pure.
 *
 * @throws {VmmeshError} USAGE for an address, port or uid that is none; RULES_REJECTED if the machine has neither iptables nor nft
 */
export function planCapture(wish: CaptureWish, machine: MachineFacts): CapturePlan {
  check(wish);
  if (machine.backend === undefined && !machine.nft) {
    throw new VmmeshError("RULES_REJECTED", "neither iptables nor nft works on this machine", {
      next: "Install the package `iptables` (or `nftables`), and see that the kernel has netfilter; then join again.",
    });
  }
  const notes: string[] = [];
  if (!machine.nft) {
    notes.push(
      "nf_tables is not usable here: guard and fence are left out, only the order of the iptables rules protects capture",
    );
  }
  if (machine.backend === undefined) notes.push("there is no iptables: the guard table captures alone");
  if (wish.ipv6 && machine.ipv6 && machine.programs[6] === undefined && !machine.nft) {
    notes.push("ip6tables is missing: IPv6 traffic is not captured");
  }
  const sshPorts = unique([...wish.sshPorts, ...machine.sshPorts]);
  const settled: CaptureWish = { ...wish, sshPorts, ipv6: wish.ipv6 && machine.ipv6 };
  const families: Family[] = settled.ipv6 ? [4, 6] : [4];
  const inboundPorts =
    wish.inbound.kind === "all"
      ? ("all" as const)
      : unique(wish.inbound.ports).filter((port) => !neverCaptured(settled).includes(port));
  return {
    version: 1,
    backend: machine.backend,
    programs: machine.programs,
    families: families.map((family) => ({
      family,
      rules: [
        ...zoneRules(settled, family),
        ...leaseRules(settled, family, machine.dnsTimeouts),
        ...natRules(settled, family),
      ],
    })),
    guard: machine.nft,
    fence: machine.nft ? fenceRules(settled) : [],
    envoyUid: wish.envoyUid,
    agentUid: wish.agentUid,
    inboundPorts,
    sshPorts,
    notes,
  };
}

function check(wish: CaptureWish): void {
  const wrong = (what: string): never => {
    throw new VmmeshError("USAGE", what, {
      next: "Correct it in the join options or sidecar.env, then run the command again.",
    });
  };
  for (const uid of [wish.agentUid, wish.envoyUid]) {
    if (!Number.isInteger(uid) || uid <= 0) {
      wrong(`uid ${uid} cannot be exempted from capture: it must be a dedicated user, not root`);
    }
  }
  const ports = [
    ...wish.sshPorts,
    ...wish.outbound.excludePorts,
    ...(wish.inbound.kind === "ports" ? wish.inbound.ports : wish.inbound.excludePorts),
  ];
  for (const port of ports) {
    if (!Number.isInteger(port) || port < 1 || port > 65535) wrong(`${port} is not a port`);
  }
  const cidrs = [
    ...wish.outbound.cidrs.filter((cidr) => cidr !== "*"),
    ...wish.outbound.excludeCidrs,
    ...wish.meshCidrs,
    ...wish.keep,
  ];
  for (const cidr of [...cidrs, ...(wish.dns?.servers ?? [])]) {
    if (familyOf(cidr) === undefined) wrong(`"${cidr}" is not an IP address or prefix`);
  }
  for (const target of wish.istiod) {
    if (parseHostPort(target) === undefined) wrong(`"${target}" is not ip:port`);
  }
}

/** Family of an address or prefix; undefined if it is neither. */
function familyOf(cidr: string): Family | undefined {
  const [address = "", bits, ...rest] = cidr.split("/");
  const family = ipFamily(address);
  if (family === undefined || rest.length > 0) return undefined;
  if (bits !== undefined && !(/^\d{1,3}$/.test(bits) && Number(bits) <= (family === 4 ? 32 : 128)))
    return undefined;
  return family;
}

function of(cidrs: readonly string[], family: Family): string[] {
  return unique(cidrs.filter((cidr) => familyOf(cidr) === family).map((cidr) => hostCidr(cidr, family)));
}

function unique<T>(values: readonly T[]): T[] {
  return [...new Set(values)];
}

/** Ports on which nobody from outside may ever meet Envoy instead of the real server. */
function neverCaptured(wish: CaptureWish): number[] {
  return unique([...wish.sshPorts, ...OWN_PORTS, PORTS.tunnel]);
}

const owner = (uid: number): Match => ({ is: "owner", uid });
const to = (cidr: string): Match => ({ is: "to", cidr });
const LO_OUT: Match = { is: "out", interface: "lo" };
const RETURN = { do: "return" } as const;
const jump = (chain: string) => ({ do: "jump", chain }) as const;

/** A multiport match holds 15 ports (iptables-extensions(8)). */
function portGroups(ports: readonly number[]): number[][] {
  const groups: number[][] = [];
  for (let at = 0; at < ports.length; at += 15) groups.push(ports.slice(at, at + 15));
  return groups;
}

interface Exemption {
  readonly when: readonly Match[];
  readonly why: string;
}

/** Outbound TCP that stays as it is, for every user; nat rules and fence are made from the same list. */
function exemptions(wish: CaptureWish, family: Family): Exemption[] {
  const { excludeCidrs, excludePorts } = wish.outbound;
  return [
    ...portGroups(wish.sshPorts).map((ports) => ({
      // Only root's: a source port that anybody may bind must not be a way around the mesh.
      when: [TCP, { is: "fromPorts", ports } as const, owner(0)],
      why: "what sshd answers stays direct: the operator's session never depends on the mesh",
    })),
    ...wish.istiod
      .map((target) => parseHostPort(target))
      .filter((target) => target !== undefined)
      .filter(({ host }) => ipFamily(host) === family)
      .map(({ host, port }) => ({
        when: [to(hostCidr(host, family)), TCP, { is: "toPorts", ports: [port] } as const],
        why: "the control plane is reached directly: without it Envoy has no configuration",
      })),
    {
      when: [to(METADATA[family])],
      why: "the cloud's metadata service answers this machine only, not a proxy",
    },
    ...of(wish.keep, family).map((cidr) => ({
      when: [to(cidr)],
      why: "a management network that is kept direct",
    })),
    ...of(excludeCidrs, family).map((cidr) => ({
      when: [to(cidr)],
      why: "a network excluded from capture by configuration",
    })),
    ...portGroups(unique(excludePorts)).map((ports) => ({
      when: [TCP, { is: "toPorts", ports } as const],
      why: "a port excluded from capture by configuration",
    })),
  ];
}

/** Table nat: the redirects and what is left out of them. */
function natRules(wish: CaptureWish, family: Family): Rule[] {
  const { agentUid, envoyUid } = wish;
  const servers = of(wish.dns?.servers ?? [], family);
  const captureAll = wish.outbound.cidrs.includes("*");
  const mesh = of(wish.meshCidrs, family);
  const open = captureAll ? [] : of(wish.outbound.cidrs, family).filter((cidr) => !mesh.includes(cidr));
  const rule = (chain: string, when: readonly Match[], verdict: Rule["verdict"], why: string): Rule => ({
    table: "nat",
    chain,
    when,
    verdict,
    why,
  });
  const selfCall = inboundMatches(wish).map((when) =>
    rule(
      CHAIN.output,
      [{ is: "to", cidr: LOOPBACK[family], not: true }, LO_OUT, TCP, ...when, owner(envoyUid)],
      jump(CHAIN.inRedirect),
      "a call of this machine to its own service arrives through the inbound listener",
    ),
  );
  const hook = (table: Table, chain: string, when: readonly Match[], target: string, why: string): Rule => ({
    table,
    chain,
    when,
    verdict: jump(target),
    why,
  });
  return [
    rule(
      CHAIN.redirect,
      [TCP, OPENING],
      { do: "redirect", port: PORTS.outbound },
      "to Envoy's outbound listener",
    ),
    rule(
      CHAIN.inRedirect,
      [TCP, OPENING],
      { do: "redirect", port: PORTS.inbound },
      "to Envoy's inbound listener",
    ),
    ...inboundRules(wish),
    rule(
      CHAIN.output,
      [owner(agentUid)],
      RETURN,
      "the agent itself is not captured: it serves Envoy and the resolver",
    ),
    rule(
      CHAIN.output,
      [{ is: "from", cidr: hostCidr(PASSTHROUGH[family], family) }, LO_OUT],
      RETURN,
      "Envoy's inbound side and the agent's probes reach the application from this address",
    ),
    rule(
      CHAIN.output,
      [LO_OUT, TCP, { is: "toPorts", ports: OWN_PORTS }],
      RETURN,
      "vmmesh's own listeners on this machine",
    ),
    ...exemptions(wish, family).map(({ when, why }) => rule(CHAIN.output, when, RETURN, why)),
    // Before every `-o lo` rule: with kube-proxy in IPVS mode a service address is local and leaves through lo.
    ...mesh.map((cidr) =>
      rule(
        CHAIN.output,
        [to(cidr), owner(envoyUid)],
        RETURN,
        "Envoy reaches services of the mesh directly, also where their address is local",
      ),
    ),
    ...selfCall,
    rule(CHAIN.output, [owner(envoyUid)], RETURN, "what Envoy sends must not come back to Envoy"),
    ...servers.flatMap((server) => [
      rule(
        CHAIN.output,
        [to(server)],
        jump(CHAIN.dns),
        "questions to this resolver may be for names of the mesh",
      ),
      ...([TCP, UDP] as const).map((protocol) =>
        rule(
          CHAIN.dns,
          [
            to(server),
            protocol,
            { is: "toPorts", ports: [53] },
            ...(protocol === TCP ? [OPENING] : []),
            { is: "leased", lease: "dns" },
          ],
          { do: "redirect", port: PORTS.dns },
          "names are answered by the agent, as long as it answers at all",
        ),
      ),
      rule(
        CHAIN.output,
        [to(server), TCP, { is: "toPorts", ports: [53] }],
        RETURN,
        "when the agent does not answer, the resolver is asked directly",
      ),
    ]),
    ...mesh.map((cidr) =>
      rule(
        CHAIN.output,
        [to(cidr), TCP],
        jump(CHAIN.redirect),
        "services of the mesh are reached through Envoy only",
      ),
    ),
    rule(CHAIN.output, [LO_OUT], RETURN, "processes of this machine may talk to each other directly"),
    ...open.map((cidr) =>
      rule(
        CHAIN.output,
        [to(cidr), TCP, { is: "leased", lease: "envoy" }],
        jump(CHAIN.redirect),
        "a captured network, direct while Envoy does not answer",
      ),
    ),
    ...(captureAll
      ? [
          rule(
            CHAIN.output,
            [TCP, { is: "leased", lease: "envoy" }],
            jump(CHAIN.redirect),
            "everything else goes through Envoy, direct while it does not answer",
          ),
        ]
      : []),
    ...(inboundMatches(wish).length > 0
      ? [
          hook(
            "nat",
            "PREROUTING",
            [TCP, { is: "toThisMachine" }],
            CHAIN.inbound,
            "inbound connections to this machine, never forwarded ones",
          ),
        ]
      : []),
    hook("nat", "OUTPUT", [], CHAIN.output, "outbound connections of this machine, ahead of KUBE-SERVICES"),
  ];
}

/** One list of matches for each group of captured ports; one empty list when all are captured; none when nothing is. */
function inboundMatches(wish: CaptureWish): Match[][] {
  if (wish.inbound.kind === "all") return [[]];
  const never = neverCaptured(wish);
  const ports = unique(wish.inbound.ports).filter((port) => !never.includes(port));
  return portGroups(ports).map((group) => [{ is: "toPorts", ports: group }]);
}

function inboundRules(wish: CaptureWish): Rule[] {
  const rule = (when: readonly Match[], verdict: Rule["verdict"], why: string): Rule => ({
    table: "nat",
    chain: CHAIN.inbound,
    when,
    verdict,
    why,
  });
  const captured = inboundMatches(wish);
  if (captured.length === 0) return [];
  const left = portGroups(neverCaptured(wish)).map((ports) =>
    rule([TCP, { is: "toPorts", ports }], RETURN, "sshd and vmmesh's own listeners are never captured"),
  );
  if (wish.inbound.kind === "ports") {
    return [
      ...left,
      ...captured.map((when) =>
        rule(
          [TCP, ...when],
          jump(CHAIN.inRedirect),
          "a declared port: only through Envoy's inbound listener",
        ),
      ),
    ];
  }
  return [
    ...left,
    ...portGroups(unique(wish.inbound.excludePorts)).map((ports) =>
      rule([TCP, { is: "toPorts", ports }], RETURN, "an inbound port excluded from capture by configuration"),
    ),
    rule(
      [TCP, { is: "leased", lease: "envoy" }],
      jump(CHAIN.inRedirect),
      "every other port through Envoy, direct while it does not answer",
    ),
  ];
}

/**
 * By address, not by user: a socket that systemd made and handed over belongs to root for the kernel. Nobody else can send
 * from this address and port while it is bound.
 */
function agentAnswers(family: Family): Match[] {
  return [
    { is: "from", cidr: hostCidr(REDIRECTED_TO[family], family) },
    UDP,
    { is: "fromPorts", ports: [PORTS.dns] },
  ];
}

/**
 * Table raw: conntrack zones for questions over UDP. A question that is not redirected (agent, Envoy, or the lease has
 * lapsed) shares the zone of the answers from outside, so that a stateful firewall still sees them as one flow.
 */
function zoneRules(wish: CaptureWish, family: Family): Rule[] {
  const servers = of(wish.dns?.servers ?? [], family);
  if (servers.length === 0) return [];
  const question: readonly Match[] = [UDP, { is: "toPorts", ports: [53] }];
  const rule = (chain: string, when: readonly Match[], zone: number, why: string): Rule => ({
    table: "raw",
    chain,
    when,
    verdict: { do: "zone", zone },
    why,
  });
  return [
    ...[wish.agentUid, wish.envoyUid].map((uid) =>
      rule(
        CHAIN.dns,
        [...question, owner(uid)],
        DIRECT_ZONE,
        "questions of agent and Envoy to the real resolver",
      ),
    ),
    rule(CHAIN.dns, agentAnswers(family), REDIRECTED_ZONE, "the agent's answers"),
    ...servers.flatMap((server) => [
      rule(
        CHAIN.dns,
        [to(server), ...question, { is: "leased", lease: "dns" }],
        REDIRECTED_ZONE,
        "questions that will be redirected to the agent",
      ),
      rule(
        CHAIN.dns,
        [to(server), ...question],
        DIRECT_ZONE,
        "questions that go to the real resolver because the agent does not answer",
      ),
      rule(
        CHAIN.inbound,
        [{ is: "from", cidr: server }, UDP, { is: "fromPorts", ports: [53] }],
        DIRECT_ZONE,
        "answers of the real resolver",
      ),
    ]),
    {
      table: "raw",
      chain: "PREROUTING",
      when: [UDP],
      verdict: jump(CHAIN.inbound),
      why: "answers of the resolver get their conntrack zone",
    },
    // First in raw, because the first zone or NOTRACK wins: node-local-dns writes NOTRACK rules here.
    {
      table: "raw",
      chain: "OUTPUT",
      when: [UDP],
      verdict: jump(CHAIN.dns),
      why: "questions get their conntrack zone before anybody untracks them",
    },
  ];
}

/** Table mangle: who keeps the leases alive. Nobody but Envoy may knock at the lease's address. */
function leaseRules(wish: CaptureWish, family: Family, dnsTimeouts: boolean): Rule[] {
  const servers = of(wish.dns?.servers ?? [], family);
  const address = hostCidr(LEASE_ADDRESS[family], family);
  const rule = (when: readonly Match[], verdict: Rule["verdict"], why: string): Rule => ({
    table: "mangle",
    chain: CHAIN.lease,
    when,
    verdict,
    why,
  });
  const leased = wish.outbound.cidrs.length > 0 || wish.inbound.kind === "all";
  const envoy = [
    rule(
      [
        to(address),
        TCP,
        { is: "toPorts", ports: [PORTS.outbound] },
        OPENING,
        { is: "owner", uid: wish.envoyUid, not: true },
      ],
      { do: "drop" },
      "only Envoy itself may prove that Envoy is alive",
    ),
    rule(
      [{ is: "from", cidr: address }, TCP, { is: "fromPorts", ports: [PORTS.outbound] }, { is: "accepted" }],
      { do: "refresh", lease: "envoy" },
      "Envoy's health check of its own listener was answered",
    ),
  ];
  const dns = [
    rule(agentAnswers(family), { do: "refresh", lease: "dns" }, "the agent answered a question"),
    ...(dnsTimeouts
      ? servers.map(
          (server): Rule => ({
            ...rule(
              [to(server), UDP, { is: "toPorts", ports: [53] }],
              { do: "forgetSoon" },
              "a socket that asks again is not pinned to an agent that has gone",
            ),
            guardOnly: true,
          }),
        )
      : []),
  ];
  if (!leased && servers.length === 0) return [];
  return [
    ...(leased ? envoy : []),
    ...(servers.length > 0 ? dns : []),
    {
      table: "mangle",
      chain: "OUTPUT",
      when: [],
      verdict: jump(CHAIN.lease),
      why: "signs of life of Envoy and of the agent",
    },
  ];
}

/**
 * What order loss or a wipe would let slip is refused. Only first segments are judged: a connection that was open before
 * the fence stays open. New TCP to the mesh that is on its way to Envoy has been readdressed to loopback by now.
 */
function fenceRules(wish: CaptureWish): FenceRule[] {
  const families: Family[] = wish.ipv6 ? [4, 6] : [4];
  const mesh = families.flatMap((family) => of(wish.meshCidrs, family));
  const inbound = wish.inbound.kind === "ports" ? inboundMatches(wish) : [];
  const out = (when: readonly Match[], verdict: FenceRule["verdict"], why: string): FenceRule => ({
    chain: "output",
    when,
    verdict,
    why,
  });
  const reset = { do: "reset" } as const;
  const outbound =
    mesh.length === 0
      ? []
      : [
          out([LO_OUT], RETURN, "processes of this machine may talk to each other directly"),
          ...[wish.envoyUid, wish.agentUid].map((uid) =>
            out([owner(uid)], RETURN, "Envoy and the agent reach the mesh themselves"),
          ),
          ...families.flatMap((family) => [
            out(
              [
                to(hostCidr(REDIRECTED_TO[family], family)),
                TCP,
                { is: "toPorts", ports: [PORTS.outbound, PORTS.dns] },
              ],
              RETURN,
              "captured: on its way to Envoy or to the agent",
            ),
            ...exemptions(wish, family).map(({ when, why }) => out(when.map(beforeNat), RETURN, why)),
            ...of(wish.dns?.servers ?? [], family).map((server) =>
              out(
                [to(server), TCP, { is: "toPorts", ports: [53] } as const].map(beforeNat),
                RETURN,
                "the resolver may be asked directly",
              ),
            ),
          ]),
          ...mesh.map((cidr) =>
            out([{ is: "addressedTo", cidr }, TCP, OPENING], reset, "to the mesh, but past Envoy"),
          ),
        ];
  const outside: Match = { is: "in", interface: "lo", not: true };
  const listeners = [PORTS.outbound, PORTS.inbound].map(
    (port): FenceRule => ({
      chain: "input",
      when: [
        outside,
        TCP,
        { is: "toPorts", ports: [port] },
        { is: "addressedToPorts", ports: [port] },
        OPENING,
      ],
      verdict: reset,
      why: "Envoy's listeners for captured traffic cannot be dialled from outside",
    }),
  );
  return [
    ...outbound,
    ...listeners,
    ...inbound.map(
      (when): FenceRule => ({
        chain: "input",
        // Without IPv6 capture an IPv6 connection cannot come through Envoy, so it is not judged.
        when: [...(wish.ipv6 ? [] : [{ is: "family", family: 4 } as const]), outside, TCP, ...when, OPENING],
        verdict: reset,
        why: "to a declared port, but past Envoy",
      }),
    ),
  ];
}

/** The fence runs after NAT; who was exempt by the address that the application dialled stays exempt. */
function beforeNat(match: Match): Match {
  if (match.is === "to" && match.not === undefined) return { is: "addressedTo", cidr: match.cidr };
  return match.is === "toPorts" ? { is: "addressedToPorts", ports: match.ports } : match;
}

/** For `vmmesh iptables plan`: what is captured, what is let through and why, what happens when something dies. */
export function describePlan(plan: CapturePlan): string {
  const lines: string[] = [];
  const programs = plan.families
    .map(({ family }) => plan.programs[family])
    .filter((program) => program !== undefined);
  lines.push(
    plan.backend === undefined
      ? "Capture by the nft guard tables `ip vmmesh` and `ip6 vmmesh` alone."
      : `Capture by ${programs.join(" and ")} (chains ISTIO_*, first in OUTPUT, ahead of KUBE-SERVICES).`,
  );
  if (plan.guard && plan.backend !== undefined)
    lines.push("Guard: the same rules as an nft nat chain at priority -120, ahead of every other program's.");
  if (plan.fence.length > 0)
    lines.push(
      "Fence: table `inet vmmesh-fence` refuses what would reach the mesh, or a declared port, past Envoy.",
    );
  for (const note of plan.notes) lines.push(`Note: ${note}.`);
  for (const { family, rules } of plan.families) {
    lines.push("", `IPv${family}`);
    for (const rule of rules) {
      lines.push(
        `  ${rule.table.padEnd(6)} ${rule.chain.padEnd(17)} ${describeMatches(rule.when)} → ${describeVerdict(rule.verdict)}`,
      );
      lines.push(`         because: ${rule.why}`);
    }
  }
  if (plan.fence.length > 0) {
    lines.push("", "Fence, both families");
    for (const rule of plan.fence) {
      lines.push(
        `  ${rule.chain.padEnd(6)} ${describeMatches(rule.when)} → ${describeVerdict(rule.verdict)}`,
        `         because: ${rule.why}`,
      );
    }
  }
  lines.push(
    "",
    "Let through as they are: all UDP but questions to the resolver (DHCP and NTP among it), ICMP, forwarded packets,",
    "connections that were open before, everything sent by the users of Envoy and of the agent.",
    "When Envoy dies: declared ports and the mesh are refused; other captured traffic goes direct after 3 s.",
    "When the agent dies: questions go to the real resolver after 3 s.",
  );
  return `${lines.join("\n")}\n`;
}

function describeMatches(matches: readonly Match[]): string {
  return matches.length === 0 ? "everything" : matches.map(describeMatch).join(", ");
}

function describeMatch(match: Match): string {
  const not = "not" in match && match.not === true ? "not " : "";
  switch (match.is) {
    case "protocol":
      return match.protocol;
    case "from":
      return `from ${match.cidr}`;
    case "to":
      return `${not}to ${match.cidr}`;
    case "addressedTo":
      return `addressed to ${match.cidr}`;
    case "addressedToPorts":
      return `addressed to port ${match.ports.join(",")}`;
    case "in":
    case "out":
      return `${not}${match.is} ${match.interface}`;
    case "fromPorts":
      return `from port ${match.ports.join(",")}`;
    case "toPorts":
      return `to port ${match.ports.join(",")}`;
    case "owner":
      return `${not}sent by uid ${match.uid}`;
    case "family":
      return `IPv${match.family}`;
    case "toThisMachine":
      return "to this machine";
    case "opening":
      return "opening";
    case "accepted":
      return "accepted";
    case "leased":
      return match.lease === "envoy" ? "while Envoy answers" : "while the agent answers";
  }
}

function describeVerdict(verdict: Rule["verdict"]): string {
  switch (verdict.do) {
    case "return":
      return "left alone";
    case "drop":
      return "dropped";
    case "reset":
      return "refused";
    case "jump":
      return verdict.chain;
    case "redirect":
      return `port ${verdict.port}`;
    case "zone":
      return `conntrack zone ${verdict.zone}`;
    case "refresh":
      return `renews the lease of ${verdict.lease === "envoy" ? "Envoy" : "the agent"}`;
    case "forgetSoon":
      return "forgotten after 3 s";
  }
}
