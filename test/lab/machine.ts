import { randomUUID } from "node:crypto";
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { envoy, machineTree, packageLayer } from "./build.ts";
import { cgroupOf, removeCgroup } from "./cgroup.ts";
import { netnsOf } from "./controlplane.ts";
import { exclusively } from "./lock.ts";
import { ADDRESS, ENVOY, ISTIO_BIN, KUBE_BIN, RELEASE } from "./parts.ts";
import { childrenOf, type Output, type ShOptions, say, sh, sleep, waitFor } from "./sh.ts";
import {
  changeState,
  folderOf,
  isRunning,
  lives,
  type MachineState,
  readState,
  start,
  stop,
} from "./state.ts";

export interface MachineOptions {
  /** A deb to install. */
  readonly deb?: string;
  /** Version of the stock Envoy at /usr/local/bin/envoy; "none" leaves it out. */
  readonly envoy?: string;
  /** Debian's release; "bookworm" if none is named. A tree that is missing is made first, in a minute. */
  readonly release?: string;
  /** Debian packages to have beside; none of their services starts by itself. */
  readonly packages?: readonly string[];
}

/** A real systemd machine: an overlay over the Debian tree, PID 1 by systemd-nspawn, a leg in the lab's bridge. */
export class Machine {
  readonly id: string;
  readonly name: string;
  readonly number: number;

  constructor(id: string, name: string, number: number) {
    this.id = id;
    this.name = name;
    this.number = number;
  }

  get ip(): string {
    return ADDRESS.machine(this.number);
  }

  get ip6(): string {
    return ADDRESS.machine6(this.number);
  }

  get root(): string {
    return `${folderOf(this.id)}/machine-${this.name}/root`;
  }

  /** PID of the machine's systemd as this machine sees it. @throws {Error} while it does not run */
  get pid(): number {
    const pid = initOf(this.id, this.name);
    if (pid === undefined) throw new Error(`machine ${this.name} does not run`);
    return pid;
  }

  /** Folder of the cgroup that holds every process of the machine, but for what `exec` starts. */
  get cgroup(): string {
    return `${cgroupOf(this.id, this.name)}/payload`;
  }

  /** Stops every process of the machine where it stands. Resolves when the kernel says that all do. */
  async freeze(): Promise<void> {
    writeFileSync(`${this.cgroup}/cgroup.freeze`, "1");
    await waitFor(`${this.name} to stand still`, async () => this.isFrozen || undefined, 10_000, 10);
  }

  get isFrozen(): boolean {
    return readFileSync(`${this.cgroup}/cgroup.events`, "utf8").includes("frozen 1");
  }

  thaw(): void {
    writeFileSync(`${this.cgroup}/cgroup.freeze`, "0");
  }

  /** Runs argv, or a line for /bin/sh, in the machine as root. */
  exec(command: string | readonly string[], { env = {}, ...options }: ShOptions = {}): Promise<Output> {
    const argv = typeof command === "string" ? ["/bin/sh", "-c", command] : command;
    return sh(
      [
        "nsenter",
        "-t",
        String(this.pid),
        "-a",
        "/usr/bin/env",
        "-i",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/root",
        "LC_ALL=C.UTF-8",
        ...Object.entries(env).map(([name, value]) => `${name}=${value}`),
        ...argv,
      ],
      { timeoutMs: 120_000, ...options },
    );
  }

