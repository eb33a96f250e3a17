import { cpSync } from "node:fs";
import { cpus, loadavg } from "node:os";
import { cleanNamespace, defineWorkload, istioctlBundle } from "../lab/acceptance.ts";
import { Lab, type Machine, say, sleep, waitFor } from "../lab/lab.ts";
import type { Scale } from "../suite.ts";
import { packageFile } from "../vm/package.ts";
import { besideCalico } from "./order/calico.ts";
import { between, lost, observe, type Said } from "./order/observer.ts";
import {
  AFTER_WIPE,
  KUBE,
  KUBE_READY,
  PACKAGES,
  prepareWriters,
  startWriters,
  WRITERS,
} from "./order/writers.ts";
import { type Proof, type ProofRow, row } from "./proof.ts";

const NAME = "order";
const VM = "ordervm";

/**
 * Real programs that write the firewall, restarted at random, while an ordinary user of the machine calls a service by its
 * ClusterIP. kube-proxy and the network lead to an application that answers whoever comes; only what Envoy has forwarded
 * carries Envoy's headers. Who times the displacement is outside of vmmesh and asks the kernel every few milliseconds.
 */
export const proof: Proof = {
  name: NAME,
  about:
    "kube-proxy, firewalld, Docker, Podman, libvirt, Tailscale, ufw and persons with iptables and nft, at random, then Calico's Felix, under steady requests",
  async run(scale) {
    const lab = await Lab.open({ istiodDefaults: false });
    await cleanNamespace(lab);
    await lab.removeVm(VM);
    const ends: (() => Promise<void>)[] = [];
    try {
      return await measure(lab, scale, ends);
    } finally {
      for (const end of ends.reverse()) await end();
      await lab.removeVm(VM);
      await lab.kubectl(["delete", "--ignore-not-found", "node", VM]);
      await lab.kubectl(["delete", "--ignore-not-found", "service,endpointslice", "order-target"]);
    }
  },
};

async function prepare(lab: Lab): Promise<{ machine: Machine; address: string }> {
  const machine = await lab.vm(VM, {
    deb: packageFile(),
    packages: PACKAGES,
  });
  await defineWorkload(lab, VM, 9080);
  await lab.apply(`
apiVersion: v1
kind: Service
metadata: {name: order-target, namespace: default}
spec: {ports: [{name: http, port: 80, targetPort: 9081}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: order-target, namespace: default, labels: {kubernetes.io/service-name: order-target}}
addressType: IPv4
ports: [{name: http, port: 9081, protocol: TCP}]
endpoints: [{addresses: ["${lab.address}"], conditions: {ready: true}}]
`);
  // kube-proxy waits half a minute for a node that is not there.
  await lab.apply(`apiVersion: v1\nkind: Node\nmetadata: {name: ${VM}}\n`);
  await lab.kubectl([
    ...["patch", "node", VM, "--subresource=status", "--type=merge", "-p"],
    JSON.stringify({ status: { addresses: [{ type: "InternalIP", address: machine.ip }] } }),
  ]);
  const { stdout: address } = await lab.kubectl([
    ...["get", "service", "order-target", "-o", "jsonpath={.spec.clusterIP}"],
  ]);
  cpSync(await istioctlBundle(lab, VM), `${machine.root}/root/bundle`, { recursive: true });
  machine.putFile("/etc/kube-proxy.conf", lab.kubeconfigText("admin"), 0o600);
  machine.putFile(
    "/etc/systemd/system/kube-proxy.service",
    `[Unit]\nStartLimitIntervalSec=0\n[Service]\nEnvironment=MODE=iptables\nEnvironmentFile=-/run/kube-proxy.mode\nExecStart=${KUBE} --kubeconfig=/etc/kube-proxy.conf --proxy-mode=\${MODE} --cluster-cidr=10.244.0.0/16 --conntrack-max-per-core=0 --hostname-override=${VM}\n`,
  );
  await prepareWriters(machine);
  await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
  await startWriters(machine);
  return { machine, address };
}

/** @throws {Error} with what stands there, after a minute */
async function jumpFirst(machine: Machine): Promise<void> {
  let rules = "";
  await waitFor(
    "the jump to be first",
    async () => {
      rules = (await machine.exec("iptables-nft -t nat -S OUTPUT")).stdout;
      return /^-P OUTPUT ACCEPT\n-A OUTPUT .*-j ISTIO_OUTPUT\n/.test(`${rules}\n`) ? true : undefined;
    },
    60_000,
    20,
  ).catch(async (thrown: unknown) => {
    say(`${rules}\n${await diary(machine, Date.now() - 75_000, [])}`);
    throw thrown;
  });
}

