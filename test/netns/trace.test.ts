import { spawn } from "node:child_process";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { TRACE_TABLE, traceLive } from "../../agent/iptables/trace/live.ts";
import { type Question, traceStatic } from "../../agent/iptables/trace/trace.ts";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/trace.ts";
import { eventually, Lab, MACHINE, REMOTE, SERVICE, UID } from "./lab.ts";

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

  const tables = async (): Promise<string> => (await lab.inside(["nft", "list", "tables"])).stdout;

  /** The command itself, at work on a connection that nobody answers. */
  async function tracing(): Promise<{ pid: number }> {
    await lab.insideShell(
      `nft add table ip site; nft 'add chain ip site out { type filter hook output priority 0; }'; nft add rule ip site out tcp dport 81 drop`,
    );
    const main = new URL("../../agent/main.ts", import.meta.url).pathname;
    const child = spawn(
      "ip",
      [
        "netns",
        "exec",
        lab.machine,
        process.execPath,
        main,
        "iptables",
        "trace",
        "--to",
        `${SERVICE.ip}:81`,
        "--as",
        String(UID.app),
        "--live",
      ],
      { stdio: "ignore" },
    );
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
});