  /** Where this machine sees a path of the running machine: with what is mounted inside, as on /tmp and /run. */
  #inside(path: string): string {
    const init = initOf(this.id, this.name);
    return `${init === undefined ? this.root : `/proc/${init}/root`}${path}`;
  }

  /** @param path absolute, without a symlink to an absolute path in it (/run, not /var/run) */
  putFile(path: string, data: string | Uint8Array, mode = 0o644): void {
    const target = this.#inside(path);
    mkdirSync(target.slice(0, target.lastIndexOf("/")), { recursive: true });
    writeFileSync(target, data, { mode });
    // The mode above is cut by the umask, and is nothing to a file that was there.
    chmodSync(target, mode);
  }

  getFile(path: string): string {
    return readFileSync(this.#inside(path), "utf8");
  }

  /** Resolves when the machine is up again: another PID 1, its network back. */
  async reboot(): Promise<void> {
    const before = this.pid;
    await this.exec("systemctl reboot", { allowFail: true });
    await waitFor(
      `${this.name} to go down`,
      async () => (initOf(this.id, this.name) === before ? undefined : true),
      60_000,
      50,
    );
    await this.#ready();
  }

  /** An orderly end; the disk stays for `boot`. */
  async poweroff(): Promise<void> {
    await this.exec("systemctl poweroff", { allowFail: true });
    await this.#down();
  }

  /** The power cord pulled: no process of the machine gets a signal that it could handle. The disk stays for `boot`. */
  async kill(): Promise<void> {
    const init = initOf(this.id, this.name);
    if (init !== undefined) process.kill(init, "SIGKILL");
    await this.#down();
  }

  /** Starts a machine that is down, on its old disk. */
  async boot(): Promise<void> {
    startSupervisor(this);
    await this.#ready();
  }

  async #down(): Promise<void> {
    await waitFor(
      `${this.name} to be down`,
      async () => (isRunning(this.id, `machine-${this.name}`) ? undefined : true),
      60_000,
      50,
    );
  }

  async waitUntilUp(): Promise<void> {
    await this.#ready();
  }

  async #ready(): Promise<void> {
    await waitFor(
      `${this.name} to come up`,
      async () => {
        const state = (await this.exec("systemctl is-system-running", { allowFail: true })).stdout.trim();
        const address = (await this.exec("ip -br address show eth0", { allowFail: true })).stdout;
        return (state === "running" || state === "degraded") && address.includes(this.ip) ? true : undefined;
      },
      60_000,
      100,
    );
  }
}

const folder = (id: string, name: string): string => `${folderOf(id)}/machine-${name}`;

/** The machine's PID 1: the child of the nspawn process that the supervisor has started. */
export function initOf(id: string, name: string): number | undefined {
  const root = `${folder(id, name)}/root`;
  for (const pid of readdirSync("/proc").filter((it) => /^\d+$/.test(it))) {
    try {
      const argv = readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0");
      if (!argv[0]?.endsWith("systemd-nspawn") || !argv.includes(root)) continue;
      for (const child of childrenOf(Number(pid))) {
        const name0 = readFileSync(`/proc/${child}/cmdline`, "utf8").split("\0")[0] ?? "";
        if (name0.endsWith("/systemd") || name0 === "/sbin/init") return child;
      }
    } catch {
      // It ended while we looked.
    }
  }
  return undefined;
}

/** Boots a machine of this name, or finds the one that runs. */
export function bootMachine(id: string, name: string, options: MachineOptions = {}): Promise<Machine> {
  return exclusively(`${id}-machine-${name}`, () => findOrBoot(id, name, options));
}

async function findOrBoot(id: string, name: string, options: MachineOptions): Promise<Machine> {
  const known = readState(id).machines[name];
  let machine: Machine;
  if (known !== undefined && isRunning(id, `machine-${name}`)) {
    machine = new Machine(id, name, known.number);
    await machine.waitUntilUp();
  } else {
    await remove(id, name);
    const version = options.envoy ?? ENVOY;
    const { machines } = changeState(id, (state) => ({
      ...state,
      machines: { ...state.machines, [name]: { number: freeNumber(state.machines), envoy: version } },
    }));
    machine = new Machine(id, name, machines[name]?.number ?? 0);
    const release = options.release ?? RELEASE;
    const { packages = [] } = options;
    const layers = packages.length > 0 ? [await packageLayer(release, packages)] : [];
    await prepareTree(machine, version, [...layers, await machineTree(release)].join(":"));
    startSupervisor(machine);
    await machine.waitUntilUp();
    say(`machine ${name} is up at ${machine.ip}`);
  }
  if (options.deb !== undefined) {
    copyFileSync(options.deb, `${machine.root}/root/vmmesh.deb`);
    await machine.exec("dpkg -i /root/vmmesh.deb");
  }
  return machine;
}

function startSupervisor({ id, name, number }: Machine): void {
  const program = new URL("./supervisor.ts", import.meta.url).pathname;
  start(id, `machine-${name}`, [process.execPath, program, id, name, String(number)]);
}