async function measure(lab: Lab, scale: Scale, ends: (() => Promise<void>)[]): Promise<ProofRow[]> {
  const { machine, address } = await prepare(lab);
  await lab.exec(["ip", "address", "replace", `${address}/32`, "dev", "lo"]);
  const app = `import http.server
class A(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(self.headers).lower().encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *words): pass
class S(http.server.ThreadingHTTPServer): request_queue_size = 512
import threading
threading.Thread(target=S(("0.0.0.0", 80), A).serve_forever).start()
S(("0.0.0.0", 9081), A).serve_forever()`;
  const target = lab.spawn("order-target", ["/usr/bin/python3", "-c", app]);
  ends.push(() => target.stop());
  ends.push(async () => {
    await lab.exec(["ip", "address", "del", `${address}/32`, "dev", "lo"], { allowFail: true });
  });
  const jump = observe(machine, ends, "jump");
  const calls = observe(machine, ends, "calls", address);
  await waitFor(
    "requests through Envoy",
    async () => {
      const last = calls.slice(-20);
      return last.length === 20 && last.every(({ what }) => what === "envoy") ? true : undefined;
    },
    30_000,
  );

  const restarts = await atRandom(machine, scale, jump, calls);
  const modes = await otherModes(machine, address, scale === "full" ? 10 : 2, calls);
  const kept = await foreignKept(machine, scale);
  const calico = await besideCalico(machine, scale, observe(machine, ends, "places"), calls);
  return [...restarts, ...modes, ...kept, ...calico];
}

const percent = (part: number, of: number): number => (of === 0 ? 0 : (100 * part) / of);
const at = (share: number, values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * share))] ?? 0;

/** What the machine wrote down meanwhile, for who looks into a request that was lost. */
async function diary(machine: Machine, from: number, gone: readonly Said[]): Promise<string> {
  const { stdout } = await machine.exec(
    `journalctl -o short-precise --no-pager --since=@${(from / 1000).toFixed(3)} | cut -c1-300; nft list table inet vmmesh-fence | grep -B1 packets | head -60`,
    { allowFail: true },
  );
  return `${gone.map(({ at: when, what }) => `${new Date(when).toISOString()} ${what}`).join("\n")}\n${stdout}`;
}

