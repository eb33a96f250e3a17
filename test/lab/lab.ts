import { execFileSync } from "node:child_process";
import { createHash, createPublicKey, createSign, randomUUID } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { build, envoyVersion, isBuilt } from "./build.ts";
import {
  inNetns,
  istiodEnvOf,
  kubectl,
  netnsOf,
  startIstiod,
  stopIstiod,
  type User,
  up,
} from "./controlplane.ts";
import { exclusively } from "./lock.ts";
import { bootMachine, initOf, Machine, type MachineOptions, removeMachine } from "./machine.ts";
import { ADDRESS, ISTIO_BIN, KUBE_BIN } from "./parts.ts";
import { type Output, type ShOptions, say, sh, sleep, startTimeOf, waitFor } from "./sh.ts";
import { changeState, end, folderOf, isRunning, readState, removeState, start, stop } from "./state.ts";

export { Machine, say, sleep, waitFor };

export interface Versions {
  readonly istiod: string;
  readonly envoy: string;
  readonly kubernetes: string;
}

const stateOf = (id: string, name: string): string => {
  const init = initOf(id, name);
  return init === undefined ? "down" : `running, pid ${init}`;
};

/** A real mesh on this machine, as tests use it: `await Lab.open()`. */
export class Lab {
  readonly id: string;
  /** Where the control plane answers, as machines see it. */
  readonly address = ADDRESS.controlPlane;

  private constructor(id: string) {
    this.id = id;
  }

  /** Name of the network namespace of the control plane and of the bridge, for `ip netns exec`. */
  get netns(): string {
    return netnsOf(this.id);
  }

  /**
   * Brings up what is not up, and builds what is not built.
   * @param options.istiodDefaults true: istiod as it comes; false: as a stock Envoy needs it; left out: as it runs
   * @throws {Error} if not root
   */
  static async open(options: { id?: string; istiodDefaults?: boolean } = {}): Promise<Lab> {
    if (process.getuid?.() !== 0)
      throw new Error("the lab needs root: it makes network namespaces and boots machines");
    if (!isBuilt()) await build();
    const id = options.id ?? process.env["VMMESH_LAB_ID"] ?? "default";
    await up(id, options);
    return new Lab(id);
  }

  /** Looks at a lab without bringing anything up. */
  static attach(id: string): Lab {
    return new Lab(id);
  }

  kubectl(args: readonly string[], options: ShOptions = {}): Promise<Output> {
    return kubectl(this.id, args, options);
  }

  async apply(yaml: string): Promise<void> {
    await this.kubectl(["apply", "-f", "-"], { input: yaml });
  }

  istioctl(args: readonly string[], options: ShOptions = {}): Promise<Output> {
    return sh(
      inNetns(this.id, [`${ISTIO_BIN}/istioctl`, "--kubeconfig", this.kubeconfig("admin"), ...args]),
      options,
    );
  }

  /** Path of a kubeconfig on this machine; the CA in it is a path too. */
  kubeconfig(user: User): string {
    return `${folderOf(this.id)}/kubeconfig-${user}`;
  }

  /** The same with the CA inside, to be put on a machine. */
  kubeconfigText(user: User): string {
    const config = JSON.parse(readFileSync(this.kubeconfig(user), "utf8")) as {
      clusters: { cluster: Record<string, string> }[];
    };
    const cluster = config.clusters[0]?.cluster ?? {};
    cluster["certificate-authority-data"] = readFileSync(cluster["certificate-authority"] ?? "").toString(
      "base64",
    );
    delete cluster["certificate-authority"];
    return JSON.stringify(config, null, 1);
  }

  vm(name: string, options: MachineOptions = {}): Promise<Machine> {
    return bootMachine(this.id, name, options);
  }

  /** A machine that runs already. */
  machine(name: string): Machine {
    const known = readState(this.id).machines[name];
    if (known === undefined) throw new Error(`there is no machine ${name}: scripts/lab vm ${name}`);
    return new Machine(this.id, name, known.number);
  }

  removeVm(name: string): Promise<void> {
    return removeMachine(this.id, name);
  }

  /** Runs a program where the control plane lives: an observer outside the machines. */
  exec(argv: readonly string[], options: ShOptions = {}): Promise<Output> {
    return sh(inNetns(this.id, argv), options);
  }

  /** Starts a program there that goes on until `stop`. */
  spawn(name: string, argv: readonly string[]): { stop(): Promise<void>; log(): string } {
    start(this.id, name, inNetns(this.id, argv));
    return {
      stop: () => stop(this.id, name),
      log: () => readFileSync(`${folderOf(this.id)}/${name}.log`, "utf8"),
    };
  }

