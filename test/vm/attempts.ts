import { UNITS } from "../../agent/platform/services.ts";
import type { Machine } from "../lab/lab.ts";

/** Who was taken over. */
export type Broken = "agent" | "envoy";

/** Something that a broken agent or Envoy might try; it has succeeded where it ends with 0. */
export interface Attempt {
  readonly what: string;
  /** For /bin/sh; `$AGENT` and `$ENVOY` are the processes' ids. */
  readonly command: string;
  /** Takes back at once what a success has changed. */
  readonly undo?: string;
  /** Default: both. */
  readonly by?: Broken;
  /** Only the unit's sandbox refuses it; for a shell outside it is harmless. */
  readonly harmlessOutside?: true;
}

const put = (path: string): Attempt => ({
  what: `make ${path}`,
  command: `mkdir -p "$(dirname ${path})" && echo x > ${path}`,
  undo: `rm ${path}`,
});
const write = (path: string): Attempt => ({ what: `write ${path}`, command: `: >> ${path}` });
const read = (path: string, by?: Broken): Attempt => ({
  what: `read ${path}`,
  command: `head -c1 ${path} | grep -q .`,
  ...(by === undefined ? {} : { by }),
});
const RULES = "/var/lib/vmmesh-host/rules/confirmed";

const memoryOf = (name: string, pid: string, by?: Broken): Attempt[] =>
  [
    { what: `read ${name}'s environment`, command: `cat /proc/${pid}/environ >/dev/null` },
    { what: `list ${name}'s files`, command: `ls -l /proc/${pid}/fd | grep -q socket` },
    { what: `read ${name}'s memory by /proc`, command: `python3 /opt/reach.py mem ${pid}` },
    {
      what: `read ${name}'s memory by process_vm_readv`,
      command: `python3 /opt/reach.py vm ${pid}`,
    },
    { what: `trace ${name}`, command: `python3 /opt/reach.py ptrace ${pid}` },
    { what: `send ${name} a signal`, command: `kill -0 ${pid}` },
  ].map((attempt) => ({ ...attempt, ...(by === undefined ? {} : { by }) }));

