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

const PORT = 9080;

/** What a client outside the machine has seen. */
export interface Seen {
  readonly requests: number;
  readonly lost: number;
  /** Reason → how often. */
  readonly reasons: Readonly<Record<string, number>>;
  /** When the first and the last lost request were sent, in ms since the epoch. */
  readonly firstLoss: number | undefined;
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
      await defineWorkload(lab, name, PORT);
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
    const argv = ["-t", String(this.client.pid), "-a", ...loadCommand(url, rate)];
    const child = spawn("nsenter", argv);
    let stopped: Promise<Seen> | undefined;
    return {
      stop: () => {
        stopped ??= stopLoad(child);
        return stopped;
      },
    };
  }

  /** Until requests are answered without an error for a second, and, on our side, the agent says that it is well. */
  async well({ machine, side, url }: Target, timeoutMs = 60_000): Promise<void> {
    await waitFor(
      `${url} to be well`,
      async () => {
        const { code } = await this.client.exec(
          `for i in 1 2 3 4 5; do curl -sf -m 2 -o /dev/null ${url} || exit 1; sleep 0.2; done`,
          { allowFail: true },
        );
        if (code !== 0) return undefined;
        if (side === "peer") return true;
        return (await machine.exec("vmmesh status", { allowFail: true })).code === 0 ? true : undefined;
      },
      timeoutMs,
      100,
    );
  }
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
  const { losses, answered, spans } = report;
  return {
    requests: report.sent,
    lost: report.failed,
    reasons: report.failures,
    firstLoss: losses.length === 0 ? undefined : Math.min(...losses),
    lastLoss: losses.length === 0 ? undefined : Math.max(...losses),
    answeredAfter: (at) => answered.find((time) => time >= at),
    underWayDuring: (times) =>
      spans.filter((at, index) => {
        const over = spans[index + 1] ?? 0;
        return index % 2 === 0 && times.some(([from, until]) => at < until && over > from);
      }).length,
  };
}
