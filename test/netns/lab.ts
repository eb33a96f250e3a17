import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { applyPlan, type Trial } from "../../agent/iptables/apply.ts";
import { withoutCounters } from "../../agent/iptables/parse.ts";
import type { CaptureWish, MachineFacts } from "../../agent/iptables/plan/wish.ts";
import { planCapture } from "../../agent/iptables/plan.ts";
import { readMachine } from "../../agent/iptables/read.ts";
import { type RenderedPlan, renderPlan } from "../../agent/iptables/render.ts";
import type { CommandResult, Host } from "../../agent/platform/host.ts";
import { linuxHost } from "../../agent/platform/linux.ts";

/** Users of the tests: numbers without names, as in a container. */
export const UID = { app: 20_001, agent: 20_002, envoy: 20_003 } as const;

/** What answers where: the text that a listener sends when it is reached. */
export const SERVICE = { ip: "10.96.0.10", ip6: "fd96::10" } as const;
export const MACHINE = { ip: "10.200.0.1", ip6: "fd02::1" } as const;
export const REMOTE = { ip: "10.200.0.2", ip6: "fd02::2" } as const;

export const WISH: CaptureWish = {
  agentUid: UID.agent,
  envoyUid: UID.envoy,
  inbound: { kind: "ports", ports: [9000] },
  sshPorts: [22],
  outbound: { cidrs: ["*"], excludeCidrs: [], excludePorts: [] },
  meshCidrs: ["10.96.0.0/12", "fd96::/64"],
  dns: undefined,
  ipv6: true,
  istiod: [],
  keep: [],
};

/** What `readMachine` says of a kernel without nf_tables. */
export const LEGACY = {
  backend: "legacy",
  programs: { 4: "iptables-legacy", 6: "ip6tables-legacy" },
  nft: false,
} as const satisfies Partial<MachineFacts>;

/** One listener for each family. */
export const both = (port: number, name: string) =>
  [
    ["0.0.0.0", port, name],
    ["::", port, name],
  ] as const;

interface Listeners {
  /** Name of the process, as ps shows it. */
  comm?: string;
  tcp?: readonly (readonly [address: string, port: number, name: string])[];
  /** Envoy's inbound listener in TPROXY mode, with CAP_NET_RAW alone. */
  relay?: readonly (readonly [address: string, port: number, name: string])[];
  /** Says its name and the client's address. */
  tell?: readonly (readonly [address: string, port: number, name: string])[];
  udp?: readonly (readonly [address: string, port: number, name: string])[];
  /** Health checks: a connection every half second. */
  beat?: readonly (readonly [address: string, port: number])[];
  /** A datagram a second. */
  question?: readonly (readonly [address: string, port: number])[];
}

const PEER = new URL("peer.py", import.meta.url).pathname;

/** Two namespaces and a wire: a machine that joins the mesh, and all the rest of the world. */
export class Lab implements AsyncDisposable {
  readonly machine: string;
  readonly world: string;
  readonly rulesDir: string;
  readonly host: Host;
  readonly #directory: string;
  readonly #children = new Set<ChildProcess>();
  readonly #outside = linuxHost();