export const ATTEMPTS: readonly Attempt[] = [
  // ——— to become root
  { what: "sudo", command: "sudo -n true" },
  { what: "su", command: "su -c true root" },
  { what: "take root's uid", command: "python3 -c 'import os; os.setresuid(0, 0, 0)'" },
  { what: "take the other's uid", command: "setpriv --reuid=vmmesh-envoy --clear-groups true", by: "agent" },
  { what: "take the other's uid", command: "setpriv --reuid=vmmesh --clear-groups true", by: "envoy" },
  { what: "run a command in PID 1's namespaces", command: "nsenter -t 1 -m true" },
  {
    what: "make a file setuid",
    command: "cp /bin/true /tmp/door.suid && chmod 4755 /tmp/door.suid",
    undo: "rm -f /tmp/door.suid",
    harmlessOutside: true,
  },
  put("/etc/systemd/system/door.service"),
  put("/run/systemd/system/door.service"),
  put("/etc/systemd/system/vmmesh-rules.service.d/door.conf"),
  put("/etc/cron.d/door"),
  put("/etc/profile.d/door.sh"),
  put("/etc/tmpfiles.d/door.conf"),
  put("/etc/sysusers.d/door.conf"),
  put("/usr/local/sbin/door"),
  put("/run/door"),
  put("/var/lib/vmmesh-door"),
  write("/etc/passwd"),
  write("/etc/sudoers"),
  write("/etc/ld.so.cache"),
  write("/etc/vmmesh/sidecar.env"),
  write("/etc/vmmesh/cluster.env"),
  write("/etc/vmmesh/mesh.yaml"),
  write("/usr/bin/vmmesh"),
  write("/usr/lib/vmmesh/main.mjs"),
  write("/usr/lib/systemd/system/vmmesh-rules.service"),
  {
    what: "point /etc/vmmesh/envoy elsewhere",
    command: "ln -s /bin/true /etc/vmmesh/envoy.door && rm /etc/vmmesh/envoy.door",
  },
  read("/etc/shadow"),
  read("/var/lib/vmmesh-host/join.json"),
  ...["plan.json", "boot.nft", "undo.sh", "mend.sh"].map((name) => write(`${RULES}/${name}`)),
  write("/run/vmmesh-capture.json"),
  write("/run/vmmesh-hold/in"),
  {
    what: "put something else in the place of the monitor's FIFO",
    command: "mv /run/vmmesh-nftmon/events /run/vmmesh-nftmon/door",
    undo: "mv /run/vmmesh-nftmon/door /run/vmmesh-nftmon/events",
  },
  {
    what: "put something else in the place of /run/vmmesh",
    command: "mv /run/vmmesh /run/vmmesh.door",
    undo: "mv /run/vmmesh.door /run/vmmesh",
  },
  {
    what: "put something else in the place of /var/lib/vmmesh",
    command: "mv /var/lib/vmmesh /var/lib/vmmesh.door",
    undo: "mv /var/lib/vmmesh.door /var/lib/vmmesh",
  },
  ...memoryOf("PID 1", "1"),
  // ——— by asking systemd, over D-Bus and polkit
  { what: "restart a unit", command: "systemctl --no-ask-password restart vmmesh-rules.timer" },
  { what: "reload systemd", command: "systemctl --no-ask-password daemon-reload" },
  {
    what: "set a property of a unit",
    command: "systemctl --no-ask-password set-property --runtime vmmesh-rules.timer Description=door",
    undo: "systemctl revert vmmesh-rules.timer",
  },
  { what: "run a command as a unit", command: "systemd-run --no-ask-password --wait -q true" },
  {
    what: "have a session after the unit's end",
    command: 'loginctl --no-ask-password enable-linger "$(id -un)"',
    undo: 'loginctl disable-linger "$(id -un)"',
  },
  {
    what: "speak to systemd's private socket",
    command: "python3 /opt/reach.py connect /run/systemd/private",
  },
  { what: "name the machine", command: 'hostnamectl --no-ask-password hostname "$(hostname)"' },
  // ——— Envoy's memory, the agent's, and both's secrets
  ...memoryOf("Envoy", "$ENVOY", "agent"),
  ...memoryOf("the agent", "$AGENT", "envoy"),
  {
    what: "enter Envoy's cgroup",
    command: "echo $$ > /sys/fs/cgroup/system.slice/vmmesh-envoy.service/cgroup.procs",
    by: "agent",
  },
  ...["token", "last-good", "identity/current/key.pem"].map((name) =>
    read(`/var/lib/vmmesh/${name}`, "envoy"),
  ),
  { what: "list the agent's state", command: "ls /var/lib/vmmesh", by: "envoy" },
  { what: "ask at the agent's admin socket", command: "vmmesh status", by: "envoy" },
  {
    what: "ask for a repair of the rules",
    command: ": > /run/vmmesh/repair-request",
    by: "envoy",
  },
  { what: "change its own bootstrap", command: ": >> /run/vmmesh/bootstrap.json", by: "envoy" },
  // ——— the firewall, and what it stands on
  { what: "add an nft table", command: "nft add table inet door", undo: "nft delete table inet door" },
  { what: "list the rules of the fence", command: "nft list table inet vmmesh-fence" },
  ...["iptables", "ip6tables", "iptables-legacy"].map((program) => ({
    what: `${program} -A`,
    command: `${program} -t mangle -A PREROUTING -p tcp --dport 1 -j ACCEPT`,
    undo: `${program} -t mangle -D PREROUTING -p tcp --dport 1 -j ACCEPT`,
  })),
  { what: "forget a connection", command: "conntrack -F expect" },
  {
    what: "add a routing rule",
    command: "ip rule add pref 31000 from 192.0.2.99 lookup main",
    undo: "ip rule del pref 31000",
  },
  {
    what: "add an address",
    command: "ip addr add 192.0.2.98/32 dev lo",
    undo: "ip addr del 192.0.2.98/32 dev lo",
  },
  { what: "take lo down and up", command: "ip link set lo up" },
  { what: "set a sysctl", command: "sysctl -w net.ipv4.ip_forward=$(sysctl -n net.ipv4.ip_forward)" },
  { what: "open a packet socket", command: "python3 /opt/reach.py packet" },
  { what: "open a raw socket", command: "python3 /opt/reach.py raw" },
  { what: "have a user namespace", command: "unshare -Ur true", harmlessOutside: true },
  { what: "mount", command: "mount -t tmpfs none /mnt", undo: "umount /mnt" },
  { what: "make a device", command: "mknod /tmp/door.null c 1 3", undo: "rm /tmp/door.null" },
];

