import { cpSync, statSync } from "node:fs";
import { parseArgs } from "node:util";
import {
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  requireRoot,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, say, sleep } from "../lab/lab.ts";
import { ADDRESS } from "../lab/parts.ts";
import { installPeer, PEER_RULES, startPeer } from "../lab/peer.ts";
import { packageFile } from "../vm/package.ts";

/**
 * vmmesh beside the real pilot-agent, in one run on one real mesh: `npm run bench [-- --json] [--runs N]`. Each has a
 * systemd machine of its own with the same stock Envoy; the runs of the two take turns, and the median counts. What
 * matters is the ratio (vmmesh / peer, lower is better): the numbers themselves are those of the machine it runs on.
 */
const { values } = parseArgs({
  options: { json: { type: "boolean", default: false }, runs: { type: "string", default: "5" } },
});
const RUNS = Number(values.runs);
const GOAL = 1;
const SETTLED_MS = 20_000;
const QUERIES = 2000;
const OUTSIDE = "outside.lab";
const NAMES = ["benchvmmesh", "benchpeer"] as const;

/** One of the two that are compared. */
interface Side {
  readonly key: "vmmesh" | "peer";
  readonly machine: Machine;
  readonly unit: string;
  /** Takes away what a first start does not have. */
  readonly forget: string;
  /** Executable and a word of the command line. */
  readonly agent: readonly string[];
  readonly noRules: string;
  readonly rules: readonly string[];
}

interface Measure {
  readonly unit: string;
  readonly vmmesh: number[];
  readonly peer: number[];
}

interface Row {
  readonly measure: string;
  readonly unit: string;
  readonly vmmesh: number;
  /** null: only vmmesh tells this of itself. */
  readonly peer: number | null;
  readonly ratio: number | null;
  readonly goal: number | null;
  readonly runs: number;
  readonly samples: { readonly vmmesh: readonly number[]; readonly peer: readonly number[] };
}

const measures = new Map<string, Measure>();

function note({ key }: Side, measure: string, unit: string, value: number): void {
  const known = measures.get(measure) ?? { unit, vmmesh: [], peer: [] };
  known[key].push(value);
  measures.set(measure, known);
}

async function probe<T>(machine: Machine, ...words: string[]): Promise<T> {
  const { stdout } = await machine.exec(["python3", "/opt/probe.py", ...words]);
  return JSON.parse(stdout) as T;
}

async function prepare(lab: Lab): Promise<readonly [Side, Side]> {
  await cleanNamespace(lab);
  await Promise.all(NAMES.map((name) => lab.removeVm(name)));
  await strictMtls(lab);
  const ours = await lab.vm(NAMES[0], { deb: packageFile() });
  const theirs = await lab.vm(NAMES[1]);
  for (const machine of [ours, theirs]) {
    await defineWorkload(lab, machine.name, 9080);
    await startApp(machine, 9080);
    cpSync(new URL("./probe.py", import.meta.url), `${machine.root}/opt/probe.py`);
  }

  cpSync(await istioctlBundle(lab, ours.name), `${ours.root}/root/bundle`, { recursive: true });
  await ours.exec("vmmesh join --bundle /root/bundle");

  await installPeer(lab, theirs, theirs.name);
  // vmmesh leaves its rules in force when its services stop; a start without making them is compared with such a start.
  theirs.putFile(
    "/etc/systemd/system/peer.service.d/bench.conf",
    "[Service]\nExecStartPre=\nExecStopPost=\n",
  );
  await theirs.exec(`systemctl daemon-reload; ${PEER_RULES}`);
  await startPeer(theirs);

  return [
    {
      key: "vmmesh",
      machine: ours,
      unit: "vmmesh.target",
      forget: "rm -rf /var/lib/vmmesh/identity/* /var/lib/vmmesh/xds",
      agent: ["/usr/lib/vmmesh/node", "/usr/lib/vmmesh/agentd.mjs"],
      noRules: "vmmesh iptables clean; nft flush ruleset",
      rules: ["vmmesh", "iptables", "apply", "--output", "json"],
    },
    {
      key: "peer",
      machine: theirs,
      unit: "peer.service",
      forget: "rm -f /etc/certs/cert-chain.pem /etc/certs/key.pem",
      agent: ["/usr/local/bin/pilot-agent", "proxy"],
      noRules: "nft flush ruleset",
      rules: ["sh", "-c", PEER_RULES],
    },
  ];
}

/** Services stopped, no certificate, the rules in force; the token is what the first start of a machine has. */
async function coldStart(side: Side): Promise<void> {
  await side.machine.exec(`systemctl stop ${side.unit}; ${side.forget}`);
  const seconds = await probe<number>(side.machine, "start", side.unit);
  note(side, "start to ready, cold", "ms", seconds * 1000);
}

async function memory(side: Side): Promise<void> {
  const agent = await probe<{ pss: number; anonymous: number; rss: number }>(
    side.machine,
    "memory",
    ...side.agent,
  );
  const envoy = await probe<{ rss: number }>(side.machine, "memory", "/usr/local/bin/envoy");
  note(side, "agent's memory, PSS", "MiB", agent.pss / 1024);
  // The rest of PSS is pages of files: the program itself, which the kernel may drop and read again.
  note(side, "agent's memory, anonymous part of PSS", "MiB", agent.anonymous / 1024);
  note(side, "agent's memory, RSS", "MiB", agent.rss / 1024);
  note(side, "Envoy's memory, RSS", "MiB", envoy.rss / 1024);
}

