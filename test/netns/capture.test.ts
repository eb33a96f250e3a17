import { spawn } from "node:child_process";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { applyPlan } from "../../agent/iptables/apply.ts";
import { auditCapture } from "../../agent/iptables/audit/audit.ts";
import { auditExitCode } from "../../agent/iptables/audit/finding.ts";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { DEFAULT_ROUTE_TABLE } from "../../agent/iptables/plan/wish.ts";
import { readMachine } from "../../agent/iptables/read.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { eventually, Lab, LEGACY, MACHINE, REMOTE, SERVICE, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const options = () => ({ confirmWithinMs: 30_000, rulesDir: lab.rulesDir, unit: "detached" as const });

const install = (wish = WISH) => lab.install(wish);

/** Until the first health check has been answered, captured traffic outside the mesh is direct. */
async function leased(): Promise<void> {
  await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "ENVOY-OUT", 5000);
  await eventually(async () => (await lab.dial(UID.app, REMOTE.ip6, 80)) === "ENVOY-OUT", 5000);
}

describe("capture, both families", () => {
  test("who reaches whom", async () => {
    await lab.populate();
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("DIRECT");
    const trial = await install();
    console.log(`applied in ${trial.appliedInMs.toFixed(0)} ms`);
    await leased();
    const from = { app: UID.app, root: 0, envoy: UID.envoy, agent: UID.agent };
    const rows = [
      ["an application to a service", from.app, SERVICE.ip, 80, "ENVOY-OUT"],
      ["an application to a service, IPv6", from.app, SERVICE.ip6, 80, "ENVOY-OUT"],
      ["root to a service", from.root, SERVICE.ip, 80, "ENVOY-OUT"],
      ["an application to a stranger", from.app, REMOTE.ip, 80, "ENVOY-OUT"],
      ["Envoy to a service", from.envoy, SERVICE.ip, 80, "DIRECT"],
      ["Envoy to a service, IPv6", from.envoy, SERVICE.ip6, 80, "DIRECT"],
      ["the agent to a service", from.agent, SERVICE.ip, 80, "DIRECT"],
      ["an application to its own machine", from.app, MACHINE.ip, 9000, "APP"],
      ["an application to loopback", from.app, "127.0.0.1", 9000, "APP"],
      ["Envoy to its own machine comes in as inbound", from.envoy, MACHINE.ip, 9000, "ENVOY-IN"],
      ["Envoy to its own machine comes in as inbound, IPv6", from.envoy, MACHINE.ip6, 9000, "ENVOY-IN"],
      ["Envoy to a port that is not declared", from.envoy, MACHINE.ip, 9001, "OTHER"],
      ["Envoy to its application on loopback", from.envoy, "127.0.0.1", 9000, "APP"],
    ] as const;
    for (const [name, uid, address, port, want] of rows)
      expect.soft(await lab.dial(uid, address, port), name).toBe(want);
    const outside = [
      ["a declared port", MACHINE.ip, 9000, "ENVOY-IN"],
      ["a declared port, IPv6", MACHINE.ip6, 9000, "ENVOY-IN"],
      ["sshd", MACHINE.ip, 22, "SSHD"],
      ["sshd, IPv6", MACHINE.ip6, 22, "SSHD"],
      ["a port that is not declared", MACHINE.ip, 9001, "OTHER"],
    ] as const;
    for (const [name, address, port, want] of outside) {
      expect.soft(await lab.dial(UID.app, address, port, lab.world), `from outside: ${name}`).toBe(want);
    }
  });

  test("applied twice, and loaded twice, is applied once", async () => {
    await install();
    const once = await lab.firewall();
    expect(await loadConfirmed(lab.host, lab.rulesDir)).toMatchObject({ state: "in place", repaired: [] });
    await install();
    expect(await lab.firewall()).toEqual(once);
  });
});

/** What kube-proxy writes in iptables mode, put ahead of everybody. */
const KUBE_PREPEND = `iptables-nft-restore --noflush <<'END'
*nat
:KUBE-SERVICES - [0:0]
-A KUBE-SERVICES -d ${SERVICE.ip}/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination ${REMOTE.ip}:8080
-I OUTPUT 1 -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
COMMIT
END`;