const REACH = `
import ctypes, os, socket, sys
def place(pid):
    for line in open(f"/proc/{pid}/maps"):
        span, mode = line.split()[:2]
        if mode.startswith("rw"):
            return int(span.split("-")[0], 16)
def mem(pid):
    with open(f"/proc/{pid}/mem", "rb") as it:
        it.seek(place(pid))
        assert len(it.read(16)) == 16
libc = ctypes.CDLL(None, use_errno=True)
class Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]
def vm(pid):
    # Where it is mapped is not known to who may not read that: any mapped address shows whether the call is allowed.
    at = place(pid)
    into = ctypes.create_string_buffer(16)
    ours, theirs = Span(ctypes.addressof(into), 16), Span(at, 16)
    assert libc.process_vm_readv(int(pid), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0) == 16
def ptrace(pid):
    # PTRACE_SEIZE does not stop it; a tracer that ends lets go.
    assert libc.ptrace(0x4206, int(pid), None, None) == 0
def connect(path):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        try:
            socket.socket(socket.AF_UNIX, kind).connect(path)
            return
        except OSError as error:
            if error.errno != 91: raise
def packet(): socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300)
def raw(): socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
globals()[sys.argv[1]](*sys.argv[2:])
`;

/** Status of each command, in their order. */
type Statuses = readonly number[];

function script(attempts: readonly Attempt[], pids: Readonly<Record<"AGENT" | "ENVOY", number>>): string {
  const lines = attempts.map(({ command, undo = "true" }, index) => {
    const quoted = `'${command.replaceAll("'", `'\\''`)}'`;
    return [
      `timeout 5 /bin/sh -c ${quoted} </dev/null >/dev/null 2>&1`,
      `code=$?; echo "status ${index} $code"; [ $code != 0 ] || { ${undo}; } >/dev/null 2>&1`,
    ].join("\n");
  });
  return [`export AGENT=${pids.AGENT} ENVOY=${pids.ENVOY}`, "cd /", ...lines, ""].join("\n");
}

function statusesIn(text: string, count: number): Statuses {
  const found = [...text.matchAll(/^status (\d+) (\d+)$/gm)].map(([, , code]) => Number(code));
  if (found.length !== count) throw new Error(`${found.length} of ${count} commands were run:\n${text}`);
  return found;
}

const USER: Readonly<Record<Broken, string>> = { agent: "vmmesh", envoy: "vmmesh-envoy" };

async function pidsOf(machine: Machine): Promise<Record<"AGENT" | "ENVOY", number>> {
  const pid = async (unit: string): Promise<number> =>
    Number((await machine.exec(["systemctl", "show", "-P", "MainPID", unit])).stdout);
  return { AGENT: await pid(UNITS.agent), ENVOY: await pid(UNITS.envoy) };
}

export async function asRoot(machine: Machine, attempts: readonly Attempt[]): Promise<Statuses> {
  machine.putFile("/opt/reach.py", REACH);
  machine.putFile("/opt/attempts.sh", script(attempts, await pidsOf(machine)));
  return statusesIn((await machine.exec("sh /opt/attempts.sh")).stdout, attempts.length);
}

/** As the user, with no sandbox around. */
export async function outside(
  machine: Machine,
  who: Broken,
  attempts: readonly Attempt[],
): Promise<Statuses> {
  machine.putFile("/opt/attempts.sh", script(attempts, await pidsOf(machine)));
  const user = USER[who];
  const { stdout } = await machine.exec(
    `setpriv --reuid=${user} --regid=${user} --init-groups sh /opt/attempts.sh`,
  );
  return statusesIn(stdout, attempts.length);
}

/** In place of the program that the unit starts: its own user, groups, namespaces, capabilities and system calls. */
export async function inUnit(machine: Machine, who: Broken, attempts: readonly Attempt[]): Promise<Statuses> {
  const text = machine.getFile(`/usr/lib/systemd/system/${UNITS[who]}`);
  const [, service = ""] = /^\[Service\]\n([\s\S]*?)\n\[Install\]/m.exec(text) ?? [];
  const kept = service
    .split("\n")
    .filter(
      (line) => !/^(Type|NotifyAccess|Exec\w+|WatchdogSec|Restart\w*|Timeout\w+|Standard\w+)=/.test(line),
    );
  machine.putFile("/opt/attempts.sh", script(attempts, await pidsOf(machine)));
  machine.putFile(
    "/run/systemd/system/broken.service",
    [
      "[Service]",
      ...kept,
      "Type=oneshot",
      "RuntimeDirectoryPreserve=yes",
      "ExecStart=/bin/sh /opt/attempts.sh",
      "StandardOutput=truncate:/opt/attempts.out",
      "",
    ].join("\n"),
  );
  await machine.exec("systemctl daemon-reload && systemctl start broken.service");
  const out = machine.getFile("/opt/attempts.out");
  await machine.exec("rm /run/systemd/system/broken.service && systemctl daemon-reload");
  return statusesIn(out, attempts.length);
}