  stopIstiod(): Promise<void> {
    return stopIstiod(this.id);
  }

  startIstiod(env: Readonly<Record<string, string>> = istiodEnvOf(this.id)): Promise<void> {
    return startIstiod(this.id, env);
  }

  /**
   * @param env takes the place of all that was set, the settings for a stock Envoy included; as it was if left out.
   * It stays so for who opens the lab next: `Lab.open({ istiodDefaults: false })` goes back to those settings.
   */
  async restartIstiod(env?: Readonly<Record<string, string>>): Promise<void> {
    await this.stopIstiod();
    await this.startIstiod(env);
  }

  /** A real Prometheus that scrapes `targets` (HOST:PORT) at /stats/prometheus, and has scraped each once. */
  async prometheus(
    targets: readonly string[],
    scrapeIntervalMs = 1000,
  ): Promise<{ query(promql: string): Promise<number | undefined>; stop(): Promise<void> }> {
    const at = `${folderOf(this.id)}/prometheus`;
    await stop(this.id, "prometheus");
    // Samples of an earlier test would be in the answers of this one.
    rmSync(at, { recursive: true, force: true });
    mkdirSync(at, { recursive: true });
    const job = { job_name: "vms", metrics_path: "/stats/prometheus", static_configs: [{ targets }] };
    writeFileSync(
      `${at}/prometheus.yml`,
      JSON.stringify({
        global: { scrape_interval: `${scrapeIntervalMs}ms`, scrape_timeout: `${scrapeIntervalMs}ms` },
        scrape_configs: [job],
      }),
    );
    start(
      this.id,
      "prometheus",
      inNetns(this.id, [
        "prometheus",
        `--config.file=${at}/prometheus.yml`,
        `--storage.tsdb.path=${at}/data`,
        "--web.listen-address=127.0.0.1:9099",
      ]),
    );
    const ask = (path: string) =>
      this.exec(["curl", "-sf", "-m", "5", `http://127.0.0.1:9099${path}`], { allowFail: true });
    await waitFor("Prometheus", async () => ((await ask("/-/ready")).code === 0 ? true : undefined), 30_000);
    // It looks for its targets every 5 s; a target's health is unknown until its first scrape.
    await waitFor("the first scrape", async () => {
      const { stdout } = await ask("/api/v1/targets");
      const { data } = JSON.parse(stdout) as { data: { activeTargets: { health: string }[] } };
      const scraped = data.activeTargets.filter(({ health }) => health !== "unknown");
      return scraped.length === targets.length ? true : undefined;
    });
    return {
      query: async (promql) => {
        const { stdout } = await ask(`/api/v1/query?query=${encodeURIComponent(promql)}`);
        const answer = JSON.parse(stdout || "{}") as { data?: { result?: { value?: [number, string] }[] } };
        const value = answer.data?.result?.[0]?.value?.[1];
        return value === undefined ? undefined : Number(value);
      },
      stop: () => stop(this.id, "prometheus"),
    };
  }

  /** What runs, asked of the parts themselves: a test that prints it cannot have run with stand-ins. */
  async versions(): Promise<Versions> {
    // The module that Go has written into the binary which runs; "unknown" is all that its own /version knows.
    const executable = `/proc/${this.pidOf("istiod")}/exe`;
    const { stdout } = await sh(["grep", "-aoPm1", "mod\\tistio.io/istio\\t\\K\\S+", executable]);
    const { stdout: kubernetes } = await this.exec([
      "curl",
      "-s",
      "--cacert",
      `${folderOf(this.id)}/ca.crt`,
      `https://${this.address}:6443/version`,
    ]);
    const machine = Object.keys(readState(this.id).machines)[0];
    const envoy =
      machine === undefined
        ? "no machine"
        : await envoyVersion(`${this.machine(machine).root}/usr/local/bin/envoy`);
    return {
      istiod: stdout.trim(),
      envoy,
      kubernetes: (JSON.parse(kubernetes) as { gitVersion: string }).gitVersion,
    };
  }

  /** PID of a process of the lab on this machine; 0 if it does not run. */
  pidOf(name: string): number {
    // `ip netns exec` replaces itself with the program.
    return readState(this.id).processes.find((it) => it.name === name)?.pid ?? 0;
  }