/** What kube-proxy does at each start in nftables mode: its base chains are made anew, so they run before older ones of their priority. */
const KUBE_NFT = `nft -f - <<'END'
add table ip kube-proxy
delete table ip kube-proxy
table ip kube-proxy {
  chain nat-output { type nat hook output priority -100; policy accept;
    ip daddr ${SERVICE.ip} tcp dport 80 dnat to ${REMOTE.ip}:8080
  }
}
END`;

describe("other owners of the firewall", () => {
  test("KUBE-SERVICES put ahead of us: the guard captures, and repair puts the order right", async () => {
    await lab.populate();
    await install();
    await lab.insideShell(KUBE_PREPEND);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.envoy, SERVICE.ip, 80)).toBe("POD");
    const report = await loadConfirmed(lab.host, lab.rulesDir);
    expect(report.repaired).toHaveLength(1);
    expect(report.repaired[0]).toContain("put there by kube-proxy");
    expect((await lab.insideShell("iptables-nft -t nat -S OUTPUT | grep ^-A")).split("\n")[0]).toContain(
      "ISTIO_OUTPUT",
    );
  });

  test("what is excluded stays direct also where kube-proxy changes its address and port", async () => {
    await lab.populate();
    await install({ ...WISH, outbound: { ...WISH.outbound, excludePorts: [80] } });
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("DIRECT");
    await lab.insideShell(KUBE_PREPEND);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("POD");
  });

  test("Envoy's own listeners cannot be dialled from outside", async () => {
    await lab.populate();
    expect(await lab.dial(UID.app, MACHINE.ip, 15_001, lab.world)).toBe("ENVOY-OUT");
    await install();
    for (const port of [15_001, 15_006]) {
      expect(await lab.dial(UID.app, MACHINE.ip, port, lab.world)).toBe("refused");
      expect(await lab.dial(UID.app, MACHINE.ip6, port, lab.world)).toBe("refused");
    }
  });

  test("an nft nat chain of the same priority, registered last: the guard captures", async () => {
    await lab.populate();
    await install();
    await lab.insideShell(KUBE_NFT);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.envoy, SERVICE.ip, 80)).toBe("POD");
  });

  test("nat flushed and the guard gone: the fence refuses, nothing leaks, repair brings all back", async () => {
    await lab.populate();
    await install();
    const before = await lab.firewall();
    await lab.insideShell(
      "iptables-nft -t nat -F; ip6tables-nft -t nat -F; nft delete table ip vmmesh; nft delete table ip6 vmmesh",
    );
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("refused");
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("refused");
    expect(await lab.dial(UID.app, MACHINE.ip6, 9000, lab.world)).toBe("refused");
    expect(await lab.dial(UID.envoy, SERVICE.ip, 80)).toBe("DIRECT");
    expect(await lab.dial(UID.app, MACHINE.ip, 22, lab.world)).toBe("SSHD");
    const report = await loadConfirmed(lab.host, lab.rulesDir);
    expect(report.state).toBe("repaired");
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.firewall()).toEqual(before);
  });

  test("nat flushed: the guard alone captures", async () => {
    await lab.populate();
    await install();
    await lab.insideShell("iptables-nft -t nat -F; ip6tables-nft -t nat -F");
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.app, MACHINE.ip6, 9000, lab.world)).toBe("ENVOY-IN");
  });

  test("the whole ruleset flushed: repair brings ours back", async () => {
    await lab.populate();
    await install();
    const before = await lab.firewall();
    await lab.insideShell("nft flush ruleset");
    await loadConfirmed(lab.host, lab.rulesDir);
    expect(await lab.firewall()).toEqual(before);
  });
});

