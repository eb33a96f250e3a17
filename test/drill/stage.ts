import { type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import { cpSync } from "node:fs";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  spiffe,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { type LoadReport, loadCommand, putLoad } from "../lab/load.ts";
import { installPeer, startPeer } from "../lab/peer.ts";
import { packageFile } from "../vm/package.ts";
import type { Side } from "./fault.ts";

/** The application's, on each machine. */
export const PORT = 9080;
/** Machines without a network are in this one, too; those of another one the client finds behind that one's gateway. */
const CLIENT_NETWORK = "near";
const PROGRAM = new URL("../lab/load.mjs", import.meta.url).pathname;

/** What a client outside the machine has seen. */
export interface Seen {
  readonly requests: number;
  readonly lost: number;
  /** Reason → how often. */
  readonly reasons: Readonly<Record<string, number>>;
  /** When the first lost request was known to be lost, in ms since the epoch. */
  readonly firstFailedAt: number | undefined;
  /** When the last lost request was sent. */
  readonly lastLoss: number | undefined;
  /** When the first answer with 200 came after `at` (ms since the epoch; exact to 50 ms). */
  answeredAfter(at: number): number | undefined;
  /** How many requests were sent before the end of one of these times, and not over at its beginning. */
  underWayDuring(times: readonly Span[]): number;
}

/** From and until, in ms since the epoch. */
export type Span = readonly [from: number, until: number];

export interface Load {
  /** Ends it, once; the same answer to whoever asks again. */
  stop(): Promise<Seen>;
}

/** A machine under fault. */
export interface Target {
  readonly side: Side;
  readonly machine: Machine;
  /** What the client asks: the service whose only endpoint is this machine. */
  readonly url: string;
}

/**
 * The drill's stage: one mesh with STRICT mutual TLS, a client with vmmesh that no fault touches, and two services with one
 * endpoint each: a machine with vmmesh, and one with the real pilot-agent. A fault of the control plane or of the network
 * meets both in the same moment.
 */
export class Stage {
  readonly lab: Lab;
  readonly client: Machine;
  readonly vmmesh: Target;
  readonly peer: Target;

  private constructor(lab: Lab, client: Machine, vmmesh: Target, peer: Target) {
    this.lab = lab;
    this.client = client;
    this.vmmesh = vmmesh;
    this.peer = peer;
  }

  get targets(): readonly [Target, Target] {
    return [this.vmmesh, this.peer];
  }

  static async open(): Promise<Stage> {
    const lab = await Lab.open({ istiodDefaults: false });
    await cleanNamespace(lab);
    const deb = packageFile();
    const machineOf = async (name: string): Promise<Machine> => {
      await lab.removeVm(name);
      const machine = await lab.vm(name, name === "theirs" ? {} : { deb });
      await defineWorkload(lab, name, PORT, name === "client" ? { network: CLIENT_NETWORK } : {});
      await startApp(machine, PORT);
      return machine;
    };
    await strictMtls(lab);
    const client = await machineOf("client");
    const ours = await machineOf("ours");
    const theirs = await machineOf("theirs");
    for (const machine of [client, ours]) {
      cpSync(await istioctlBundle(lab, machine.name), `${machine.root}/root/bundle`, { recursive: true });
      await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
    }
    await installPeer(lab, theirs, theirs.name);
    await startPeer(theirs);
    putLoad(client);
    const stage = new Stage(
      lab,
      client,
      { side: "vmmesh", machine: ours, url: "http://ours/" },
      { side: "peer", machine: theirs, url: "http://theirs/" },
    );
    for (const { url } of stage.targets) await arrivesAs(client, url, spiffe("client"), 40_000);
    return stage;
  }

  async close(): Promise<void> {
    for (const machine of [this.client, this.vmmesh.machine, this.peer.machine])
      await this.lab.removeVm(machine.name);
  }

  /** A client outside the machine, an ordinary user, until it is stopped. @param rate requests a second */
  load({ url }: Target, rate = 200): Load {
    return startLoad(["nsenter", "-t", String(this.client.pid), "-a", ...loadCommand(url, rate)]);
  }

  /** The same by a TLS connection of its own for each request, straight to the machine: a bad certificate is noticed at once. */
  handshakes({ machine }: Target, rate: number): Load {
    const identity = `${this.client.root}/var/lib/vmmesh/identity/current`;
    const env = { LOAD_IDENTITY: identity, LOAD_SERVER: spiffe(machine.name) };
    return this.#fromOutside(`https://${machine.ip}:${PORT}/`, rate, env);
  }

  /** Plain text to the application's own port, from outside the mesh: each that is answered came past Envoy. */
  plainText({ machine }: Target, rate = 100): Load {
    return this.#fromOutside(`http://${machine.ip}:${PORT}/`, rate);
  }

  #fromOutside(url: string, rate: number, env: Readonly<Record<string, string>> = {}): Load {
    const argv = ["ip", "netns", "exec", this.lab.netns, process.execPath, PROGRAM, url, String(rate)];
    return startLoad(argv, { ...process.env, ...env });
  }

  /**
   * Until requests are answered without an error for a second, the machine is connected to the control plane, and, on our
   * side, no condition is an error.
   */
  async well(target: Target, timeoutMs = 60_000): Promise<void> {
    await waitFor(
      `${target.url} to be well`,
      async () => ((await this.answers(target)) && (await isConnected(target)) ? true : undefined),
      timeoutMs,
      100,
    );
  }

  /** Five requests in a row, over a second. */
  async answers({ url }: Target): Promise<boolean> {
    const { code } = await this.client.exec(
      `for i in 1 2 3 4 5; do curl -sf -m 2 -o /dev/null ${url} || exit 1; sleep 0.2; done`,
      { allowFail: true },
    );
    return code === 0;
  }
}