/** Every writer once in turn, then at random: a quick run sees each, a full one each about ten times. */
async function atRandom(
  machine: Machine,
  scale: Scale,
  jump: readonly Said[],
  calls: readonly Said[],
): Promise<ProofRow[]> {
  const count = scale === "full" ? 100 : WRITERS.length;
  const repairs: number[] = [];
  const named = { right: 0, wrong: 0, unknown: 0 };
  const wipes = { all: 0, right: 0, wrong: 0 };
  const after: Said[] = [];
  const away: Said[] = [];
  let lostStanding = 0;
  let refusedWiped = 0;
  let displaced = 0;
  for (let round = 0; round < count; round += 1) {
    const writer = WRITERS[round < WRITERS.length ? round : Math.floor(Math.random() * WRITERS.length)];
    if (writer === undefined) throw new Error("there is no writer");
    const from = Date.now();
    await machine.exec(writer.does, { allowFail: true });
    await sleep(1500);
    await jumpFirst(machine);
    const settled = Date.now();
    await sleep(500);
    const to = Date.now();
    const seen = between(calls, from, to);
    const changes = between(jump, from, to);
    const times = changes.flatMap(({ at: when, what }, index) => {
      const next = changes[index + 1];
      return what === "displaced" && next !== undefined ? [next.at - when] : [];
    });
    if (!writer.wipes) repairs.push(...times);
    after.push(...between(calls, settled, to));
    away.push(...seen);
    const gone = seen.filter(lost).length;
    if (writer.wipes) refusedWiped += gone;
    else lostStanding += gone;
    const { stdout } = await machine.exec(
      `journalctl -u vmmesh-agent -o cat --no-pager --since=@${(from / 1000).toFixed(3)} | grep -o '.* had moved our rules'`,
      { allowFail: true },
    );
    const names = stdout
      .split("\n")
      .filter(Boolean)
      .map((line) => line.replace(" had moved our rules", ""));
    if (times.length > 0) displaced += 1;
    // kube-proxy puts its jump back in front when somebody has taken it out, in this round or later: the observer saw whose it was.
    const kube = changes.some(({ ahead }) => ahead.startsWith("KUBE-"));
    if (writer.wipes) {
      wipes.all += 1;
      if (names.includes(writer.is)) wipes.right += 1;
      else if (names.length > 0) wipes.wrong += 1;
    }
    for (const name of times.length > 0 && !writer.wipes ? names : []) {
      if (name === writer.is || (kube && name === "kube-proxy")) named.right += 1;
      else if (writer.by?.includes(name)) named.unknown += 1;
      else named.wrong += 1;
    }
    if (times.length > 0 && names.length === 0 && !writer.wipes) named.unknown += 1;
    say(
      `${writer.name}: ${times.map((ms) => `${ms} ms`).join(", ") || "not displaced"}; by ${names.join(", ") || "nobody"}; ${gone} of ${seen.length} lost ${[...new Set(seen.filter(lost).map(({ what }) => what))].join(" ")}`,
    );
    if (gone > 0 && !writer.wipes) say(await diary(machine, from, seen.filter(lost)));
    if (writer.wipes) {
      await machine.exec(AFTER_WIPE);
      await sleep(1500);
      await jumpFirst(machine);
    }
  }
  const told = named.right + named.wrong;
  return [
    row(NAME, "restarts and reloads of real firewall programs, at random", count, "rounds"),
    row(NAME, "rounds in which the jump was displaced", displaced, "rounds", "> 0"),
    row(
      NAME,
      "requests by ClusterIP that reach Envoy after the repair",
      percent(after.filter(({ what }) => what === "envoy").length, after.length),
      "%",
      "= 100",
    ),
    row(
      NAME,
      "requests past Envoy, displaced or not",
      away.filter(({ what }) => what === "past").length,
      "requests",
      "= 0",
    ),
    row(
      NAME,
      `requests lost during displacement and repair while the guard stood, of ${away.length}`,
      lostStanding,
      "requests",
      // Next to nothing on a machine that is busy with other work.
      scale === "full" ? "= 0" : "<= 5",
    ),
    row(
      NAME,
      "requests refused by the held fence after somebody wiped all of nf_tables",
      refusedWiped,
      "requests",
    ),
    row(
      NAME,
      `from the jump displaced to the jump first again, median of ${repairs.length} (wipes of all nf_tables apart; load ${loadavg()[0]?.toFixed(1)} on ${cpus().length} cores)`,
      at(0.5, repairs),
      "ms",
      // A lane that shares its machine with other work says nothing of a machine at rest.
      scale === "full" ? "< 100" : "< 1000",
    ),
    row(NAME, "the same, 95th percentile", at(0.95, repairs), "ms"),
    // A quick run has some five names: a percentage of them says nothing, and kube-proxy may write of its own accord once.
    row(
      NAME,
      "who moved it is named right, of those named",
      percent(named.right, told),
      "%",
      scale === "full" ? ">= 95" : "",
    ),
    row(NAME, `wrong names, of ${told}`, named.wrong, "names", scale === "full" ? "" : "<= 1"),
    row(
      NAME,
      "nobody, or only a tool that firewalld or another runs, is named, of all displacements",
      percent(named.unknown, told + named.unknown),
      "%",
    ),
    row(
      NAME,
      `who wiped all of nf_tables is named right, of ${wipes.all} wipes`,
      percent(wipes.right, wipes.all),
      "%",
      scale === "full" ? ">= 95" : "= 100",
    ),
    row(NAME, "the same, but somebody else is named", wipes.wrong, "wipes"),
  ];
}

