import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, sleep, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/**
 * The harder half of leave under load (leave.test.ts has the other): without a probe the mesh takes no word on health, only
 * the end of the stream withdraws the endpoint; and half of the requests come over connections of their own.
 */
let lab: Lab;
let caller: Machine;
let leaver: Machine;
let stayer: Machine;

const NAMES = ["caller", "leaver", "stayer"] as const;
const RATE = 200;

/**
 * Paced load, not as fast as it goes: every worker has its own beat and is not slowed down by others' answers. Half of the
 * workers keep their connection, the others open one for each request. On SIGTERM it prints what happened.
 */
const LOAD = `
import collections, http.client, json, signal, sys, threading, time
host, rate, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
WORKERS = 40
stop, lock = threading.Event(), threading.Lock()
sent, failures, servers, slowest = 0, [], collections.Counter(), 0.0
signal.signal(signal.SIGTERM, lambda *_: stop.set())
def work(index):
    global sent, slowest
    keep, connection = index % 2 == 0, None
    beat = time.monotonic() + index / rate
    while not stop.wait(max(0, beat - time.monotonic())):
        beat += WORKERS / rate
        began, why, server = time.monotonic(), None, None
        try:
            connection = connection or http.client.HTTPConnection(host, 80, timeout=5)
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status == 200:
                server = json.loads(body)["server"]
            else:
                why = "%d %s" % (answer.status, body[:200].decode())
        except Exception as error:
            why = repr(error)
        if connection is not None and (why is not None or not keep):
            connection.close()
            connection = None
        with lock:
            sent += 1
            slowest = max(slowest, time.monotonic() - began)
            if why is None:
                servers[server] += 1
            else:
                failures.append({"at": time.time(), "why": why, "kept": keep})
threads = [threading.Thread(target=work, args=(index,)) for index in range(WORKERS)]
began = time.monotonic()
for thread in threads: thread.start()
while not stop.wait(0.1): pass
for thread in threads: thread.join()
seconds = time.monotonic() - began
with open(out, "w") as file:
    json.dump({"sent": sent, "seconds": seconds, "servers": servers, "slowest": slowest, "failures": failures}, file)
`;

interface LoadReport {
  readonly sent: number;
  readonly seconds: number;
  /** Answers by the machine that gave them. */
  readonly servers: Readonly<Record<string, number>>;
  /** Seconds. */
  readonly slowest: number;
  readonly failures: readonly { at: number; why: string; kept: boolean }[];
}

async function startLoad(): Promise<{ stop(): Promise<LoadReport> }> {
  const report = "/var/tmp/load.json";
  await caller.exec(
    `rm -f ${report}; systemd-run -q --unit=load --uid=65534 -p TimeoutStopSec=20 /usr/bin/python3 /opt/load.py pair.default.svc.cluster.local ${RATE} ${report}`,
  );
  return {
    async stop() {
      await caller.exec("systemctl stop load");
      return JSON.parse(caller.getFile(report)) as LoadReport;
    },
  };
}

async function join(machine: Machine): Promise<void> {
  await machine.exec("vmmesh join --bundle /root/bundle");
}

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await Promise.all(NAMES.map((name) => lab.removeVm(name)));
  const deb = packageFile();
  caller = await lab.vm("caller", { deb });
  leaver = await lab.vm("leaver", { deb });
  stayer = await lab.vm("stayer", { deb });
  await strictMtls(lab);
  for (const machine of [leaver, stayer]) await startApp(machine, 9080);
  caller.putFile("/opt/load.py", LOAD);
  await defineWorkload(lab, "caller", 9090, { probe: "" });
  cpSync(await istioctlBundle(lab, "caller"), `${caller.root}/root/bundle`, { recursive: true });
  await join(caller);
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(NAMES.map((name) => lab?.removeVm(name)));
});

describe(`a peer that sends ${RATE} requests/s sees none fail`, () => {
  test("while one of two machines without a probe leaves", async () => {
    await defineWorkload(lab, "pair", 9080, { probe: "" });
    for (const machine of [leaver, stayer]) {
      cpSync(await istioctlBundle(lab, "pair"), `${machine.root}/root/bundle`, { recursive: true });
      await join(machine);
    }
    await waitFor("both to be endpoints", async () => {
      const seen = new Set<string | undefined>();
      for (let round = 0; round < 8; round += 1)
        seen.add((await arrivesAs(caller, "http://pair/", spiffe("caller"))).server);
      return seen.size === 2 ? true : undefined;
    });

    const load = await startLoad();
    await sleep(3000);
    const began = Date.now();
    await leaver.exec("vmmesh leave");
    const leftInS = (Date.now() - began) / 1000;
    // What stopped with the machine would show only now.
    await sleep(3000);
    const { sent, seconds, servers, slowest, failures } = await load.stop();
    console.log(
      `leave took ${leftInS.toFixed(1)} s; ${sent} requests in ${seconds.toFixed(1)} s (${(sent / seconds).toFixed(0)}/s), ` +
        `${failures.length} failed, slowest ${(slowest * 1000).toFixed(0)} ms, answered by ${JSON.stringify(servers)}`,
    );
    for (const { at, why, kept } of failures.slice(0, 20))
      console.log(`failed ${at - began / 1000} s after the leave began (kept connection: ${kept}): ${why}`);
    expect(failures).toEqual([]);
    expect(sent / seconds).toBeGreaterThan(RATE * 0.9);
    // It was a member at first, and the other one took over.
    expect(servers["leaver"]).toBeGreaterThan(RATE);
    expect(servers["stayer"]).toBeGreaterThan(RATE);
  });
});
