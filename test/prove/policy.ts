import { cpSync, readFileSync } from "node:fs";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  spiffe,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, say, sleep, waitFor } from "../lab/lab.ts";
import { installPeer, startPeer } from "../lab/peer.ts";
import type { Scale } from "../suite.ts";
import { packageFile } from "../vm/package.ts";
import { type Proof, type ProofRow, row } from "./proof.ts";

const NAME = "policy";
const SCRIPT = readFileSync(new URL("policy.py", import.meta.url), "utf8");
const APP_PORT = 9080;
/** By when the mesh has to be reached again; the peer waits 10 s before it starts anew. */
const BACK_MS = 40_000;
/** Where nobody of the mesh is. */
const OPEN_PORT = 8099;

/**
 * What leaves a machine in plaintext while its proxy is down, frozen, restarted, flushed away or not there yet. STRICT mutual
 * TLS, so nothing may. An application calls a service of the mesh all the time, with a marker in each request, by new
 * connections and by one that stays; where it would arrive past Envoy somebody answers. Who looks is outside of the
 * machine, at the other end of its cable. Somebody outside the mesh calls the machine's declared port meanwhile.
 */
export const proof: Proof = {
  name: NAME,
  about: "what leaves in plaintext in every window of the failure policy, seen on the wire, beside the peer",
  async run(scale) {
    const lab = await Lab.open({ istiodDefaults: false });
    await cleanNamespace(lab);
    await Promise.all(["polserver", "polvm", "polpeer"].map((name) => lab.removeVm(name)));
    const spawned: { stop(): Promise<void> }[] = [];
    try {
      return await measure(lab, scale, spawned);
    } finally {
      await Promise.all(spawned.map((it) => it.stop()));
      await Promise.all(["polserver", "polvm", "polpeer"].map((name) => lab.removeVm(name)));
    }
  },
};

/** A window: something is wrong from when it begins until it ends; then the machine is left to itself. */
interface Window {
  readonly name: string;
  /** Only at the full scale. */
  readonly full?: true;
  /** An open destination has to be reached meanwhile. */
  readonly open?: true;
  readonly ours: (machine: Machine) => Promise<void>;
  /** undefined: the peer has no such part. */
  readonly peers?: (machine: Machine) => Promise<void>;
}

const sh =
  (command: string) =>
  async (machine: Machine): Promise<void> => {
    await machine.exec(command, { allowFail: true });
  };
/** `-x`: only processes of that very name, of this machine alone: the command runs in its namespaces. */
const envoy = (signal: string): string => `pkill -${signal} -x envoy`;
const times = (count: number, apart: number, command: string): string =>
  `for i in $(seq ${count}); do ${command}; sleep ${apart}; done`;

const frozen = async (machine: Machine): Promise<void> => {
  await machine.exec(envoy("STOP"));
  await sleep(7000);
  await machine.exec(envoy("CONT"), { allowFail: true });
};
const FLUSH = times(5, 1.5, "nft flush ruleset");
const NAT_FLUSH = times(5, 1, "iptables -t nat -F");
const CRASH_LOOP = times(40, 0.25, envoy("KILL"));
const ahead = (address: string, how: string): string =>
  `iptables -t nat ${how} -p tcp -d ${address} -j ACCEPT`;
const displaced = (address: string): string => times(5, 1, ahead(address, "-I OUTPUT 1"));

function windows(address: string): Window[] {
  return [
    { name: "Envoy killed", open: true, ours: sh(envoy("KILL")), peers: sh(envoy("KILL")) },
    { name: "Envoy frozen for 7 s", open: true, ours: frozen, peers: frozen },
    {
      name: "Envoy crash-looping for 10 s",
      full: true,
      open: true,
      ours: sh(CRASH_LOOP),
      peers: sh(CRASH_LOOP),
    },
    {
      name: "Envoy stopped for 8 s",
      open: true,
      ours: sh("systemctl stop vmmesh-envoy; sleep 8; systemctl start vmmesh-envoy"),
      peers: sh("systemctl stop peer; sleep 8; systemctl start peer"),
    },
    {
      name: "Envoy restarted",
      ours: sh("systemctl restart vmmesh-envoy"),
      peers: sh("systemctl restart peer"),
    },
    {
      name: "agent killed",
      ours: sh("systemctl kill -s KILL vmmesh-agent"),
      peers: sh("pkill -KILL pilot-agent"),
    },
    { name: "vmmesh upgraded", full: true, ours: sh("dpkg -i /root/vmmesh.deb") },
    { name: "iptables -t nat -F, five times", ours: sh(NAT_FLUSH), peers: sh(NAT_FLUSH) },
    { name: "nft flush ruleset, five times", ours: sh(FLUSH), peers: sh(FLUSH) },
    {
      name: "an ACCEPT put ahead, five times",
      ours: sh(displaced(address)),
      // It adds its jump at the end: what is ahead has to go, or it would never be reached again.
      peers: sh(`${displaced(address)}; while ${ahead(address, "-D OUTPUT")}; do :; done`),
    },
    {
      name: "repairs without a pause, everything flushed among them",
      full: true,
      ours: sh(`nft flush ruleset; ${times(10, 0.3, "systemctl start vmmesh-rules; nft flush ruleset")}`),
    },
    {
      name: "boot",
      full: true,
      ours: (machine) => machine.reboot(),
      peers: (machine) => machine.reboot(),
    },
  ];
}

