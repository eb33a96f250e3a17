import { bracketed, ipFamily } from "../core/net.ts";
import { PORTS } from "../core/paths.ts";
import type { Host } from "../platform/host.ts";
import { decide } from "./decide.ts";
import { type ListeningSocket, parseListeners } from "./parse.ts";
import { levelOf } from "./plan/senders.ts";
import type { CapturePlan } from "./plan.ts";
import { tryRun } from "./read.ts";
import { OWN_PORTS } from "./rules.ts";

/** A TCP connection that lives on this machine now. */
export interface Flow {
  readonly local: { readonly address: string; readonly port: number };
  readonly remote: { readonly address: string; readonly port: number };
  /** undefined: the kernel's own socket, such as that of a network file system. */
  readonly uid: number | undefined;
  /** Empty for the kernel's, and for those that only root may see. */
  readonly process: string;
  readonly pid: number | undefined;
  /** By which netfilter knows the process's group: its file system gid. undefined: not known. */
  readonly gid: number | undefined;
  /** Path below the root of the cgroups, without the first slash; empty where the kernel does not tell. */
  readonly cgroup: string;
}

export interface NetworkMount {
  readonly server: string;
  readonly type: string;
  readonly target: string;
}

/** What of this machine the rules would touch. Gathered without writing anything. */
export interface LiveMachine {
  readonly flows: readonly Flow[];
  readonly listeners: readonly ListeningSocket[];
  readonly mounts: readonly NetworkMount[];
  /** Interfaces that forward for containers, virtual machines or pods. */
  readonly bridges: readonly string[];
  /** Addresses of this machine, loopback included. */
  readonly addresses: readonly string[];
}

/** One thing that will be different, or would break, once the plan is in force. */
export interface Effect {
  readonly severity: "changes" | "breaks";
  readonly what: string;
  readonly why: string;
  /** The option of `vmmesh join` that leaves it out; empty where leaving it out is no answer. */
  readonly exclude: string;
}

export interface Preview {
  readonly flows: number;
  readonly effects: readonly Effect[];
  /** What stays as it is although one might fear for it. */
  readonly notes: readonly string[];
}

/** Protocols that a machine hangs on, or that its logins need: a proxy that restarts must not be in their way. */
const FRAGILE: Readonly<Record<number, string>> = {
  88: "Kerberos: logins need it",
  111: "portmapper: NFS mounts need it",
  139: "SMB: a mounted file system hangs when its connection ends",
  389: "LDAP: logins need it",
  445: "SMB: a mounted file system hangs when its connection ends",
  464: "Kerberos: password changes need it",
  636: "LDAP: logins need it",
  2049: "NFS: a mounted file system hangs when its connection ends",
  3260: "iSCSI: a disk is lost when its connection ends",
  3268: "Active Directory: logins need it",
  3269: "Active Directory: logins need it",
  3300: "Ceph: a disk hangs when its connection ends",
  6789: "Ceph: a disk hangs when its connection ends",
  10809: "NBD: a disk is lost when its connection ends",
};

/** Processes by which a machine is managed or lets people in; names as ps(1) cuts them, at 15 characters. */
const MANAGES: Readonly<Record<string, string>> = {
  "salt-minion": "configuration management",
  puppet: "configuration management",
  "chef-client": "configuration management",
  sssd_be: "logins",
  nslcd: "logins",
  winbindd: "logins",
  "amazon-ssm-agen": "the cloud's remote access",
  google_guest_ag: "the cloud's remote access",
  waagent: "the cloud's remote access",
  tailscaled: "remote access",
  teleport: "remote access",
};

const LOCAL_FORWARDERS = /^(docker|virbr|cni|br-|podman|kube-bridge|lxcbr|lxdbr|cali|flannel)/;
const NETWORK_FILE_SYSTEMS = /^(nfs4?|cifs|smb3|ceph|glusterfs|fuse\.glusterfs)$/;