describe("leases", () => {
  test("Envoy frozen: the mesh stays closed, other traffic goes direct after 3 s, and comes back", async () => {
    const { envoy } = await lab.populate();
    await install();
    await leased();
    const frozenAt = performance.now();
    signal(envoy, "SIGSTOP");
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "DIRECT", 8000);
    console.log(`frozen → direct in ${((performance.now() - frozenAt) / 1000).toFixed(2)} s`);
    expect(await lab.dial(UID.app, REMOTE.ip6, 80)).toBe("DIRECT");
    signal(envoy, "SIGCONT");
    const back = await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "ENVOY-OUT", 5000);
    console.log(`back in ${(back / 1000).toFixed(2)} s`);
  });

  test("Envoy killed: the mesh and declared ports are refused, other traffic goes direct", async () => {
    const { envoy } = await lab.populate();
    await install();
    await leased();
    signal(envoy, "SIGKILL");
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "DIRECT", 8000);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("refused");
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("refused");
  });

  test("the same by iptables alone, where there is no nft", async () => {
    const { envoy } = await lab.populate();
    await install();
    await lab.insideShell(
      "nft delete table ip vmmesh; nft delete table ip6 vmmesh; nft delete table inet vmmesh-fence",
    );
    await leased();
    signal(envoy, "SIGSTOP");
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "DIRECT", 8000);
    expect(await lab.dial(UID.app, REMOTE.ip6, 80)).toBe("DIRECT");
    signal(envoy, "SIGCONT");
    await leased();
  });

  /** A resolver out there, and an agent that answers for it and asks itself every second. */
  async function agentAndResolver() {
    await lab.serve(lab.world, UID.app, {
      tcp: [
        [REMOTE.ip, 53, "RESOLVER"],
        [REMOTE.ip6, 53, "RESOLVER"],
      ],
      udp: [
        [REMOTE.ip, 53, "RESOLVER"],
        [REMOTE.ip6, 53, "RESOLVER"],
      ],
    });
    return lab.serve(lab.machine, UID.agent, {
      tcp: [
        ["127.0.0.1", 15053, "AGENT"],
        ["::1", 15053, "AGENT"],
      ],
      udp: [
        ["127.0.0.1", 15053, "AGENT"],
        ["::1", 15053, "AGENT"],
      ],
      question: [
        ["127.0.0.1", 15053],
        ["::1", 15053],
      ],
    });
  }

  test.for([
    { name: "guard and iptables-nft", facts: {} },
    { name: "iptables-legacy alone", facts: LEGACY },
  ])("names by $name: the agent answers while it lives, the real resolver otherwise", async ({ facts }) => {
    const agent = await agentAndResolver();
    const wish = { ...WISH, dns: { servers: [REMOTE.ip, REMOTE.ip6] } };
    await lab.install(wish, facts);
    for (const server of wish.dns.servers) {
      await eventually(async () => (await lab.ask(UID.app, server, 53)) === "AGENT", 5000);
      expect(await lab.dial(UID.app, server, 53)).toBe("AGENT");
      expect(await lab.ask(UID.agent, server, 53)).toBe("RESOLVER");
    }
    signal(agent, "SIGSTOP");
    const lapse = await eventually(async () => (await lab.ask(UID.app, REMOTE.ip, 53)) === "RESOLVER", 8000);
    console.log(`agent frozen → resolver in ${(lapse / 1000).toFixed(2)} s`);
    for (const server of wish.dns.servers) {
      expect(await lab.ask(UID.app, server, 53)).toBe("RESOLVER");
      expect(await lab.dial(UID.app, server, 53)).toBe("RESOLVER");
    }
    signal(agent, "SIGCONT");
    await eventually(async () => (await lab.ask(UID.app, REMOTE.ip, 53)) === "AGENT", 5000);
  });

  test.for([
    { name: "guard and iptables-nft", facts: {} },
    { name: "iptables-legacy alone", facts: LEGACY },
  ])("a socket that asks again is not pinned to the agent that has gone: $name", async ({ facts }) => {
    const agent = await agentAndResolver();
    await lab.install({ ...WISH, dns: { servers: [REMOTE.ip] } }, facts);
    await eventually(async () => (await lab.ask(UID.app, REMOTE.ip, 53)) === "AGENT", 5000);
    signal(agent, "SIGSTOP");
    expect(await lab.askTwice(UID.app, REMOTE.ip, 53)).toBe("RESOLVER");
  });
});

