import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { createInterface } from "node:readline";
import { PeerMachine, PILOT_AGENT } from "../compat/peer.ts";
import type { ApplyTimes } from "../netns/apply-timed.ts";
import { kubeProxyRules } from "../netns/kubeProxy.ts";
import { UID, WISH } from "../netns/lab.ts";
import type { Scale } from "../suite.ts";
import { type Proof, type ProofRow, row } from "./proof.ts";

const SIZES: Readonly<Record<Scale, { readonly foreign: readonly number[]; readonly rounds: number }>> = {
  quick: { foreign: [0, 20_000], rounds: 5 },
  full: { foreign: [0, 20_000, 50_000], rounds: 15 },
};
const APPLY = new URL("../netns/apply-timed.ts", import.meta.url).pathname;
const RESOLVER = "10.9.0.77";
const FAMILIES = [4, 6] as const;

/** The same capture as `WISH`. Unless told which backend, the peer's second call goes to the other one (test/lab/peer.ts). */
const PEER = [
  ...[PILOT_AGENT, "istio-iptables", "--dual-stack", "--force-iptables-binary", "nft", "--redirect-dns"],
  ...[
    "-u",
    String(UID.envoy),
    "-i",
    "*",
    "-b",
    WISH.inbound.kind === "ports" ? WISH.inbound.ports.join() : "*",
  ],
];

/** Applies there, in one process, as often as it is asked. */
class Applier implements AsyncDisposable {
  readonly #rulesDir = mkdtempSync(`${tmpdir()}/vmmesh-prove-`);
  readonly #child;
  readonly #lines;

  constructor(machine: PeerMachine) {
    const argv = [
      "netns",
      "exec",
      machine.name,
      process.execPath,
      APPLY,
      `${this.#rulesDir}/rules`,
      RESOLVER,
    ];
    this.#child = spawn("ip", argv, { stdio: ["pipe", "pipe", "inherit"] });
    this.#lines = createInterface({ input: this.#child.stdout })[Symbol.asyncIterator]();
  }

  async apply(): Promise<ApplyTimes> {
    this.#child.stdin.write("apply\n");
    const { value, done } = await this.#lines.next();
    if (done === true) throw new Error("our side ended in the middle");
    return JSON.parse(value) as ApplyTimes;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#child.exitCode === null) {
      this.#child.stdin.end();
      await once(this.#child, "exit");
    }
    rmSync(this.#rulesDir, { recursive: true });
  }
}

async function must(machine: PeerMachine, argv: readonly string[], input?: string): Promise<string> {
  const { code, stdout, stderr } = await machine.exec(argv, {}, input);
  if (code !== 0) throw new Error(`${argv.join(" ")} ended with ${code}: ${stderr}`);
  return stdout;
}

/** @returns milliseconds from start to end of the whole command */
async function applyPeer(machine: PeerMachine): Promise<number> {
  const started = performance.now();
  await must(machine, PEER);
  const took = performance.now() - started;
  for (const program of ["iptables-nft", "ip6tables-nft"]) {
    if (!(await must(machine, [program, "-t", "nat", "-S", "OUTPUT"])).includes("-j ISTIO_OUTPUT"))
      throw new Error(`the peer ended well, and ${program} does not know its rules`);
  }
  await must(machine, [...PEER, "--cleanup-only"]);
  return took;
}

interface Medians extends ApplyTimes {
  readonly peerMs: number;
}

async function besideForeign(count: number, rounds: number): Promise<Medians> {
  await using theirs = await PeerMachine.make("theirs", FAMILIES);
  await using ours = await PeerMachine.make("ours", FAMILIES);
  for (const machine of [theirs, ours]) {
    machine.resolve([RESOLVER]);
    if (count > 0) await must(machine, ["iptables-nft-restore", "--noflush"], kubeProxyRules(count));
  }
  await using applier = new Applier(ours);
  const seen: Medians[] = [];
  for (let round = 0; round < rounds; round += 1)
    seen.push({ ...(await applier.apply()), peerMs: await applyPeer(theirs) });
  const of = (what: keyof Medians): number => median(seen.map((times) => times[what]));
  return { inForceMs: of("inForceMs"), wholeMs: of("wholeMs"), peerMs: of("peerMs") };
}

const median = (values: readonly number[]): number =>
  values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
const rounded = (value: number, digits: number): number => Number(value.toFixed(digits));

function rows(count: number, { inForceMs, wholeMs, peerMs }: Medians, rounds: number): ProofRow[] {
  const beside = `${count === 0 ? "on empty tables" : `beside ${count} foreign rules`}, median of ${rounds}`;
  return [
    row("apply", `rules in force, from the first to the last write, ${beside}`, rounded(inForceMs, 1), "ms"),
    row("apply", `looked, tested, armed, applied and read back, ${beside}`, rounded(wholeMs, 1), "ms"),
    row("apply", `istio-iptables, the whole command, ${beside}`, rounded(peerMs, 1), "ms", "", "peer"),
    row(
      "apply",
      `rules in force, by the peer's time, ${beside}`,
      rounded(inForceMs / peerMs, 3),
      "ratio",
      "< 1",
    ),
    row(
      "apply",
      `looked, tested, armed, applied and read back, by the peer's time, ${beside}`,
      rounded(wholeMs / peerMs, 3),
      "ratio",
      // On empty tables it is 1.5 at rest; on two cores with a load of 12, where each start of a program counts, up to 2.9.
      count === 0 ? "< 3" : "< 1",
    ),
  ];
}

export const proof: Proof = {
  name: "apply",
  about: "time to apply on empty tables and beside kube-proxy's, in turn with the real pilot-agent",
  async run(scale) {
    const { foreign, rounds } = SIZES[scale];
    const measured: { readonly count: number; readonly medians: Medians }[] = [];
    for (const count of foreign) measured.push({ count, medians: await besideForeign(count, rounds) });
    const [empty] = measured;
    return [
      ...measured.flatMap(({ count, medians }) => rows(count, medians, rounds)),
      ...measured
        .slice(1)
        .flatMap(({ count, medians }) =>
          (["inForceMs", "wholeMs", "peerMs"] as const).map((what) =>
            row(
              "apply",
              `growth from empty tables to ${count} foreign rules: ${NAMES[what]}`,
              rounded(medians[what] / (empty?.medians[what] ?? Number.NaN), 2),
              "times",
              "",
              what === "peerMs" ? "peer" : "vmmesh",
            ),
          ),
        ),
    ];
  },
};

const NAMES: Readonly<Record<keyof Medians, string>> = {
  inForceMs: "rules in force",
  wholeMs: "looked, tested, armed, applied and read back",
  peerMs: "istio-iptables, the whole command",
};