/** kube-proxy with nftables, whose base chains are registered last at each start; and ClusterIPs that are local, as with IPVS. */
async function otherModes(
  machine: Machine,
  address: string,
  count: number,
  calls: readonly Said[],
): Promise<ProofRow[]> {
  await machine.exec(
    `systemctl stop kube-proxy; ${KUBE} --cleanup; echo MODE=nftables > /run/kube-proxy.mode`,
    {
      allowFail: true,
    },
  );
  const from = Date.now();
  for (let round = 0; round < count; round += 1) {
    await machine.exec("systemctl restart kube-proxy");
    await waitFor("kube-proxy's nftables", async () =>
      (await machine.exec("nft list chain ip kube-proxy nat-output", { allowFail: true })).code === 0
        ? true
        : undefined,
    );
    await sleep(1000);
  }
  const nft = between(calls, from, Date.now());
  await machine.exec(
    "systemctl stop kube-proxy; nft delete table ip kube-proxy; nft delete table ip6 kube-proxy",
    { allowFail: true },
  );
  const vip = Date.now();
  await machine.exec(`ip address add ${address}/32 dev lo`);
  await sleep(3000);
  const local = between(calls, vip, Date.now());
  await machine.exec(`ip address del ${address}/32 dev lo`);
  return [
    row(
      NAME,
      `kube-proxy in nftables mode restarted ${count} times under load: requests past Envoy, of ${nft.length}`,
      nft.filter(({ what }) => what === "past").length,
      "requests",
      "= 0",
    ),
    row(NAME, "the same: requests lost", nft.filter(lost).length, "requests", "= 0"),
    row(
      NAME,
      `ClusterIP local (stand-in for IPVS, which this kernel lacks): requests past Envoy, of ${local.length}`,
      local.filter(({ what }) => what === "past").length,
      "requests",
      "= 0",
    ),
    row(NAME, "the same: requests lost, a loop among them", local.filter(lost).length, "requests", "= 0"),
  ];
}

const OURS = /ISTIO_|VMMESH_|vmmesh/;

/** Everybody's rules but ours, in the order in which they stand. */
async function foreign(machine: Machine): Promise<string> {
  const { stdout } = await machine.exec(
    "iptables-nft-save; ip6tables-nft-save; nft -s list table inet firewalld",
    { allowFail: true },
  );
  const lines = stdout
    .split("\n")
    .filter(
      (line) => (line.startsWith("-A") || /^:\S+ - /.test(line) || line.startsWith("\t")) && !OURS.test(line),
    )
    .map((line) => line.replace(/ \[\d+:\d+\]/, ""));
  return lines.join("\n");
}

/** Lines that only one of two texts has. */
function difference(before: string, after: string): string {
  const only = (one: string, other: string, sign: string): string[] => {
    const known = new Set(other.split("\n"));
    return one.split("\n").flatMap((line) => (known.has(line) ? [] : [`${sign} ${line}`]));
  };
  const lines = [...only(before, after, "-"), ...only(after, before, "+")];
  return lines.length === 0 ? "the same lines in another order" : lines.join("\n");
}

/** Their rules once they have stopped writing: the same three times, a second apart. */
async function writtenRules(machine: Machine): Promise<string> {
  const seen: string[] = [];
  await waitFor(
    "others to have written their rules",
    async () => {
      seen.push(await foreign(machine));
      const last = seen.slice(-3);
      return last.length === 3 && new Set(last).size === 1 ? true : undefined;
    },
    60_000,
    1000,
  );
  return seen.at(-1) ?? "";
}

/** Each writer once with no repair of ours, which then comes by hand: what others wrote is what it was. */
async function foreignKept(machine: Machine, scale: Scale): Promise<ProofRow[]> {
  await machine.exec(`rm -f /run/kube-proxy.mode; systemctl start kube-proxy; ${KUBE_READY}`);
  // Each waits until everybody else has stopped writing: a quick run asks a few, who prepend, reload and wipe.
  const asked = scale === "full" ? WRITERS : WRITERS.filter(({ kept }) => kept);
  let same = 0;
  for (const writer of asked) {
    await machine.exec(
      "systemctl stop vmmesh-rules.path vmmesh-rules.timer vmmesh-nftmon.service vmmesh-order vmmesh-rules",
    );
    await machine.exec(writer.does, { allowFail: true });
    await sleep(1500);
    const before = await writtenRules(machine);
    // It looks every 30 s whether its chains still stand: what it then writes is not of our doing.
    await machine.exec("systemctl kill --signal=STOP kube-proxy");
    await machine.exec("systemctl start vmmesh-order; systemctl start vmmesh-rules");
    await jumpFirst(machine);
    const after = await foreign(machine);
    await machine.exec("systemctl kill --signal=CONT kube-proxy");
    if (before === after) same += 1;
    say(`${writer.name}: others' rules are ${before === after ? "" : "not "}what they were`);
    if (before !== after) say(difference(before, after));
    await machine.exec("systemctl start vmmesh-rules.path vmmesh-rules.timer vmmesh-nftmon.service");
  }
  return [
    row(
      NAME,
      `foreign rules with our repair as without it, line by line, of ${asked.length} writers`,
      percent(same, asked.length),
      "%",
      "= 100",
    ),
  ];
}
