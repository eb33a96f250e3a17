import { ipFamily, parseHostPort } from "../../core/net.ts";
import { PORTS } from "../../core/paths.ts";
import { type Family, hostCidr, type Match, OWN_PORTS, TCP } from "../rules.ts";
import { of, owner, portGroups, to, unique } from "./terms.ts";
import type { CaptureWish } from "./wish.ts";

/** Clouds answer for metadata and credentials here; what runs before the mesh needs it. */
const METADATA: Readonly<Record<Family, string>> = { 4: "169.254.169.254/32", 6: "fd00:ec2::254/128" };

interface Exemption {
  readonly when: readonly Match[];
  readonly why: string;
}

/** Outbound TCP that stays as it is, for every user; nat rules and fence are made from the same list. */
export function exemptions(wish: CaptureWish, family: Family): Exemption[] {
  const { excludeCidrs, excludePorts } = wish.outbound;
  return [
    ...unique(wish.excludeInterfaces ?? []).map((name) => ({
      when: [{ is: "out", interface: name } as const],
      why: "an interface excluded from capture by configuration",
    })),
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

/** Ports on which nobody from outside may ever meet Envoy instead of the real server. */
export function neverCaptured(wish: Pick<CaptureWish, "sshPorts">): number[] {
  return unique([...wish.sshPorts, ...OWN_PORTS, PORTS.tunnel]);
}