  private constructor(id: string) {
    this.machine = `vm${id}m`;
    this.world = `vm${id}w`;
    this.#directory = mkdtempSync(join(tmpdir(), "vmmesh-netns-"));
    this.rulesDir = join(this.#directory, "rules");
    // The machine's tables belong to its namespace, so both programs and /proc/net are asked in there.
    this.host = {
      ...this.#outside,
      run: (command, signal) =>
        this.#outside.run(
          {
            ...command,
            argv: ["ip", "netns", "exec", this.machine, ...command.argv],
            env: { XTABLES_LOCKFILE: join(this.#directory, "xtables.lock") },
          },
          signal,
        ),
      files: {
        ...this.#outside.files,
        readText: async (path) =>
          path.startsWith("/proc/net/")
            ? (await this.inside(["cat", path])).stdout
            : this.#outside.files.readText(path),
      },
    };
  }

  static async make(): Promise<Lab> {
    if (process.getuid?.() !== 0)
      throw new Error("the netns tests make network namespaces: run them as root");
    const lab = new Lab(Buffer.from(linuxHost().random(3)).toString("hex"));
    const ip = (text: string): Promise<string> => lab.#must(["ip", ...text.split(" ")]);
    for (const namespace of [lab.machine, lab.world]) {
      await ip(`netns add ${namespace}`);
      await ip(`-n ${namespace} link set lo up`);
    }
    await ip(`-n ${lab.machine} link add eth0 type veth peer name eth0 netns ${lab.world}`);
    for (const [namespace, { ip: v4, ip6 }] of [
      [lab.machine, MACHINE],
      [lab.world, REMOTE],
    ] as const) {
      await ip(`-n ${namespace} addr add ${v4}/24 dev eth0`);
      await ip(`-n ${namespace} addr add ${ip6}/64 dev eth0 nodad`);
      await ip(`-n ${namespace} link set eth0 up`);
      await lab.#must([
        "ip",
        "netns",
        "exec",
        namespace,
        "sysctl",
        "-qw",
        "net.ipv4.ip_unprivileged_port_start=0",
      ]);
    }
    await ip(`-n ${lab.machine} route add default via ${REMOTE.ip}`);
    await ip(`-n ${lab.machine} -6 route add default via ${REMOTE.ip6}`);
    await ip(`-n ${lab.world} addr add ${SERVICE.ip}/32 dev lo`);
    await ip(`-n ${lab.world} addr add ${SERVICE.ip6}/128 dev lo nodad`);
    return lab;
  }

  /** The usual cast: Envoy, an application and sshd here; the service, its pod and a stranger out there. */
  async populate(): Promise<{ envoy: ChildProcess }> {
    const envoy = await this.serve(this.machine, UID.envoy, {
      comm: "envoy",
      tcp: [...both(15001, "ENVOY-OUT"), ...both(15006, "ENVOY-IN")],
      beat: [
        ["127.77.0.1", 15001],
        ["::6", 15001],
      ],
    });
    await this.serve(this.machine, UID.app, {
      tcp: [...both(9000, "APP"), ...both(22, "SSHD"), ...both(9001, "OTHER")],
    });
    await this.serve(this.world, UID.app, { tcp: [...both(80, "DIRECT"), ...both(8080, "POD")] });
    return { envoy };
  }

  async serve(namespace: string, uid: number, listeners: Listeners): Promise<ChildProcess> {
    const child = this.#peer(namespace, ["serve", String(uid), JSON.stringify(listeners)]);
    await nextLine(child);
    return child;
  }

  /** What a new TCP connection of this user meets: a listener's name, `refused`, `reset` or `timeout`. */
  async dial(
    uid: number | `${number}:${number}`,
    address: string,
    port: number,
    from = this.machine,
  ): Promise<string> {
    return this.#once(from, ["dial", String(uid), address, String(port)]);
  }

  async ask(uid: number | `${number}:${number}`, address: string, port: number): Promise<string> {
    return this.#once(this.machine, ["ask", String(uid), address, String(port)]);
  }

  /** One question on one socket, asked again after 5 s. */
  async askTwice(uid: number, address: string, port: number): Promise<string> {
    return this.#once(this.machine, ["retry", String(uid), address, String(port)]);
  }

  /** A connection that stays open; `alive()` sends something through it. */
  async hold(
    from: string,
    uid: number,
    address: string,
    port: number,
  ): Promise<{ met: string; alive(): Promise<string> }> {
    const child = this.#peer(from, ["hold", String(uid), address, String(port)]);
    const met = await nextLine(child);
    return {
      met,
      alive: async () => {
        child.stdin?.write("still there\n");
        return nextLine(child);
      },
    };
  }

  /** Runs a program in the machine's namespace. */
  inside(argv: readonly [string, ...string[]], input?: string): Promise<CommandResult> {
    return this.host.run({ argv, ...(input === undefined ? {} : { input }) });
  }