/** Asks ss, /proc and ip. Without root the names of other users' processes are missing, and no error. */
export async function readLive(host: Pick<Host, "run" | "files" | "net">): Promise<LiveMachine> {
  const [flows, listeners] = await Promise.all([
    tryRun(host, { argv: ["ss", "-tnpeH", "state", "established"] }),
    tryRun(host, { argv: ["ss", "-ltnpH"] }),
  ]);
  const found = parseFlows(flows?.stdout ?? "");
  const gids = await groupsOf(host.files, found);
  const mounts = (await host.files.readText("/proc/self/mounts")) ?? "";
  const interfaces = host.net.addresses();
  return {
    flows: found.map((flow) => ({ ...flow, gid: flow.pid === undefined ? undefined : gids.get(flow.pid) })),
    listeners: parseListeners(listeners?.stdout ?? ""),
    mounts: parseNetworkMounts(mounts),
    bridges: [...new Set(interfaces.map((it) => it.interface))].filter((name) => LOCAL_FORWARDERS.test(name)),
    addresses: interfaces.map(({ address }) => address),
  };
}

/** @see proc(5), status: `Gid:` real, effective, saved, file system */
async function groupsOf(
  files: Pick<Host["files"], "readText">,
  flows: readonly Flow[],
): Promise<Map<number, number>> {
  const pids = [...new Set(flows.flatMap(({ pid }) => pid ?? []))];
  const groups = await Promise.all(
    pids.map(async (pid) => {
      // It may have ended since ss saw it.
      const text = await files.readText(`/proc/${pid}/status`).catch(() => undefined);
      const gid = /^Gid:(?:\s+\d+){3}\s+(\d+)$/m.exec(text ?? "")?.[1];
      return gid === undefined ? [] : [[pid, Number(gid)] as const];
    }),
  );
  return new Map(groups.flat());
}

/**
 * @see ss(8) with -tnpe and a state given: queues, local, peer, users, then `uid:` (left out for root), `ino:` (0: no
 * process), `cgroup:` (of the v2 hierarchy; `unreachable:` with a number where it is gone)
 */
export function parseFlows(text: string): Flow[] {
  return text.split("\n").flatMap((line) => {
    const match = /^\s*\d+\s+\d+\s+(\S+):(\d+)\s+(\S+):(\d+)(\s.*)?$/.exec(line);
    if (match === null) return [];
    const rest = match[5] ?? "";
    const end = (address = "", port = ""): Flow["local"] => ({ address: plain(address), port: Number(port) });
    const kernel = /\sino:0\s/.test(`${rest} `);
    return [
      {
        local: end(match[1], match[2]),
        remote: end(match[3], match[4]),
        uid: kernel ? undefined : Number(/\suid:(\d+)/.exec(rest)?.[1] ?? 0),
        process: /\("([^"]+)",pid=/.exec(rest)?.[1] ?? "",
        pid: optionalNumber(/",pid=(\d+)/.exec(rest)?.[1]),
        gid: undefined,
        cgroup: /\scgroup:\/(\S+)/.exec(rest)?.[1] ?? "",
      },
    ];
  });
}

const optionalNumber = (text: string | undefined): number | undefined =>
  text === undefined ? undefined : Number(text);

/** `[::ffff:10.0.0.1]` → `10.0.0.1`: a connection over IPv4 to a server that listens for both. */
function plain(address: string): string {
  return address
    .replace(/^\[|\]$/g, "")
    .replace(/%.*$/, "")
    .replace(/^::ffff:(?=\d+\.)/, "");
}