describe("a kernel without nf_tables", () => {
  test("legacy iptables alone: capture, leases, repair and removal", async () => {
    const { envoy } = await lab.populate();
    // Registered legacy tables stay until the next boot; here they are made first, so that equality can be asked for.
    for (const table of ["raw", "mangle", "nat"]) {
      await lab.insideShell(`iptables-legacy -t ${table} -S; ip6tables-legacy -t ${table} -S`);
    }
    const before = await lab.firewall("legacy");
    await lab.install(WISH, LEGACY);
    await leased();
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.envoy, SERVICE.ip6, 80)).toBe("DIRECT");
    expect(await lab.dial(UID.app, MACHINE.ip6, 9000, lab.world)).toBe("ENVOY-IN");
    expect(await lab.dial(UID.app, MACHINE.ip, 22, lab.world)).toBe("SSHD");
    await lab.insideShell(
      "iptables-legacy -t nat -F OUTPUT; ip6tables-legacy -t nat -I OUTPUT 1 -p tcp -j ACCEPT",
    );
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("DIRECT");
    expect((await loadConfirmed(lab.host, lab.rulesDir)).repaired).toHaveLength(2);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    await lab.insideShell("ip6tables-legacy -t nat -D OUTPUT -p tcp -j ACCEPT");
    signal(envoy, "SIGKILL");
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "DIRECT", 8000);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      residue: [],
      foreignUnchanged: true,
    });
    expect(await lab.firewall("legacy")).toEqual(before);
  });
});

/** The stand-in for kube-proxy jumps from OUTPUT alone. */
const KUBE_IS_THERE = ["FW010", "FW034"];

describe("audit", () => {
  test("nothing on a fresh machine, nothing after a join, the jump and who is ahead when they are", async () => {
    await lab.populate();
    expect(await auditCapture(lab.host, undefined)).toEqual([]);
    await install();
    expect(await auditCapture(lab.host, lab.rulesDir)).toEqual([]);
    await lab.insideShell(KUBE_PREPEND);
    await lab.insideShell("ip6tables-nft -t nat -F OUTPUT");
    const found = await auditCapture(lab.host, lab.rulesDir);
    expect(found.map(({ id }) => id)).toEqual(["FW001", "FW002", ...KUBE_IS_THERE]);
    expect(auditExitCode(found)).toBe(2);
    await removeCapture(lab.host, lab.rulesDir);
    expect((await auditCapture(lab.host, undefined)).map(({ id }) => id)).toEqual(KUBE_IS_THERE);
  });

  test("it writes nothing: no legacy table is registered by looking", async () => {
    const before = await lab.firewall();
    await auditCapture(lab.host, undefined);
    await readMachine(lab.host);
    expect(await lab.firewall()).toEqual(before);
    expect(await lab.insideShell("cat /proc/net/ip_tables_names")).toBe("");
  });
});

