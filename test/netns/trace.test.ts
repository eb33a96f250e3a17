import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { dirname } from "node:path";
import { setTimeout } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { TRACE_TABLE, traceLive } from "../../agent/iptables/trace/live.ts";
import { type Question, traceStatic } from "../../agent/iptables/trace/trace.ts";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/trace.ts";
import { eventually, Lab, MACHINE, REMOTE, SERVICE, UID } from "./lab.ts";
import { Dice } from "./rulesets.ts";

test("what the walk says is what the kernel does (quick scale of the proof)", async () => {
  await quick(proof);
});

describe("on a machine with capture", () => {
  let lab: Lab;
  beforeEach(async () => {
    lab = await Lab.make();
  });
  afterEach(async () => {
    await lab[Symbol.asyncDispose]();
  });

  const asUser = (uid: number, address: string, port: number): Question => ({
    to: { address, port },
    protocol: "tcp",
    by: { sender: { uid, gid: uid, cgroup: undefined }, label: String(uid) },
  });

  test("our own rules are told with their reasons, and the kernel's trace agrees", async () => {
    await lab.populate();
    await lab.install();
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "ENVOY-OUT", 5000);
    const rows = [
      [
        UID.app,
        SERVICE.ip,
        80,
        `reaches Envoy's outbound listener 15001 with original destination ${SERVICE.ip}:80`,
      ],
      [
        UID.app,
        SERVICE.ip6,
        80,
        `reaches Envoy's outbound listener 15001 with original destination [${SERVICE.ip6}]:80`,
      ],
      [
        UID.app,
        REMOTE.ip,
        80,
        `reaches Envoy's outbound listener 15001 with original destination ${REMOTE.ip}:80`,
      ],
      [UID.envoy, SERVICE.ip, 80, `leaves by eth0 to ${SERVICE.ip}:80 past Envoy`],
      [UID.app, MACHINE.ip, 9001, `reaches python3 on ${MACHINE.ip}:9001 past Envoy`],
    ] as const;
    for (const [uid, address, port, verdict] of rows) {
      const question = asUser(uid, address, port);
      const report = await traceStatic(lab.host, question);
      expect.soft(report.verdict).toBe(verdict);
      expect
        .soft(await traceLive(lab.host, question, report), verdict)
        .toMatchObject({ agrees: true, attempt: "connected" });
    }
    const inbound = await traceStatic(lab.host, {
      to: { address: MACHINE.ip, port: 9000 },
      protocol: "tcp",
      by: { from: REMOTE.ip },
    });
    expect(inbound.verdict).toBe(
      `reaches Envoy's inbound listener 15006 with original destination ${MACHINE.ip}:9000`,
    );
    expect(inbound.ends[0]?.hops.some(({ owner }) => owner === "vmmesh")).toBe(true);
    expect(await tables()).not.toContain(TRACE_TABLE);
  });

  test("a lapsed lease is seen: what is not of the mesh goes out directly", async () => {
    const { envoy } = await lab.populate();
    await lab.install();
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "ENVOY-OUT", 5000);
    envoy.kill("SIGKILL");
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "DIRECT", 10_000);
    const question = asUser(UID.app, REMOTE.ip, 80);
    const report = await traceStatic(lab.host, question);
    expect(report.verdict).toBe(`leaves by eth0 to ${REMOTE.ip}:80 past Envoy`);
    expect(await traceLive(lab.host, question, report)).toMatchObject({ agrees: true });
  });

  /** The command in a mount namespace where any user may read it. */
  const traceAs = async (user: string): Promise<{ code: number; stdout: string; stderr: string }> =>
    await lab.inside([
      "sh",
      "-ec",
      `mount -t tmpfs none /mnt; mkdir /mnt/vmmesh /mnt/node; chmod 755 /mnt
       mount --bind "$1" /mnt/vmmesh; mount --bind "$2" /mnt/node
       exec setpriv ${user} /mnt/node/node /mnt/vmmesh/agent/main.ts iptables trace --output json --to ${MACHINE.ip}:9001 --as nobody`,
      "sh",
      new URL("../..", import.meta.url).pathname,
      dirname(process.execPath),
    ]);

  test.each([
    [
      "an ordinary user",
      "--reuid 65534 --regid 65534 --clear-groups --no-new-privs",
      "sudo vmmesh iptables trace",
    ],
    ["root without CAP_NET_ADMIN", "--bounding-set -net_admin --inh-caps -net_admin", "CAP_NET_ADMIN"],
  ])("%s hears what lies around the rules, and that it is not the rules", async (_who, user, next) => {
    await lab.populate();
    await lab.install();
    const before = await lab.firewall();
    const { code, stdout, stderr } = await traceAs(user);
    expect(code, stderr).toBe(8);
    const report = JSON.parse(stdout) as {
      rulesRead: boolean;
      because: string;
      facts: string[];
      next: string;
    };
    expect(report).toMatchObject({ rulesRead: false, because: "this process has no CAP_NET_ADMIN" });
    expect(report.next).toContain(next);
    expect(report.facts).toEqual(
      expect.arrayContaining([
        expect.stringMatching(
          new RegExp(
            `^by the routes alone it would stay on this machine, where .+ listens.* on ${MACHINE.ip}:9001$`,
          ),
        ),
        expect.stringMatching(/ listens on 15001, Envoy's outbound port$/),
        expect.stringContaining("/proc/net/ip_tables_names"),
        expect.stringContaining("nobody is uid 65534"),
        expect.stringContaining("/run/vmmesh-capture.json"),
      ]),
    );
    expect(await lab.firewall()).toEqual(before);
  });

  const tables = async (): Promise<string> => (await lab.inside(["nft", "list", "tables"])).stdout;

  /** The command itself, in a process group of its own. */
  const live = (where: Lab, to: string): ChildProcess =>
    spawn(
      "ip",
      [
        ...["netns", "exec", where.machine, process.execPath],
        new URL("../../agent/main.ts", import.meta.url).pathname,
        ...["iptables", "trace", "--to", to, "--as", String(UID.app), "--live"],
      ],
      { stdio: "ignore", detached: true },
    );

  /** At work on a connection that nobody answers. */
  async function tracing(): Promise<{ pid: number }> {
    await lab.insideShell(
      `nft add table ip site; nft 'add chain ip site out { type filter hook output priority 0; }'; nft add rule ip site out tcp dport 81 drop`,
    );
    const child = live(lab, `${SERVICE.ip}:81`);
    await eventually(async () => (await tables()).includes(TRACE_TABLE), 10_000);
    return { pid: child.pid ?? 0 };
  }

  test("killed in the middle, the trace is taken away all the same", async () => {
    const { pid } = await tracing();
    process.kill(pid, "SIGKILL");
    await eventually(async () => !(await tables()).includes(TRACE_TABLE), 6000);
    expect(await tables()).toContain("table ip site");
  });

  test("the table cannot outlive the process that holds it", async () => {
    const { pid } = await tracing();
    const holders = (await lab.insideShell(`ip netns pids ${lab.machine} | xargs ps -o pid=,args= -p`))
      .split("\n")
      .filter((line) => /^\s*\d+ nft -i$/.test(line))
      .map((line) => Number.parseInt(line, 10));
    expect(holders).toHaveLength(1);
    for (const holder of holders) process.kill(holder, "SIGKILL");
    await eventually(async () => !(await tables()).includes(TRACE_TABLE), 1000);
    process.kill(pid, "SIGKILL");
  });

  test("one trace at a time: the second one says so and leaves the first alone", async () => {
    const { pid } = await tracing();
    const second = await traceLive(lab.host, asUser(UID.app, SERVICE.ip, 81), { ends: [] });
    expect(second).toContain("another `vmmesh iptables trace --live` is at work");
    process.kill(-pid, "SIGKILL");
  });

  test("killed twenty times at any moment, alone or with its children, nothing stays behind", async () => {
    await using other = await Lab.make();
    await Promise.all(
      [lab, other].map(async (where, seed) => {
        await where.populate();
        const before = await where.firewall();
        const dice = new Dice(seed);
        for (let kill = 0; kill < 10; kill++) {
          const child = live(where, `${REMOTE.ip}:80`);
          const ended = once(child, "exit");
          await Promise.race([ended, setTimeout(dice.below(1500))]);
          if (child.exitCode === null) process.kill((kill % 2 ? 1 : -1) * (child.pid ?? 0), "SIGKILL");
          await ended;
          await eventually(async () => !(await where.firewall()).join("\n").includes("vmmesh-trace"), 10_000);
        }
        expect(await where.firewall()).toEqual(before);
        await eventually(
          async () =>
            !/nft|setpriv/.test(
              await where.insideShell(`ip netns pids ${where.machine} | xargs -r ps -o args= -p`),
            ),
          10_000,
        );
      }),
    );
  });
});
