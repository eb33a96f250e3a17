/**
 * Every place on disk that vmmesh reads or writes, once. Who owns each and who may read it stands in ARCHITECTURE.md.
 * All paths lie below one root so that `vmmesh run --foreground --root DIR` and the demo can have two machines on one host.
 */
export interface Paths {
  readonly root: string;
  /** What `join` renders and an operator may read: no secrets. root 0755. */
  readonly etc: string;
  readonly clusterEnv: string;
  readonly sidecarEnv: string;
  readonly meshConfig: string;
  readonly rootCert: string;
  /** The agent's own state; root never acts on what is in here. vmmesh 0700. */
  readonly state: string;
  readonly token: string;
  readonly identity: string;
  /** The configuration that Envoy accepted last; no secrets in it. vmmesh 0600. */
  readonly lastGood: string;
  /** What root acts on: journal of a join, rules in force. root 0700. */
  readonly hostState: string;
  readonly journal: string;
  readonly lock: string;
  readonly rules: string;
  /** Sockets and the rendered bootstrap; gone at reboot. vmmesh 0750, group vmmesh. */
  readonly run: string;
  readonly bootstrap: string;
  readonly xdsSocket: string;
  readonly sdsSocket: string;
  readonly adminSocket: string;
  /** Envoy's own admin interface; vmmesh-envoy 0750, group vmmesh. */
  readonly envoyRun: string;
  readonly envoyAdminSocket: string;
  /** Directory of the FIFO that carries Envoy's access log. */
  readonly envoyLogRun: string;
  /** Directory of the next. */
  readonly nftRun: string;
  /** Directory of the next. */
  readonly resolvedRun: string;
  /** The agent says here which names systemd-resolved is to ask it for; vmmesh 0600. */
  readonly resolvedSocket: string;
  /** Directory of the FIFO that keeps the holder of the second fence alive; root 0700. */
  readonly holdRun: string;
  /** FIFO of what the kernel tells of changes to its rules; vmmesh 0600. */
  readonly nftEvents: string;
  /** What Envoy's unit may do beyond its own file, in TPROXY mode; root 0644. */
  readonly envoyDropIn: string;
  /** What root last saw of the rules, for the agent to show; root 0644. */
  readonly captureState: string;
  /** The agent asks for repair of the rules by touching this file; its content is never read. */
  readonly repairRequest: string;
}

/** The table for one root; `/` on a real machine. */
export function paths(root = "/"): Paths {
  const at = (path: string): string => (root === "/" ? path : `${root.replace(/\/+$/, "")}${path}`);
  return {
    root,
    etc: at("/etc/vmmesh"),
    clusterEnv: at("/etc/vmmesh/cluster.env"),
    sidecarEnv: at("/etc/vmmesh/sidecar.env"),
    meshConfig: at("/etc/vmmesh/mesh.yaml"),
    rootCert: at("/etc/vmmesh/root-cert.pem"),
    state: at("/var/lib/vmmesh"),
    token: at("/var/lib/vmmesh/token"),
    identity: at("/var/lib/vmmesh/identity"),
    lastGood: at("/var/lib/vmmesh/last-good"),
    hostState: at("/var/lib/vmmesh-host"),
    journal: at("/var/lib/vmmesh-host/join.json"),
    lock: at("/var/lib/vmmesh-host/lock"),
    rules: at("/var/lib/vmmesh-host/rules"),
    run: at("/run/vmmesh"),
    bootstrap: at("/run/vmmesh/bootstrap.json"),
    xdsSocket: at("/run/vmmesh/xds.sock"),
    sdsSocket: at("/run/vmmesh/sds.sock"),
    adminSocket: at("/run/vmmesh/admin.sock"),
    envoyRun: at("/run/vmmesh-envoy"),
    envoyAdminSocket: at("/run/vmmesh-envoy/admin.sock"),
    envoyLogRun: at("/run/vmmesh-envoy-log"),
    nftRun: at("/run/vmmesh-nftmon"),
    resolvedRun: at("/run/vmmesh-resolved"),
    resolvedSocket: at("/run/vmmesh-resolved/in"),
    holdRun: at("/run/vmmesh-hold"),
    nftEvents: at("/run/vmmesh-nftmon/events"),
    envoyDropIn: at("/etc/systemd/system/vmmesh-envoy.service.d/vmmesh-tproxy.conf"),
    captureState: at("/run/vmmesh-capture.json"),
    repairRequest: at("/run/vmmesh/repair-request"),
  };
}

/** Ports of the machine that vmmesh or Envoy listens on (Istio's numbers; see the port table in ARCHITECTURE.md). */
export const PORTS = {
  outbound: 15001,
  inbound: 15006,
  tunnel: 15008,
  status: 15020,
  readiness: 15021,
  dns: 15053,
  envoyPrometheus: 15090,
  /** Bound by nobody: Envoy answers it only for a connection that was captured. */
  probe: 15997,
} as const;

/**
 * Envoy's cluster for gRPC to the agent, and what it says in `:authority`: a plain host name, because some gRPC servers
 * refuse a socket's path there.
 */
export const AGENT_GRPC = { cluster: "xds-grpc", authority: "vmmesh.local" } as const;

/** @see resolv.conf(5) */
export const RESOLV_CONF = "/etc/resolv.conf";

/** The servers that systemd-resolved asks, in the format of resolv.conf (systemd-resolved.service(8)). */
export const RESOLVED_CONF = "/run/systemd/resolve/resolv.conf";

/**
 * What the audit's probe connects to: addresses of the documentation networks (RFC 5737, RFC 3849), which nobody routes.
 * They are captured like a service of the mesh, so that only Envoy can answer there.
 */
export const PROBE_ADDRESS: Readonly<Record<4 | 6, string>> = { 4: "192.0.2.77", 6: "2001:db8::77" };

/** The first bytes of Envoy's answer to the probe. */
export const PROBE_ANSWER = "vmmesh: Envoy answers";

/** System users, made by sysusers.d; 1337 is not used: it lies in the human range and whoever owns it bypasses capture. */
export const USERS = { agent: "vmmesh", envoy: "vmmesh-envoy" } as const;