describe("commit-confirm", () => {
  test("the process that applied is killed: the rules go out on time", async () => {
    await lab.populate();
    const before = await lab.firewall();
    const child = spawn(
      "ip",
      [
        "netns",
        "exec",
        lab.machine,
        process.execPath,
        new URL("apply-and-wait.ts", import.meta.url).pathname,
        lab.rulesDir,
        "2500",
      ],
      { stdio: ["ignore", "pipe", "inherit"] },
    );
    await new Promise((resolve) => child.stdout.once("data", resolve));
    signal(child, "SIGKILL");
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    await eventually(async () => (await lab.dial(UID.app, SERVICE.ip, 80)) === "DIRECT", 8000);
    await eventually(async () => JSON.stringify(await lab.firewall()) === JSON.stringify(before), 3000);
  });

  test("a reboot in a trial comes back without it, and with what was confirmed", async () => {
    await install();
    const before = await lab.firewall();
    const trial = await lab.apply({ ...WISH, sshPorts: [2222] });
    await lab.insideShell("nft flush ruleset");
    const rebooted: typeof lab.host = {
      ...lab.host,
      files: {
        ...lab.host.files,
        readText: async (path) => (path.endsWith("/boot_id") ? "another\n" : lab.host.files.readText(path)),
      },
    };
    expect(await loadConfirmed(rebooted, lab.rulesDir)).toMatchObject({
      state: "repaired",
      droppedTrial: true,
    });
    expect(await lab.firewall()).toEqual(before);
    await expect(trial.confirm()).rejects.toMatchObject({ code: "RULES_NOT_CONFIRMED" });
  });

  test("what is loaded at boot before the network, without Node, closes the mesh", async () => {
    await lab.populate();
    await install();
    await lab.insideShell(`nft flush ruleset; nft -f ${lab.rulesDir}/confirmed/boot.nft`);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    await lab.insideShell("nft delete table ip vmmesh");
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
  });

  test("fewer families than before: nothing of the former rules stays", async () => {
    await lab.populate();
    await install();
    await install({ ...WISH, ipv6: false, inbound: { kind: "ports", ports: [] } });
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("DIRECT");
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("APP");
    expect(await lab.insideShell("ip6tables-nft-save; iptables-nft-save")).not.toContain("ISTIO_INBOUND");
    await removeCapture(lab.host, lab.rulesDir);
    expect((await lab.firewall()).filter((line) => /ISTIO|VMMESH|vmmesh/.test(line))).toEqual([]);
  });

  test.for(["REDIRECT", "TPROXY"] as const)(
    "every port after declared ones by %s: the former inbound chain goes, and clean leaves nothing",
    async (mode) => {
      const interception = mode === "TPROXY" ? { mode, routeTable: DEFAULT_ROUTE_TABLE } : { mode };
      await lab.populate();
      const before = await lab.firewall();
      await install({ ...WISH, interception });
      await install({ ...WISH, interception, inbound: { kind: "all", excludePorts: [] } });
      expect(await lab.insideShell("iptables-nft-save; ip6tables-nft-save")).not.toContain(
        "-j ISTIO_INBOUND",
      );
      await removeCapture(lab.host, lab.rulesDir);
      expect(await lab.firewall()).toEqual(before);
    },
  );

  test("somebody else's istio-iptables is not overwritten", async () => {
    await lab.insideShell(
      "iptables-nft -t nat -N ISTIO_OUTPUT; iptables-nft -t nat -A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN",
    );
    const before = await lab.firewall();
    await expect(lab.apply()).rejects.toMatchObject({
      code: "RULES_REJECTED",
    });
    expect(await lab.firewall()).toEqual(before);
  });

  test("nobody confirms: the timer takes everything out, without Node", async () => {
    await lab.populate();
    const before = await lab.firewall();
    await lab.apply(WISH, {}, 1500);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    const out = await eventually(async () => (await lab.dial(UID.app, SERVICE.ip, 80)) === "DIRECT", 6000);
    console.log(`taken back after ${(out / 1000).toFixed(2)} s`);
    await eventually(async () => JSON.stringify(await lab.firewall()) === JSON.stringify(before), 3000);
  });

  test("confirmed too late is an error, and nothing is kept", async () => {
    const trial = await lab.apply(WISH, {}, 300);
    await eventually(
      async () => (await lab.host.files.readLink(`${lab.rulesDir}/trial`)) === undefined,
      5000,
    );
    await expect(trial.confirm()).rejects.toMatchObject({ code: "RULES_NOT_CONFIRMED" });
    // It goes on for a moment after it has claimed the trial; no repair writes beside it.
    await eventually(
      async () => (await loadConfirmed(lab.host, lab.rulesDir)).state === "nothing confirmed",
      5000,
    );
  });

  test("a second trial has to wait for the first", async () => {
    const trial = await lab.apply();
    await expect(lab.apply()).rejects.toMatchObject({
      code: "BUSY",
    });
    await trial.rollBack();
  });

  test("whoever cleans up while a rollback is under way waits for its end, and nothing comes back behind his back", async () => {
    await lab.populate();
    const before = await lab.firewall();
    await install();
    const trial = await lab.apply({ ...WISH, inbound: { kind: "ports", ports: [] } });
    const load = `${lab.rulesDir}/confirmed/load.sh`;
    const gate = `${lab.rulesDir}/gate`;
    await lab.outside(["mkfifo", gate]);
    await lab.host.files.writeAtomic(load, `read _ <${gate}\n${await lab.host.files.readText(load)}`, {
      mode: 0o700,
    });
    const rollBack = trial.rollBack();
    await eventually(
      async () => (await lab.host.files.readLink(`${lab.rulesDir}/trial`)) === undefined,
      5000,
    );
    const removal = removeCapture(lab.host, lab.rulesDir);
    // As long as nothing comes through the gate, neither of them can have ended.
    const first = await Promise.race([
      removal.then(() => "removal"),
      lab.outside(["sh", "-c", `sleep 1; echo go >${gate}`]).then(() => "gate"),
    ]);
    expect(first).toBe("gate");
    await rollBack;
    expect(await removal).toMatchObject({ residue: [], foreignUnchanged: true });
    expect(await lab.firewall()).toEqual(before);
  });

  test("a trial over confirmed rules goes back to them", async () => {
    await lab.populate();
    await install();
    const before = await lab.firewall();
    const trial = await applyPlan(
      lab.host,
      await lab.rendered({ ...WISH, inbound: { kind: "ports", ports: [9001] } }),
      options(),
    );
    expect(await lab.dial(UID.app, MACHINE.ip, 9001, lab.world)).toBe("ENVOY-IN");
    await trial.rollBack();
    expect(await lab.dial(UID.app, MACHINE.ip, 9001, lab.world)).toBe("OTHER");
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("ENVOY-IN");
    expect(await lab.firewall()).toEqual(before);
  });

  test("connections that were open stay open, through install and removal", async () => {
    await lab.populate();
    const ssh = await lab.hold(lab.world, UID.app, MACHINE.ip, 22);
    const declared = await lab.hold(lab.world, UID.app, MACHINE.ip, 9000);
    const outbound = await lab.hold(lab.machine, UID.app, SERVICE.ip, 80);
    const outbound6 = await lab.hold(lab.machine, UID.app, SERVICE.ip6, 80);
    await install();
    for (const held of [ssh, declared, outbound, outbound6]) expect(await held.alive()).toBe("still there");
    await removeCapture(lab.host, lab.rulesDir);
    for (const held of [ssh, declared, outbound, outbound6]) expect(await held.alive()).toBe("still there");
  });
});

