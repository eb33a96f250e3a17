import { type ChildProcess, execFile, spawn } from "node:child_process";
import { closeSync, constants, openSync } from "node:fs";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Duplex } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { Latest } from "../../agent/core/signals.ts";
import { formatSpiffe } from "../../agent/core/spiffe.ts";
import { EnvoyAdmin, type EnvoyReadiness } from "../../agent/envoy/admin.ts";
import { envoyArgv, renderBootstrap } from "../../agent/envoy/bootstrap.ts";
import { enroll, targetOf } from "../../agent/identity/enroll.ts";
import type { Svid } from "../../agent/identity/svid.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { serveSds } from "../../agent/sds/serve.ts";
import { AdsRelay } from "../../agent/xds/relay.ts";
import type { Target } from "../controlplane/contract.ts";

const run = promisify(execFile);

export interface MachineOptions {
  readonly binary: string;
  /** Address of its one interface, in 10.77.0.0/24. */
  readonly address: string;
  readonly target: Target;
  /** What Envoy finds at /dev/stdout: a socket is what journald gives, a FIFO what our unit gives. */
  readonly stdout: "socket" | "fifo";
}

/**
 * A network namespace with a real Envoy that our bootstrap configures, and the rooms of the agent that it needs (identity,
 * sds, xds) in this process: no daemon, no systemd, none of vmmesh's rules.
 */
export class TestMachine {
  readonly name: string;
  readonly address: string;
  readonly admin: EnvoyAdmin;
  readonly #folder: string;
  readonly #children: ChildProcess[] = [];
  readonly #scope = new AbortController();
  readonly #tasks: Promise<void>[] = [];
  #relay: AdsRelay | undefined;

  private constructor(name: string, address: string, folder: string) {
    this.name = name;
    this.address = address;
    this.#folder = folder;
    this.admin = new EnvoyAdmin(linuxHost().net, join(folder, "admin.sock"));
  }

  static async start(options: MachineOptions): Promise<TestMachine> {
    const name = `vmt${process.pid}-${options.address.split(".").at(-1)}`;
    const machine = new TestMachine(name, options.address, await mkdtemp(join(tmpdir(), "vmmesh-machine-")));
    await machine.#network();
    await machine.#agent(options.target);
    await machine.#envoy(options);
    return machine;
  }

  /** Joins the two with a cable, and gives each the way to the mesh's addresses. */
  static async cable(a: TestMachine, b: TestMachine): Promise<void> {
    await run("ip", [
      "link",
      "add",
      "eth0",
      "netns",
      a.name,
      "type",
      "veth",
      "peer",
      "name",
      "eth0",
      "netns",
      b.name,
    ]);
    for (const { name, address } of [a, b]) {
      await run("ip", ["-n", name, "addr", "add", `${address}/24`, "dev", "eth0"]);
      await run("ip", ["-n", name, "link", "set", "eth0", "up"]);
      await run("ip", ["-n", name, "route", "add", "10.96.0.0/16", "dev", "eth0"]);
    }
  }

  /** The least capture: services outbound, port 9080 inbound. The rules of vmmesh have tests of their own. */
  async capture(): Promise<void> {
    const rules = `table ip nat {
      chain out { type nat hook output priority -100; ip daddr 10.96.0.0/16 meta l4proto tcp redirect to :15001; }
      chain in { type nat hook prerouting priority -100; iifname "eth0" tcp dport 9080 redirect to :15006; }
    }`;
    await run("ip", ["netns", "exec", this.name, "nft", rules]);
  }

  /** Runs JavaScript in the namespace. @returns what it prints */
  async node(script: string): Promise<string> {
    const argv = ["netns", "exec", this.name, process.execPath, "--input-type=module", "-e", script];
    return (await run("ip", argv, { timeout: 20_000 })).stdout;
  }

  /** An app on port 9080 of all addresses that answers with the request's headers as JSON. */
  async serveHeaders(): Promise<void> {
    const script = `import { createServer } from "node:http";
      createServer((q, r) => r.end(JSON.stringify(q.headers))).listen(9080, "0.0.0.0", () => console.log("up"));`;
    const argv = ["netns", "exec", this.name, process.execPath, "--input-type=module", "-e", script];
    const app = spawn("ip", argv, { stdio: ["ignore", "pipe", "inherit"] });
    this.#children.push(app);
    await new Promise((resolve) => app.stdout.once("data", resolve));
  }

  /** Asks until the answer fits, twenty times a second, for twenty seconds. */
  async untilReadiness(fits: (state: EnvoyReadiness) => boolean): Promise<EnvoyReadiness> {
    let state = await this.admin.readiness();
    for (let attempt = 0; attempt < 400 && !fits(state); attempt += 1) {
      await sleep(50);
      state = await this.admin.readiness();
    }
    return state;
  }