/** Our agent says itself that it has a stream to istiod; of the peer's it is known that its connection stands. */
export async function isConnected({ machine, side }: Target): Promise<boolean> {
  if (side === "peer") {
    const { stdout } = await machine.exec("ss -Htnp state established '( dport = :15012 )'", {
      allowFail: true,
    });
    return stdout.includes("pilot-agent");
  }
  const { code, controlPlane } = await statusOf(machine);
  return code === 0 && controlPlane?.address !== undefined;
}

export interface Status {
  /** 0: no condition is an error. */
  readonly code: number;
  readonly controlPlane?: { readonly address?: string };
  readonly identity?: { readonly notAfter: string };
  readonly conditions: readonly {
    readonly id: string;
    readonly severity: string;
    readonly message: string;
    readonly next: string;
  }[];
}

/** What our agent says of itself; nothing but an exit code while there is none to ask. */
export async function statusOf(machine: Machine): Promise<Status> {
  const { code, stdout } = await machine.exec("vmmesh status --output json", { allowFail: true });
  return { conditions: [], ...(JSON.parse(stdout || "{}") as Partial<Status>), code };
}

/** Several at once as one: what they have seen is added up. */
export function together(loads: readonly Load[]): Load {
  return {
    stop: async () => {
      const seen = await Promise.all(loads.map((load) => load.stop()));
      const sum = (of: (each: Seen) => number): number => seen.reduce((all, each) => all + of(each), 0);
      const times = (of: (each: Seen) => number | undefined): number[] =>
        seen.map(of).filter((at) => at !== undefined);
      const reasons: Record<string, number> = {};
      for (const [reason, count] of seen.flatMap((each) => Object.entries(each.reasons)))
        reasons[reason] = (reasons[reason] ?? 0) + count;
      return {
        requests: sum(({ requests }) => requests),
        lost: sum(({ lost }) => lost),
        reasons,
        firstFailedAt: times(({ firstFailedAt }) => firstFailedAt).sort((a, b) => a - b)[0],
        lastLoss: times(({ lastLoss }) => lastLoss).sort((a, b) => b - a)[0],
        answeredAfter: (at) => {
          const answers = times(({ answeredAfter }) => answeredAfter(at));
          return answers.length === seen.length ? Math.max(...answers) : undefined;
        },
        underWayDuring: (spans) => sum(({ underWayDuring }) => underWayDuring(spans)),
      };
    },
  };
}

function startLoad([program = "", ...argv]: readonly string[], env = process.env): Load {
  const child = spawn(program, argv, { env });
  let stopped: Promise<Seen> | undefined;
  return {
    stop: () => {
      stopped ??= stopLoad(child);
      return stopped;
    },
  };
}

async function stopLoad(child: ChildProcessWithoutNullStreams): Promise<Seen> {
  const [out, err]: [Buffer[], Buffer[]] = [[], []];
  child.stdout.on("data", (part: Buffer) => out.push(part));
  child.stderr.on("data", (part: Buffer) => err.push(part));
  const closed = new Promise<number | null>((resolve, reject) => {
    child.on("close", resolve);
    child.on("error", reject);
  });
  child.stdin.end();
  const code = await closed;
  if (code !== 0) throw new Error(`the client ended with ${code}: ${Buffer.concat(err).toString()}`);
  const report = JSON.parse(Buffer.concat(out).toString()) as LoadReport;
  const { losses, firstFailedAt, answered, spans } = report;
  return {
    requests: report.sent,
    lost: report.failed,
    reasons: report.failures,
    firstFailedAt,
    lastLoss: losses.length === 0 ? undefined : Math.max(...losses),
    answeredAfter: (at) => answered.find((time) => time >= at),
    underWayDuring: (times) =>
      spans.filter((at, index) => {
        const over = spans[index + 1] ?? 0;
        return index % 2 === 0 && times.some(([from, until]) => at < until && over > from);
      }).length,
  };
}