describe("removal", () => {
  test("what is left is what was there, with the rules of others in between", async () => {
    await lab.populate();
    await lab.insideShell(KUBE_PREPEND);
    await lab.insideShell(KUBE_NFT);
    await lab.insideShell(
      "iptables-nft -t mangle -A OUTPUT -m comment --comment 'a $(touch /tmp/vmmesh-netns-bad) b' -j MARK --set-mark 0x10",
    );
    const before = await lab.firewall();
    await install();
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      residue: [],
      foreignUnchanged: true,
    });
    expect(await lab.firewall()).toEqual(before);
    expect(await lab.host.files.stat(lab.rulesDir)).toBeUndefined();
    expect((await lab.inside(["ip", "-6", "addr", "show", "dev", "lo"])).stdout).not.toContain("::6/");
  });

  test("somebody else took parts out already", async () => {
    const before = await lab.firewall();
    await install();
    await lab.insideShell(
      "iptables-nft -t nat -F; iptables-nft -t nat -X ISTIO_REDIRECT; nft delete table ip vmmesh; ip6tables-nft -t raw -F",
    );
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({ residue: [] });
    expect(await lab.firewall()).toEqual(before);
  });

  test("the record is lost: what carries our comment goes, what does not stays", async () => {
    await install();
    await lab.host.files.writeAtomic(`${lab.rulesDir}/confirmed/plan.json`, "{", { mode: 0o600 });
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      removed: ["rules without a record"],
    });
    await install();
    await lab.host.files.remove(lab.rulesDir);
    expect((await auditCapture(lab.host, undefined)).map(({ id }) => id)).toEqual(["FW006"]);
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      removed: ["rules without a record"],
    });
    expect((await lab.firewall()).filter((line) => /ISTIO|VMMESH|vmmesh/.test(line))).toEqual([]);
    await lab.insideShell(
      "iptables-nft -t nat -N ISTIO_OUTPUT; iptables-nft -t nat -A ISTIO_OUTPUT -j RETURN",
    );
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({ removed: [] });
    expect(await lab.insideShell("iptables-nft -t nat -S ISTIO_OUTPUT")).toContain(
      "-A ISTIO_OUTPUT -j RETURN",
    );
  });

  test("removed twice is removed once", async () => {
    await install();
    await removeCapture(lab.host, lab.rulesDir);
    expect(await removeCapture(lab.host, lab.rulesDir)).toEqual({
      removed: [],
      residue: [],
      foreignUnchanged: true,
    });
  });
});

/** `ip netns exec` replaces itself, so the child is the peer. */
function signal(child: { readonly pid?: number | undefined }, name: NodeJS.Signals): void {
  if (child.pid !== undefined) process.kill(child.pid, name);
}