  /** How often the way to the control plane was opened again. */
  reconnects(): number {
    return this.#relay?.status().reconnects ?? 0;
  }

  /** What Envoy wrote to /dev/stdout; only where that is a FIFO. */
  accessLog(): Promise<string> {
    return readFile(join(this.#folder, "access.log"), "utf8");
  }

  envoyLog(): Promise<string> {
    return readFile(join(this.#folder, "envoy.log"), "utf8");
  }

  async stop(): Promise<void> {
    for (const child of this.#children) {
      const ended = new Promise((resolve) => child.once("exit", resolve));
      if (child.exitCode === null && child.signalCode === null && child.kill("SIGKILL")) await ended;
    }
    this.#scope.abort();
    await Promise.all(this.#tasks);
    await run("ip", ["netns", "del", this.name]);
    await rm(this.#folder, { recursive: true });
  }

  async #network(): Promise<void> {
    await run("ip", ["netns", "add", this.name]);
    await run("ip", ["-n", this.name, "link", "set", "lo", "up"]);
  }

  /** The agent's rooms that Envoy talks to, wired as the daemon wires them. */
  async #agent(target: Target): Promise<void> {
    const host = linuxHost();
    const { signal } = this.#scope;
    const ca = { ...target, addresses: [target.address] };
    const spiffe = formatSpiffe(target);
    const svid = await enroll(
      host,
      { ca, spiffe, credential: { kind: "token", token: target.token } },
      signal,
    );
    const svids = new Latest<Svid>();
    svids.set(svid);
    const listenAt = (name: string) => (onConnection: (socket: Duplex) => void) =>
      host.net.listenUnix(join(this.#folder, name), { mode: 0o600 }, onConnection);
    const onRejected = (name: string, reason: string): void =>
      console.error(`secret ${name} refused: ${reason}`);
    const relay = new AdsRelay({
      host,
      listen: listenAt("xds.sock"),
      upstreams: async () => [targetOf(ca, target.address, { kind: "certificate", svid })],
      onEvent: () => undefined,
    });
    this.#relay = relay;
    const listening = Promise.withResolvers<void>();
    this.#tasks.push(
      serveSds({ listen: listenAt("sds.sock"), onListening: listening.resolve, onRejected }, svids, signal),
      relay.run(signal),
    );
    await listening.promise;
  }

  async #envoy({ binary, target, stdout }: MachineOptions): Promise<void> {
    const bootstrap = join(this.#folder, "bootstrap.json");
    const { namespace } = target;
    const input = renderBootstrap({
      node: {
        id: `sidecar~${this.address}~${this.name}.${namespace}~${namespace}.svc.cluster.local`,
        cluster: `${target.group}.${namespace}`,
        metadata: {
          NAMESPACE: namespace,
          SERVICE_ACCOUNT: target.serviceAccount,
          INSTANCE_IPS: this.address,
          // By it and the address istiod finds the proxy whose entry has just come to be, to send it its inbound clusters.
          CLUSTER_ID: target.clusterId,
          ISTIO_VERSION: "1.31.0",
          AUTO_REGISTER_GROUP: target.group,
        },
      },
      adminSocket: join(this.#folder, "admin.sock"),
      adminSocketMode: 0o600,
      xdsSocket: join(this.#folder, "xds.sock"),
      sdsSocket: join(this.#folder, "sds.sock"),
      ipv6: false,
      lease: true,
    });
    await writeFile(bootstrap, JSON.stringify(input));
    const argv = envoyArgv({ binary, bootstrap, concurrency: 1 });
    const log = openSync(join(this.#folder, "envoy.log"), "w");
    const out = stdout === "fifo" ? await this.#fifo() : ("pipe" as const);
    // Node's own "pipe" is a socket pair, just as the journal's stdout is a socket.
    this.#children.push(spawn("ip", ["netns", "exec", this.name, ...argv], { stdio: ["ignore", out, log] }));
    closeSync(log);
    if (typeof out === "number") closeSync(out);
  }

  /** A FIFO with a reader, as the unit of the access log has it. @returns the end for Envoy */
  async #fifo(): Promise<number> {
    const path = join(this.#folder, "stdout");
    await run("mkfifo", ["-m", "0600", path]);
    // For reading and writing, as systemd opens it: no end ever waits for the other to be opened.
    const fifo = openSync(path, constants.O_RDWR);
    const file = openSync(join(this.#folder, "access.log"), "w");
    this.#children.push(spawn("cat", [], { stdio: [fifo, file, "inherit"] }));
    closeSync(file);
    return fifo;
  }
}