  /**
   * A service account token of the lab's own signing; TokenRequest grants none that has ended. Key id and account are the
   * real ones, so that an expired token is refused for its time alone; an account that does not exist gets an id of its own.
   * @throws {Error} if the API server cannot be asked for the account
   */
  signToken(claims: {
    namespace: string;
    serviceAccount: string;
    audience?: string;
    expiresInSec: number;
  }): string {
    const found = execFileSync(
      "ip",
      [
        ...["netns", "exec", this.netns, `${KUBE_BIN}/kubectl`, "--kubeconfig", this.kubeconfig("admin")],
        ...["get", "serviceaccount", claims.serviceAccount, "-n", claims.namespace],
        ...["--ignore-not-found", "-o", "jsonpath={.metadata.uid}"],
      ],
      { encoding: "utf8", timeout: 30_000 },
    );
    const uid = found === "" ? randomUUID() : found;
    const key = readFileSync(`${folderOf(this.id)}/sa.key`);
    // As Kubernetes names its keys (pkg/serviceaccount/jwt.go, keyIDFromPublicKey); it tries no key of another name.
    const kid = createHash("sha256")
      .update(createPublicKey(key).export({ type: "spki", format: "der" }))
      .digest("base64url");
    const now = Math.floor(Date.now() / 1000);
    const payload = {
      iss: "https://kubernetes.default.svc",
      sub: `system:serviceaccount:${claims.namespace}:${claims.serviceAccount}`,
      aud: [claims.audience ?? "istio-ca"],
      iat: Math.min(now, now + claims.expiresInSec) - 600,
      nbf: Math.min(now, now + claims.expiresInSec) - 600,
      exp: now + claims.expiresInSec,
      "kubernetes.io": {
        namespace: claims.namespace,
        serviceaccount: { name: claims.serviceAccount, uid },
      },
    };
    const part = (value: object): string => Buffer.from(JSON.stringify(value)).toString("base64url");
    const text = `${part({ alg: "RS256", kid })}.${part(payload)}`;
    return `${text}.${createSign("RSA-SHA256").update(text).sign(key).toString("base64url")}`;
  }

  /** Processes, machines, and the versions of what runs. */
  async status(): Promise<string> {
    const { processes, machines } = readState(this.id);
    const rows = processes.map(
      ({ name, pid }) => `${name.padEnd(22)} ${isRunning(this.id, name) ? `running, pid ${pid}` : "dead"}`,
    );
    const vms = Object.entries(machines).map(
      ([name, { number, envoy }]) =>
        `machine ${name.padEnd(14)} ${ADDRESS.machine(number)}  ${ADDRESS.machine6(number)}  Envoy ${envoy}  ${stateOf(this.id, name)}`,
    );
    const runs = isRunning(this.id, "istiod") && isRunning(this.id, "kube-apiserver");
    const versions = runs ? await this.versions() : undefined;
    return [
      `lab ${this.id}: ${processes.length === 0 ? "down" : `namespace ${netnsOf(this.id)}`}`,
      ...(versions === undefined ? [] : [`istiod ${versions.istiod}, Kubernetes ${versions.kubernetes}`]),
      ...rows,
      ...vms,
    ].join("\n");
  }

  /** Ends every process that the lab started and removes all that it made. */
  down(): Promise<void> {
    return exclusively(`${this.id}-lab`, () => this.#down());
  }

  async #down(): Promise<void> {
    // By their folders as well: a run that was killed may not have recorded them.
    const folders = existsSync(folderOf(this.id))
      ? readdirSync(folderOf(this.id), { withFileTypes: true })
      : [];
    const unrecorded = folders
      .filter((entry) => entry.isDirectory() && entry.name.startsWith("machine-"))
      .map(({ name }) => name.slice("machine-".length));
    for (const name of new Set([...Object.keys(readState(this.id).machines), ...unrecorded]))
      await removeMachine(this.id, name);
    // The other way round than they were started; their data goes too, so they need not end in order.
    for (const { name } of [...readState(this.id).processes].reverse()) await stop(this.id, name, 1000);
    // The namespace is the lab's own: whatever still runs in it was started by the lab, and killed before it was recorded.
    const { stdout } = await sh(["ip", "netns", "pids", netnsOf(this.id)], { allowFail: true });
    for (const pid of stdout.split("\n").filter(Boolean).map(Number))
      await end({ name: "leftover", pid, startTime: startTimeOf(pid) ?? "" });
    if (existsSync(`/run/netns/${netnsOf(this.id)}`))
      await sh(["ip", "netns", "delete", netnsOf(this.id)], { allowFail: true });
    removeState(this.id);
  }

  /** Keeps an answer of the caller's in the lab's state folder, e.g. bundles. */
  folder(name: string): string {
    const path = `${folderOf(this.id)}/${name}`;
    mkdirSync(path, { recursive: true });
    changeState(this.id, (state) => state);
    return path;
  }
}