async function rules(side: Side): Promise<void> {
  await side.machine.exec(side.noRules);
  const left = await side.machine.exec("iptables-save; ip6tables-save");
  if (left.stdout.includes("ISTIO_"))
    throw new Error(`${side.key}: the tables are not empty:\n${left.stdout}`);
  const { seconds, stdout } = await probe<{ seconds: number; stdout: string }>(
    side.machine,
    "wall",
    ...side.rules,
  );
  note(side, "rules on empty tables, whole command", "ms", seconds * 1000);
  if (side.key !== "vmmesh") return;
  const { appliedInMs } = JSON.parse(stdout) as { appliedInMs: number };
  note(side, "rules on empty tables, applied in (as it says itself)", "ms", appliedInMs);
}

async function names(side: Side, meshName: string, meshAddress: string): Promise<void> {
  const asked = [
    ["DNS, mesh name", meshName, meshAddress],
    ["DNS, forwarded name", OUTSIDE, ADDRESS.controlPlane],
  ] as const;
  for (const [measure, name, address] of asked) {
    const took = await probe<{ median: number; p99: number }>(
      side.machine,
      "dns",
      ADDRESS.controlPlane,
      name,
      address,
      String(QUERIES),
    );
    note(side, `${measure}, median of ${QUERIES}`, "µs", took.median * 1e6);
    note(side, `${measure}, 99th percentile`, "µs", took.p99 * 1e6);
  }
}

function median(samples: readonly number[]): number {
  const sorted = samples.toSorted((one, other) => one - other);
  const [low, high] = [sorted[(sorted.length - 1) >> 1] ?? 0, sorted[sorted.length >> 1] ?? 0];
  return (low + high) / 2;
}

const rounded = (value: number, digits: number): number => Number(value.toFixed(digits));

function rows(): Row[] {
  return [...measures].map(([measure, { unit, vmmesh, peer }]) => {
    const compared = peer.length > 0;
    return {
      measure,
      unit,
      vmmesh: rounded(median(vmmesh), 1),
      peer: compared ? rounded(median(peer), 1) : null,
      ratio: compared ? rounded(median(vmmesh) / median(peer), 2) : null,
      goal: compared ? GOAL : null,
      runs: vmmesh.length,
      samples: {
        vmmesh: vmmesh.map((value) => rounded(value, 1)),
        peer: peer.map((value) => rounded(value, 1)),
      },
    };
  });
}

function table(found: readonly Row[]): string {
  const spread = (samples: readonly number[]): string =>
    samples.length === 0 ? "" : `${Math.min(...samples)}–${Math.max(...samples)}`;
  const cells = [
    ["measure", "unit", "vmmesh", "(range)", "peer", "(range)", "ratio", ""],
    ...found.map((row) => [
      row.measure,
      row.unit,
      String(row.vmmesh),
      spread(row.samples.vmmesh),
      String(row.peer ?? "—"),
      spread(row.samples.peer),
      row.ratio?.toFixed(2) ?? "—",
      row.ratio !== null && row.goal !== null && row.ratio > row.goal ? "worse than the peer" : "",
    ]),
  ];
  const widths = (cells[0] ?? []).map((_, column) =>
    Math.max(...cells.map((row) => row[column]?.length ?? 0)),
  );
  return cells
    .map((row) =>
      row
        .map((cell, column) =>
          column < 2 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0),
        )
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

requireRoot();
// A lab of its own, unless one is named: it clears namespace default.
const named = process.env["VMMESH_LAB_ID"];
const lab = await Lab.open({ id: named ?? "bench" });
try {
  const sides = await prepare(lab);
  const meshName = `${NAMES[1]}.default.svc.cluster.local`;
  const { stdout: meshAddress } = await lab.kubectl([
    "get",
    "service",
    NAMES[1],
    "-o",
    "jsonpath={.spec.clusterIP}",
  ]);
  const { istiod, envoy } = await lab.versions();
  // Which package it was: its version stays the same from one change to the next.
  const built = statSync(packageFile()).mtime.toISOString();
  const versions = `vmmesh package of ${built}, istiod and pilot-agent ${istiod}, Envoy ${envoy}, median of ${RUNS} runs`;
  for (let run = 1; run <= RUNS; run += 1) {
    // Whoever goes first may find colder caches: they take turns in that, too.
    const order = run % 2 === 1 ? sides : sides.toReversed();
    say(`run ${run} of ${RUNS}`);
    for (const side of order) await coldStart(side);
    await sleep(SETTLED_MS);
    for (const side of order) await memory(side);
    for (const side of order) await names(side, meshName, meshAddress);
    // Last: vmmesh captures DNS only while its agent is seen to answer, and with new rules that takes up to a second.
    for (const side of order) await rules(side);
  }
  const found = rows();
  if (values.json) {
    say(versions);
    console.log(JSON.stringify(found, null, 1));
  } else console.log(`${versions}; ratio = vmmesh / peer, lower is better\n\n${table(found)}`);
} finally {
  if (named === undefined) await lab.down();
  else await Promise.all(NAMES.map((name) => lab.removeVm(name)));
}