/** @see proc(5), mounts; the server is the option `addr=` where the kernel gives it */
export function parseNetworkMounts(text: string): NetworkMount[] {
  return text.split("\n").flatMap((line) => {
    const [source = "", target = "", type = "", options = ""] = line.split(" ");
    if (!NETWORK_FILE_SYSTEMS.test(type)) return [];
    const server =
      /(?:^|,)addr=([^,]+)/.exec(options)?.[1] ?? source.replace(/^\/\//, "").split(/[:/]/)[0] ?? "";
    return [{ server, type, target: target.replaceAll("\\040", " ") }];
  });
}

/** What the plan would do to what lives on this machine now. Pure. */
export function preview(plan: CapturePlan, live: LiveMachine): Preview {
  const inbound = (flow: Flow): boolean =>
    live.listeners.some(
      ({ address, port }) =>
        port === flow.local.port && ["*", "0.0.0.0", "::", flow.local.address].includes(address),
    );
  return {
    flows: live.flows.length,
    effects: [
      ...taken(live),
      ...captured(
        plan,
        live,
        live.flows.filter((flow) => !inbound(flow)),
      ).map(outbound),
      ...live.mounts.flatMap((mount) => mounted(plan, live, mount)),
      ...servers(plan, live, live.flows.filter(inbound)),
    ],
    notes: [
      "connections that are open now stay as they are: only new ones are captured",
      ...(live.bridges.length > 0
        ? [`what ${live.bridges.join(", ")} forward for containers or virtual machines is not touched`]
        : []),
    ],
  };
}

/** A port that Envoy or the agent needs is somebody else's. */
function taken({ listeners }: LiveMachine): Effect[] {
  const own = [...OWN_PORTS, PORTS.tunnel];
  const others = new Map(
    listeners
      .filter(({ port, processes }) => own.includes(port) && !processes.some(({ name }) => OURS.has(name)))
      .map((listener) => [listener.port, listener]),
  );
  return [...others.values()].map(({ port, processes }) => ({
    severity: "breaks",
    what: `port ${port} is taken by ${processes[0]?.name ?? "another process"}`,
    why: "Envoy or the agent listens there and would not start",
    exclude: "",
  }));
}

const OURS: ReadonlySet<string> = new Set(["envoy", "vmmesh", "vmmesh-agent", "node", "systemd"]);

interface Group {
  readonly flow: Flow;
  /** They go direct while Envoy does not answer. */
  readonly open: boolean;
  readonly count: number;
}

/** The connections that the plan would take; those of the same program to the same place are one line. */
function captured(plan: CapturePlan, live: LiveMachine, flows: readonly Flow[]): Group[] {
  const groups = new Map<string, Group>();
  for (const flow of flows) {
    const decision = decideOutbound(plan, live, flow);
    if (decision?.port === undefined) continue;
    const key = `${flow.remote.address} ${flow.remote.port} ${flow.uid} ${flow.process}`;
    groups.set(key, { flow, open: decision.open, count: (groups.get(key)?.count ?? 0) + 1 });
  }
  return [...groups.values()];
}

function outbound({ flow, open, count }: Group): Effect {
  const { remote, process, uid } = flow;
  const fragile = FRAGILE[remote.port];
  const manages = MANAGES[process];
  const who = uid === undefined ? "the kernel" : process === "" ? `uid ${uid}` : `${process} (uid ${uid})`;
  const why =
    fragile ??
    (manages === undefined ? undefined : `${manages} must not depend on the mesh`) ??
    (uid === undefined ? "the kernel's own connection: it hangs when a proxy restarts" : undefined);
  return {
    severity: why === undefined ? "changes" : "breaks",
    what: `${at(remote)}, called by ${who}${count > 1 ? `, ${count} connections` : ""}`,
    why:
      why ??
      `new connections go through Envoy; while it does not answer they ${open ? "go direct" : "are refused"}`,
    exclude: `--exclude-outbound-cidr ${remote.address}/${remote.address.includes(":") ? 128 : 32}`,
  };
}

function decideOutbound(plan: CapturePlan, live: LiveMachine, flow: Flow) {
  const family = ipFamily(flow.remote.address);
  const rules = plan.families.find((it) => it.family === family);
  if (family === undefined || rules === undefined) return undefined;
  const { local, remote } = flow;
  return decide(rules, {
    hook: "OUTPUT",
    family,
    from: local.address,
    fromPort: local.port,
    to: remote.address,
    toPort: remote.port,
    interface: live.addresses.includes(remote.address) ? "lo" : "another",
    uid: flow.uid,
    gid: flow.gid,
    units: (plan.units ?? [])
      .filter(({ path }) => `${flow.cgroup}/`.startsWith(`${path}/`))
      .map((unit) => ({ list: unit.list, level: levelOf(unit) })),
    toThisMachine: false,
  });
}

/** A mount whose connection is not open at this moment, or that ss cannot see. */
function mounted(plan: CapturePlan, live: LiveMachine, { server, type, target }: NetworkMount): Effect[] {
  if (live.flows.some(({ remote }) => remote.address === server && FRAGILE[remote.port] !== undefined))
    return [];
  const [local] = live.addresses.filter((address) => ipFamily(address) === ipFamily(server));
  const flow: Flow = {
    local: { address: local ?? server, port: 700 },
    remote: { address: server, port: type.startsWith("nfs") ? 2049 : 445 },
    uid: undefined,
    process: "",
    pid: undefined,
    gid: undefined,
    cgroup: "",
  };
  if (decideOutbound(plan, live, flow)?.port === undefined) return [];
  return [
    {
      severity: "breaks",
      what: `${target} is mounted from ${server} (${type})`,
      why: "a mounted file system hangs when its connection ends",
      exclude: `--exclude-outbound-cidr ${server}/${server.includes(":") ? 128 : 32}`,
    },
  ];
}

/** Declared ports: who calls them now, and who really answers there. */
function servers(plan: CapturePlan, live: LiveMachine, flows: readonly Flow[]): Effect[] {
  const takes = (port: number): boolean => {
    const [rules] = plan.families;
    return (
      rules !== undefined &&
      decide(rules, {
        hook: "PREROUTING",
        family: rules.family,
        from: rules.family === 4 ? "203.0.113.1" : "2001:db8::1",
        fromPort: 40_000,
        to: live.addresses[0] ?? "",
        toPort: port,
        interface: "another",
        uid: undefined,
        gid: undefined,
        units: [],
        toThisMachine: true,
      }).port !== undefined
    );
  };
  const called = new Map<number, Set<string>>();
  for (const { local, remote } of flows) {
    if (live.addresses.includes(remote.address) || !takes(local.port)) continue;
    called.set(local.port, (called.get(local.port) ?? new Set()).add(remote.address));
  }
  const published = live.listeners.filter(
    ({ port, processes }) => processes.some(({ name }) => name === "docker-proxy") && takes(port),
  );
  return [
    ...[...called].map(
      ([port, clients]): Effect => ({
        severity: "changes",
        what: `port ${port}, called by ${[...clients].slice(0, 3).join(", ")}${clients.size > 3 ? ` and ${clients.size - 3} more` : ""}`,
        why: "new connections arrive through Envoy; with STRICT mutual TLS a client outside the mesh is refused",
        exclude: `--exclude-inbound-port ${port}`,
      }),
    ),
    ...published.map(
      ({ port }): Effect => ({
        severity: "breaks",
        what: `port ${port} is published by Docker`,
        why: "the mesh would take its connections before Docker sees them",
        exclude: `--exclude-inbound-port ${port}`,
      }),
    ),
  ];
}

const at = ({ address, port }: Flow["remote"]): string => `${bracketed(address)}:${port}`;

/** For `vmmesh iptables plan` and `vmmesh join --dry-run`. */
export function describePreview({ flows, effects, notes }: Preview): string {
  const breaking = effects.filter(({ severity }) => severity === "breaks").length;
  return [
    `On this machine now: ${flows} connections; ${effects.length - breaking} kinds of them would change, ${breaking} would break.`,
    ...effects.flatMap(({ severity, what, why, exclude }) => [
      `  ${severity === "breaks" ? "BREAKS " : "changes"} ${what}`,
      `          because: ${why}`,
      ...(exclude === "" ? [] : [`          to leave it out: ${exclude}`]),
    ]),
    ...notes.map((note) => `  Note: ${note}.`),
    "",
  ].join("\n");
}