  /** Runs a program of the test's own, outside the namespaces. @throws if it fails */
  outside(argv: readonly [string, ...string[]]): Promise<string> {
    return this.#must(argv);
  }

  async insideShell(script: string): Promise<string> {
    const result = await this.inside(["sh", "-ec", script]);
    if (result.code !== 0) throw new Error(`${script}: ${result.stderr}`);
    return result.stdout;
  }

  /** Everything in force, without counters: equal before and after means nothing was left and nothing was lost. */
  async firewall(backend: "nft" | "legacy" = "nft"): Promise<string[]> {
    const texts = await Promise.all([
      this.inside([`iptables-${backend}-save`]),
      this.inside([`ip6tables-${backend}-save`]),
      this.inside(["nft", "-s", "-t", "list", "ruleset"]),
    ]);
    // Tables are printed in the order of their making, which says nothing about what they do.
    return texts.flatMap(({ stdout }) =>
      withoutCounters(stdout)
        .join("\n")
        .split(/\n(?=\*|table )/)
        // What iptables-nft made is compared in its own words above.
        .filter((table) => !/^table ip6? (raw|mangle|nat|filter) /.test(table))
        .sort()
        .flatMap((table) => table.split("\n")),
    );
  }

  async rendered(wish: CaptureWish, facts: Partial<MachineFacts> = {}): Promise<RenderedPlan> {
    return renderPlan(planCapture(wish, { ...(await readMachine(this.host)), ...facts }));
  }

  /** A trial of these rules; without a word it goes back after a minute. */
  async apply(
    wish: CaptureWish = WISH,
    facts: Partial<MachineFacts> = {},
    confirmWithinMs = 60_000,
  ): Promise<Trial> {
    const { host, rulesDir } = this;
    return applyPlan(host, await this.rendered(wish, facts), { confirmWithinMs, rulesDir, unit: "detached" });
  }

  /** The same, confirmed. */
  async install(wish?: CaptureWish, facts?: Partial<MachineFacts>): Promise<Trial> {
    const trial = await this.apply(wish, facts);
    await trial.confirm();
    return trial;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const child of this.#children) child.kill("SIGKILL");
    for (const namespace of [this.machine, this.world]) await this.#must(["ip", "netns", "del", namespace]);
    rmSync(this.#directory, { recursive: true, force: true });
  }

  #peer(namespace: string, args: readonly string[]): ChildProcess {
    const child = spawn("ip", ["netns", "exec", namespace, "/usr/bin/python3", PEER, ...args], {
      stdio: ["pipe", "pipe", "inherit"],
    });
    this.#children.add(child);
    return child;
  }

  async #once(namespace: string, args: readonly string[]): Promise<string> {
    return (await this.#must(["ip", "netns", "exec", namespace, "/usr/bin/python3", PEER, ...args])).trim();
  }

  async #must(argv: readonly [string, ...string[]]): Promise<string> {
    const result = await this.#outside.run({ argv });
    if (result.code !== 0) throw new Error(`${argv.join(" ")}: ${result.stderr}`);
    return result.stdout;
  }
}

/** Polls until a condition of the kernel's own timers holds; there is no event to wait for. */
export async function eventually(what: () => Promise<boolean>, withinMs: number): Promise<number> {
  const { clock } = linuxHost();
  const started = clock.monotonicMs();
  while (!(await what())) {
    if (clock.monotonicMs() - started > withinMs) throw new Error(`not within ${withinMs} ms`);
    await clock.sleep(50);
  }
  return clock.monotonicMs() - started;
}

function nextLine(child: ChildProcess): Promise<string> {
  return new Promise((resolve, reject) => {
    if (child.stdout === null) return reject(new Error("no output"));
    const lines = createInterface({ input: child.stdout });
    child.once("exit", (code) => reject(new Error(`ended with ${code}`)));
    lines.once("line", (line) => {
      lines.close();
      resolve(line);
    });
  });
}