async function measure(lab: Lab, scale: Scale, spawned: { stop(): Promise<void> }[]): Promise<ProofRow[]> {
  const deb = packageFile();
  const script = `${lab.folder("policy")}/policy.py`;
  const server = await lab.vm("polserver", { deb });
  const ours = await lab.vm("polvm", { deb });
  await strictMtls(lab);
  for (const machine of [server, ours]) await prepare(lab, machine);
  await join(lab, server);
  const { stdout: address } = await lab.kubectl([
    "get",
    "service",
    server.name,
    "-o",
    "jsonpath={.spec.clusterIP}",
  ]);
  // A plaintext connection to the service has to succeed wherever it is not prevented.
  await lab.exec(["ip", "address", "replace", `${address}/32`, "dev", "lo"]);
  cpSync(new URL("policy.py", import.meta.url).pathname, script);
  const spawn = (name: string, ...words: string[]) => {
    const process = lab.spawn(`policy-${name}`, ["/usr/bin/python3", script, ...words]);
    spawned.push(process);
    return process;
  };
  spawn("sink", "sink", "80", String(OPEN_PORT));
  const wire = spawn("wire", "wire");
  await waitFor("the observer", async () => (wire.log().includes("ready") ? true : undefined));

  const rows: ProofRow[] = [];
  const side = async (machine: Machine, who: ProofRow["side"]): Promise<void> => {
    await startCaller(machine, `${address} ${lab.address}:${OPEN_PORT}`);
    spawn(`outsider-${who}`, "outsider", machine.ip, String(APP_PORT));
    const plain = await waitFor(
      "the marker before there is a mesh",
      async () => leaked(wire.log(), machine) || undefined,
    );
    rows.push(
      row(NAME, "control, not joined yet: marker bytes that the observer sees", plain, "bytes", "> 0", who),
    );
    await waitFor("the outsider before there is a mesh", async () => strangers(machine) || undefined);
    if (who === "vmmesh") await join(lab, machine);
    else {
      await installPeer(lab, machine, machine.name);
      // As the unit in the peer's own package does.
      machine.putFile(
        "/etc/systemd/system/peer.service.d/restart.conf",
        "[Service]\nRestart=always\nRestartSec=10\n",
      );
      await machine.exec("systemctl daemon-reload; systemctl enable -q peer.service");
      await startPeer(machine);
    }
    await answered(machine, Date.now());
    // Connections of before the join stay as they are, here as with the peer: the application starts anew.
    await machine.exec("systemctl restart caller");
    await answered(machine, Date.now());
    for (const window of windows(address)) {
      const action = who === "vmmesh" ? window.ours : window.peers;
      if (action === undefined || (window.full === true && scale === "quick")) continue;
      rows.push(...(await look(window, action, machine, who, () => leaked(wire.log(), machine))));
    }
  };
  await side(ours, "vmmesh");
  await arrivesAs(server, `http://${ours.name}.default.svc.cluster.local/`, spiffe(server.name));
  if (scale === "full") {
    const peer = await lab.vm("polpeer");
    await prepare(lab, peer);
    await side(peer, "peer");
  }
  return rows;
}