function freeNumber(machines: Readonly<Record<string, MachineState>>): number {
  const used = Object.values(machines).map(({ number }) => number);
  for (let number = 1; ; number += 1) if (!used.includes(number)) return number;
}

async function prepareTree(machine: Machine, version: string, tree: string): Promise<void> {
  const at = folder(machine.id, machine.name);
  for (const part of ["upper", "work", "root"]) mkdirSync(`${at}/${part}`, { recursive: true });
  await sh([
    "mount",
    "-t",
    "overlay",
    "overlay",
    "-o",
    `lowerdir=${tree},upperdir=${at}/upper,workdir=${at}/work`,
    machine.root,
  ]);
  // Without one it would be a first boot: systemd-firstboot asks a console that is not there, and the machine is degraded.
  machine.putFile("/etc/machine-id", `${randomUUID().replaceAll("-", "")}\n`, 0o444);
  machine.putFile("/etc/hostname", `${machine.name}\n`);
  machine.putFile("/etc/hosts", `127.0.0.1 localhost\n::1 localhost\n127.0.1.1 ${machine.name}\n`);
  machine.putFile("/etc/resolv.conf", `nameserver ${ADDRESS.controlPlane}\n`);
  if (version !== "none") copyFileSync(await envoy(version), `${machine.root}/usr/local/bin/envoy`);
  copyFileSync(`${KUBE_BIN}/kube-proxy`, `${machine.root}/usr/local/bin/kube-proxy`);
  copyFileSync(`${ISTIO_BIN}/pilot-agent`, `${machine.root}/usr/local/bin/pilot-agent`);
}

/** One leg of the machine in the lab's bridge; called at each boot. */
export async function connect(id: string, number: number, pid: number): Promise<void> {
  const leg = `m${number}-${process.pid % 10_000}`;
  await sh(["ip", "-n", netnsOf(id), "link", "delete", `m${number}`], { allowFail: true });
  await sh(["ip", "-n", netnsOf(id), "link", "add", `m${number}`, "type", "veth", "peer", "name", leg]);
  await sh(["ip", "-n", netnsOf(id), "link", "set", leg, "netns", String(pid), "name", "eth0"]);
  await sh(["ip", "-n", netnsOf(id), "link", "set", `m${number}`, "master", "br0", "up"]);
  const inside = (...argv: string[]) => sh(["nsenter", "-t", String(pid), "-n", "ip", ...argv]);
  await inside("link", "set", "lo", "up");
  await inside("link", "set", "eth0", "up");
  await inside("address", "add", `${ADDRESS.machine(number)}/24`, "dev", "eth0");
  await inside("-6", "address", "add", `${ADDRESS.machine6(number)}/64`, "dev", "eth0", "nodad");
  await inside("route", "add", "default", "via", ADDRESS.controlPlane);
  await inside("-6", "route", "add", "default", "via", ADDRESS.controlPlane6);
}

/** Ends a machine and removes its tree. */
export function removeMachine(id: string, name: string): Promise<void> {
  return exclusively(`${id}-machine-${name}`, () => remove(id, name));
}

async function remove(id: string, name: string): Promise<void> {
  const at = folder(id, name);
  const supervisor = readState(id).processes.find((it) => it.name === `machine-${name}`);
  if (supervisor !== undefined && lives(supervisor)) await stop(id, `machine-${name}`, 10_000);
  const init = initOf(id, name);
  if (init !== undefined) process.kill(init, "SIGKILL");
  for (let tries = 0; initOf(id, name) !== undefined && tries < 100; tries += 1) await sleep(50);
  await waitFor(`${at}/root to be unmounted`, async () => {
    if (!readFileSync("/proc/self/mounts", "utf8").includes(` ${at}/root `)) return true;
    await sh(["umount", `${at}/root`], { allowFail: true });
    return undefined;
  });
  rmSync(at, { recursive: true, force: true });
  removeCgroup(cgroupOf(id, name));
  changeState(id, (state) => {
    const { [name]: _gone, ...machines } = state.machines;
    return { ...state, machines };
  });
}
