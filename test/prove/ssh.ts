import { createHash } from "node:crypto";
import { cpSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { cleanNamespace, defineWorkload, istioctlBundle } from "../lab/acceptance.ts";
import { Lab, type Machine, sleep, waitFor } from "../lab/lab.ts";
import type { Scale } from "../suite.ts";
import { packageFile } from "../vm/package.ts";
import { type Proof, row } from "./proof.ts";
import { CONFIRM_SECONDS, liveSession, Operator, PORT, SLACK_SECONDS } from "./ssh/operator.ts";
import { byIptablesApply, byNetplanTry } from "./ssh/peers.ts";

const SEED = 20_261_123;

/** What an operator could write into sidecar.env, and what happens while it is applied. */
interface Profile {
  readonly env: Readonly<Record<string, string>>;
  /** Rules that another program writes while the trial runs, after so many ms. */
  readonly meanwhileMs: number;
  /** When vmmesh (or the whole SSH session that runs it) is killed, from the trial's begin; undefined: it is left to end. */
  readonly killed: { readonly what: "vmmesh" | "session"; readonly afterMs: number } | undefined;
}

/** Networks that the operator's own address is in are among them, as a captured network, as a mesh and as an exception. */
const NETWORKS = [
  "10.99.0.0/24",
  "10.99.0.1/32",
  "10.96.0.0/12",
  "0.0.0.0/0",
  "172.16.0.0/12",
  "fd00:99::/64",
];
const PORTS = ["22", String(PORT), "80", "443", "9080", "15021"];

const some = (values: readonly string[]) =>
  fc.subarray([...values], { maxLength: 3 }).map((chosen) => chosen.join(","));

const PROFILE: fc.Arbitrary<Profile> = fc.record({
  env: fc.record({
    ISTIO_INBOUND_PORTS: fc.oneof(fc.constant("*"), some(PORTS)),
    ISTIO_LOCAL_EXCLUDE_PORTS: some(PORTS),
    ISTIO_SERVICE_CIDR: fc.oneof(fc.constant("*"), some(NETWORKS)),
    ISTIO_SERVICE_EXCLUDE_CIDR: some(NETWORKS),
    ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE: some(PORTS),
    VMMESH_MESH_CIDRS: some(NETWORKS),
  }),
  meanwhileMs: fc.integer({ min: 0, max: 600 }),
  killed: fc.option(
    fc.record({
      what: fc.constantFrom("vmmesh" as const, "session" as const),
      afterMs: fc.integer({ min: 0, max: 400 }),
    }),
    { nil: undefined, freq: 2 },
  ),
});

/** Everything that is not ours, without counters, as one hash. */
async function foreignHash(machine: Machine): Promise<string> {
  const { stdout } = await machine.exec(
    "(iptables-nft-save; ip6tables-nft-save) | awk '/^[*]/ {table = $0} /^-A/ {print table, $0}' | grep -v 'ISTIO_\\|VMMESH_\\|vmmesh:'",
    { allowFail: true },
  );
  return createHash("sha256").update(stdout).digest("hex");
}

async function setEnv(machine: Machine, env: Readonly<Record<string, string>>): Promise<void> {
  const kept = machine
    .getFile("/etc/vmmesh/sidecar.env")
    .split("\n")
    .filter((line) => !Object.keys(env).some((key) => line.startsWith(`${key}=`)));
  const own = Object.entries(env).map(([key, value]) => `${key}='${value}'`);
  machine.putFile(
    "/etc/vmmesh/sidecar.env",
    `${[...kept.filter((line) => line !== ""), ...own].join("\n")}\n`,
  );
}

const TRIAL = "/var/lib/vmmesh-host/rules/trial";

const trialIsOver = async (machine: Machine): Promise<boolean> =>
  (await machine.exec(`test ! -e ${TRIAL}`, { allowFail: true })).code === 0;

/** The sshd above the vmmesh that applies, and with it the terminal's end; the other sessions live on. */
const KILL_ITS_SESSION = `
p=$(pgrep -f 'iptables apply --confirm-within' | head -1)
while [ -n "$p" ] && [ "$p" != 1 ] && ! grep -q '^sshd' /proc/$p/comm; do p=$(ps -o ppid= -p $p | tr -d ' '); done
[ -z "$p" ] || [ "$p" = 1 ] || kill -KILL $p`;

interface Tally {
  rounds: number;
  confirmed: number;
  killed: number;
  killedInTrial: number;
  refused: number;
  longestWithoutLoginMs: number;
  sessionsLost: number;
  foreignChanged: number;
  meanwhileLost: number;
  lateRollbacks: number;
  longestRollbackMs: number;
}

async function round(
  lab: Lab,
  machine: Machine,
  operator: Operator,
  profile: Profile,
  number: number,
  tally: Tally,
): Promise<void> {
  await setEnv(machine, profile.env);
  const before = await foreignHash(machine);
  const watched = operator.watch();
  const mark = `meanwhile-${number}`;
  const foreign = `-p tcp --dport ${20_000 + number} -m comment --comment ${mark} -j ACCEPT`;
  const apply = lab.exec(operator.argv(`vmmesh iptables apply --confirm-within ${CONFIRM_SECONDS}`), {
    allowFail: true,
    timeoutMs: 60_000,
  });
  const meanwhile = (async () => {
    await sleep(profile.meanwhileMs);
    await machine.exec(
      `iptables-nft -w 10 -I INPUT ${foreign}; iptables-nft -w 10 -t nat -A OUTPUT ${foreign}`,
    );
  })();
  const { killed } = profile;
  if (killed !== undefined) {
    await machine.exec(`for i in $(seq 500); do test -e ${TRIAL} && break; sleep 0.01; done`);
    await sleep(killed.afterMs);
    if (!(await trialIsOver(machine))) tally.killedInTrial += 1;
    await machine.exec(
      killed.what === "vmmesh" ? "pkill -KILL -f 'iptables apply --confirm-within'" : KILL_ITS_SESSION,
      { allowFail: true },
    );
  }
  const killedAt = performance.now();
  const { code } = await apply;
  await meanwhile;
  if (killed === undefined) tally[code === 0 ? "confirmed" : "refused"] += 1;
  else tally.killed += 1;
  const late = (CONFIRM_SECONDS + SLACK_SECONDS) * 1000;
  try {
    await waitFor(
      "the trial to be over",
      async () => ((await trialIsOver(machine)) ? true : undefined),
      60_000,
      100,
    );
  } finally {
    const took = performance.now() - killedAt;
    if (killed !== undefined) {
      tally.longestRollbackMs = Math.max(tally.longestRollbackMs, took);
      if (took > late) tally.lateRollbacks += 1;
    }
  }
  tally.longestWithoutLoginMs = Math.max(tally.longestWithoutLoginMs, await watched.stop());
  const rules = (await machine.exec("iptables-nft-save")).stdout;
  if (rules.split(mark).length - 1 !== 2) tally.meanwhileLost += 1;
  await machine.exec(
    `iptables-nft -w 10 -D INPUT ${foreign}; iptables-nft -w 10 -t nat -D OUTPUT ${foreign}`,
    {
      allowFail: true,
    },
  );
  if ((await foreignHash(machine)) !== before) tally.foreignChanged += 1;
  tally.rounds += 1;
}

export const proof: Proof = {
  name: "ssh",
  about: `random apply profiles over a real SSH session on port ${PORT}, killed at random`,
  async run(scale: Scale) {
    const lab = await Lab.open();
    await cleanNamespace(lab);
    await lab.removeVm("operated");
    const machine = await lab.vm("operated", { deb: packageFile() });
    await using operator = await Operator.make(lab, machine);
    const folder = mkdtempSync(join(tmpdir(), "vmmesh-session-"));
    // Opened before anything used conntrack: the kernel will meet it in the middle.
    const session = await liveSession(lab, operator, folder);
    const tally: Tally = {
      rounds: 0,
      confirmed: 0,
      killed: 0,
      killedInTrial: 0,
      refused: 0,
      longestWithoutLoginMs: 0,
      sessionsLost: 0,
      foreignChanged: 0,
      meanwhileLost: 0,
      lateRollbacks: 0,
      longestRollbackMs: 0,
    };
    const alive = async (): Promise<void> => {
      if (!(await session.still())) tally.sessionsLost += 1;
    };
    try {
      await alive();
      await defineWorkload(lab, "operated", 9080);
      cpSync(await istioctlBundle(lab, "operated"), `${machine.root}/root/b`, { recursive: true });
      await machine.exec("vmmesh join --bundle /root/b");
      await alive();
      const profiles = fc.sample(PROFILE, { numRuns: scale === "full" ? 100 : 6, seed: SEED });
      for (const [number, profile] of profiles.entries()) {
        await round(lab, machine, operator, profile, number, tally);
        await alive();
      }
      const trials = scale === "full" ? 10 : 2;
      const peers = [
        ...(await byIptablesApply(lab, machine, operator, trials)),
        // Another machine, of another release: half a minute that tells nothing of vmmesh.
        ...(scale === "full" ? await byNetplanTry(lab, trials) : []),
      ];
      await machine.exec("vmmesh leave");
      await alive();
      const of = `of ${tally.rounds} random profiles (${tally.confirmed} confirmed, ${tally.refused} refused, ${tally.killed} killed at random)`;
      return [
        row(
          "ssh",
          `${of}: longest time without a new login`,
          seconds(tally.longestWithoutLoginMs),
          "s",
          `<= ${CONFIRM_SECONDS + SLACK_SECONDS}`,
        ),
        row(
          "ssh",
          "live session, opened before anything used conntrack, broken by join, profiles or leave",
          tally.sessionsLost,
          "times",
          "= 0",
        ),
        row("ssh", `${of}: foreign rules changed`, tally.foreignChanged, "profiles", "= 0"),
        row("ssh", `${of}: rules that others wrote meanwhile lost`, tally.meanwhileLost, "profiles", "= 0"),
        row(
          "ssh",
          `rollbacks later than ${CONFIRM_SECONDS + SLACK_SECONDS} s after the kill`,
          tally.lateRollbacks,
          "rollbacks",
          "= 0",
        ),
        row("ssh", "longest time from the kill to the rollback's end", seconds(tally.longestRollbackMs), "s"),
        row("ssh", "kills while the rules were on trial", tally.killedInTrial, "kills", "> 0"),
        ...peers,
      ];
    } finally {
      await session.stop();
      rmSync(folder, { recursive: true, force: true });
      await lab.removeVm("operated");
    }
  },
};

const seconds = (ms: number): number => Math.round(ms / 10) / 100;