async function look(
  { name, open }: Window,
  action: (machine: Machine) => Promise<void>,
  machine: Machine,
  who: ProofRow["side"],
  leakedNow: () => number,
): Promise<ProofRow[]> {
  if (who === "peer") {
    // It does not mend what was taken from it: each window begins with one that is whole.
    await machine.exec("systemctl restart peer");
    await answered(machine, Date.now());
    // What slipped out while its rules were away would go on in the window of another.
    await machine.exec("systemctl restart caller");
    await answered(machine, Date.now());
  }
  const began = Date.now();
  const before = { wire: leakedNow(), app: strangers(machine) };
  await action(machine);
  const ended = Date.now();
  const bounds = who === "vmmesh";
  const back = await answered(machine, ended).catch(async (thrown: unknown) => {
    if (bounds) throw thrown;
    return undefined;
  });
  const rows = [
    row(
      NAME,
      `${name}: marker bytes on the wire`,
      leakedNow() - before.wire,
      "bytes",
      bounds ? "= 0" : "",
      who,
    ),
    row(
      NAME,
      `${name}: calls from outside the mesh that the application answered`,
      strangers(machine) - before.app,
      "requests",
      bounds ? "= 0" : "",
      who,
    ),
    back === undefined
      ? row(NAME, `${name}: it came back by itself within ${BACK_MS / 1000} s`, 0, "times", "", who)
      : row(
          NAME,
          `${name}: from its end until the mesh is reached through the proxy`,
          (back - ended) / 1000,
          "s",
          "",
          who,
        ),
  ];
  if (open === true && back !== undefined) {
    const gap = longestGap(machine, began, back);
    rows.push(
      row(NAME, `${name}: longest time without an open destination`, gap, "s", bounds ? "<= 4" : "", who),
    );
  }
  say(rows.map(({ what, value, unit }) => `${who} ${what}: ${value} ${unit}`).join("\n"));
  return rows;
}

async function prepare(lab: Lab, machine: Machine): Promise<void> {
  await defineWorkload(lab, machine.name, APP_PORT, { probe: "" });
  machine.putFile("/opt/policy.py", SCRIPT);
  await start(machine, "app", `app ${APP_PORT} ${machine.name}`);
}

/** As ordinary services, enabled: at a boot they begin as early as any application. */
async function start(machine: Machine, unit: string, words: string): Promise<void> {
  machine.putFile(
    `/etc/systemd/system/${unit}.service`,
    `[Service]\nExecStart=/usr/bin/python3 /opt/policy.py ${words}\nUser=nobody\nRestart=always\nStandardOutput=append:/var/log/${unit}.log\n[Install]\nWantedBy=basic.target\n`,
  );
  await machine.exec(`systemctl daemon-reload && systemctl enable -q --now ${unit}.service`);
}

const startCaller = (machine: Machine, words: string): Promise<void> =>
  start(machine, "caller", `caller ${words}`);

async function join(lab: Lab, machine: Machine): Promise<void> {
  cpSync(await istioctlBundle(lab, machine.name), `${machine.root}/root/bundle`, { recursive: true });
  await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
}

/** Lines of a log of policy.py: time in milliseconds, then words. */
function lines(text: string): { at: number; words: string[] }[] {
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.split(" "))
    .map(([at, ...words]) => ({ at: Number(at) * 1000, words }));
}

const leaked = (log: string, machine: Machine): number =>
  lines(log)
    .filter(({ words }) => words[0] === `m${machine.number}`)
    .reduce((sum, { words }) => sum + Number(words[1]), 0);

const strangers = (machine: Machine): number =>
  lines(machine.getFile("/var/log/app.log")).filter(({ words }) => words[0] === "direct").length;

const calls = (machine: Machine): { at: number; words: string[] }[] =>
  lines(machine.getFile("/var/log/caller.log"));

/** When the mesh first answered through the proxy after `since`, ten times without another answer between. */
function answered(machine: Machine, since: number): Promise<number> {
  return waitFor(
    `${machine.name} to reach the mesh again`,
    async () => {
      const after = calls(machine).filter(({ at, words }) => at > since && words[0] === "mesh");
      const last = after.slice(-10);
      return last.length === 10 && last.every(({ words }) => words[1] === "polserver")
        ? last[0]?.at
        : undefined;
    },
    BACK_MS,
    200,
  );
}

/** Longest time between two answers of the open destination, in seconds. */
function longestGap(machine: Machine, from: number, to: number): number {
  const times = calls(machine)
    .filter(({ at, words }) => at > from && at < to && words[0] === "open" && words[1] === "sink")
    .map(({ at }) => at);
  return Math.max(...[...times, to].map((at, index, all) => at - (all[index - 1] ?? from))) / 1000;
}
