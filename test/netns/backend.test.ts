import { spawn } from "node:child_process";
import { readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { VmmeshError } from "../../agent/core/errors.ts";
import { applyPlan, type Trial } from "../../agent/iptables/apply.ts";
import { auditCapture } from "../../agent/iptables/audit/audit.ts";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import type { BackendWish, CaptureWish } from "../../agent/iptables/plan/wish.ts";
import { planCapture } from "../../agent/iptables/plan.ts";
import { readMachine } from "../../agent/iptables/read.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { renderPlan } from "../../agent/iptables/render.ts";
import type { Host } from "../../agent/platform/host.ts";
import { eventually, Lab, LEGACY, MACHINE, REMOTE, SERVICE, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const options = () => ({ confirmWithinMs: 30_000, rulesDir: lab.rulesDir, unit: "detached" as const });

/** Registered legacy tables stay until the next boot; here they are made first, so that equality can be asked for. */
async function registerLegacy(): Promise<void> {
  for (const table of ["raw", "mangle", "nat"])
    await lab.insideShell(`iptables-legacy -t ${table} -S; ip6tables-legacy -t ${table} -S`);
}

const lockFile = () => join(dirname(lab.rulesDir), "xtables.lock");

/** Somebody who has the lock and does not let go of it. */
async function holdLock() {
  const child = spawn("flock", [lockFile(), "sh", "-c", "echo held; read _"]);
  await new Promise((resolve) => child.stdout.once("data", resolve));
  return { pid: child.pid, release: () => child.stdin.end("\n") };
}

/** Does a program wait for the lock? @see proc_locks(5): `->` */
function isAwaited(): boolean {
  const waiting = new RegExp(`-> FLOCK .*:${statSync(lockFile()).ino} `);
  return waiting.test(readFileSync("/proc/locks", "utf8"));
}

describe("another program holds the lock of iptables-legacy", () => {
  test("a removal says who, leaves everything in force, and is done when it is asked for again", async () => {
    await lab.populate();
    await registerLegacy();
    const before = await lab.firewall("legacy");
    await lab.install(WISH, LEGACY);
    const inForce = await lab.firewall("legacy");
    const held = await holdLock();
    await expect(removeCapture(lab.host, lab.rulesDir)).rejects.toMatchObject({
      code: "RULES_REJECTED",
      message: expect.stringContaining(`flock (pid ${held.pid}) holds`),
    });
    expect(await lab.firewall("legacy")).toEqual(inForce);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    held.release();
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      residue: [],
      foreignUnchanged: true,
    });
    expect(await lab.firewall("legacy")).toEqual(before);
  });

  test("an apply says who, and nothing of it is in force", async () => {
    await registerLegacy();
    const before = await lab.firewall("legacy");
    const held = await holdLock();
    await expect(lab.apply(WISH, LEGACY)).rejects.toMatchObject({
      code: "RULES_REJECTED",
      message: expect.stringContaining(`flock (pid ${held.pid}) holds`),
    });
    held.release();
    expect(await lab.firewall("legacy")).toEqual(before);
  });

  test("nobody confirms: the timer's rollback waits, and takes all out when the lock is free", async () => {
    await lab.populate();
    await lab.apply(WISH, LEGACY, 1000);
    const held = await holdLock();
    const log = `${lab.rulesDir}/${(await lab.host.files.readLink(`${lab.rulesDir}/trial`)) ?? ""}/undo.log`;
    await eventually(async () => isAwaited(), 5000);
    expect(await lab.host.files.readLink(`${lab.rulesDir}/trial`)).toBeDefined();
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    held.release();
    await eventually(async () => (await lab.dial(UID.app, SERVICE.ip, 80)) === "DIRECT", 5000);
    await eventually(
      async () => !(await lab.firewall("legacy")).some((line) => /ISTIO|VMMESH/.test(line)),
      5000,
    );
    expect(await lab.host.files.readText(log)).toBe("");
  });
});

/** As `vmmesh iptables apply` with VMMESH_BACKEND in sidecar.env. */
async function apply(wished: BackendWish, wish: CaptureWish = WISH, host: Host = lab.host): Promise<Trial> {
  const plan = planCapture(wish, await readMachine(host, wished));
  return applyPlan(host, renderPlan(plan), options());
}

async function install(...wanted: Parameters<typeof apply>): Promise<void> {
  await (await apply(...wanted)).confirm();
}

/** Rules of others in every place where rules can be. */
const OTHERS = `iptables-nft -t nat -A OUTPUT -p tcp --dport 9999 -j ACCEPT
ip6tables-nft -t mangle -A OUTPUT -j MARK --set-mark 0x10
iptables-legacy -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
ip6tables-legacy -t nat -A OUTPUT -p tcp --dport 9999 -j ACCEPT
nft -f - <<'END'
table inet others {
  chain c { type filter hook output priority 0; policy accept; tcp dport 9999 accept
  }
}
END`;

const BACKENDS = ["nft", "legacy", "nftables"] as const;

/** Everything in force in every place. */
const everywhere = async (): Promise<string[]> => [
  ...(await lab.firewall("nft")),
  ...(await lab.firewall("legacy")),
];

/** Which of the places has rules of ours in nat. */
async function places(): Promise<string[]> {
  const listings = {
    nft: "iptables-nft-save -t nat; ip6tables-nft-save -t nat",
    legacy: "iptables-legacy-save; ip6tables-legacy-save",
    nftables: "nft list tables",
  };
  const texts = await Promise.all(
    Object.entries(listings).map(async ([name, script]) => ({ name, text: await lab.insideShell(script) })),
  );
  return texts.filter(({ text }) => /ISTIO_OUTPUT|table ip vmmesh/.test(text)).map(({ name }) => name);
}

describe.each(BACKENDS)("the backend %s", (backend) => {
  test("captures, keeps what is closed closed, is repaired, and leaves nothing behind", async () => {
    const { envoy } = await lab.populate();
    await registerLegacy();
    await lab.insideShell(OTHERS);
    const before = await everywhere();
    await install(backend, { ...WISH, dns: { servers: [REMOTE.ip] } });
    expect(await places()).toEqual(backend === "nftables" ? ["nftables"] : [backend, "nftables"]);
    const rows = [
      ["an application to a service", UID.app, SERVICE.ip, 80, "ENVOY-OUT"],
      ["an application to a service, IPv6", UID.app, SERVICE.ip6, 80, "ENVOY-OUT"],
      ["Envoy to a service", UID.envoy, SERVICE.ip, 80, "DIRECT"],
      ["the agent to a service", UID.agent, SERVICE.ip6, 80, "DIRECT"],
      ["Envoy to its own machine", UID.envoy, MACHINE.ip, 9000, "ENVOY-IN"],
    ] as const;
    for (const [name, uid, address, port, want] of rows)
      expect.soft(await lab.dial(uid, address, port), name).toBe(want);
    for (const address of [MACHINE.ip, MACHINE.ip6]) {
      expect.soft(await lab.dial(UID.app, address, 9000, lab.world), "a declared port").toBe("ENVOY-IN");
      expect.soft(await lab.dial(UID.app, address, 22, lab.world), "sshd").toBe("SSHD");
      expect.soft(await lab.dial(UID.app, address, 15_001, lab.world), "Envoy's listener").toBe("refused");
    }
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip6, 80)) === "ENVOY-OUT", 5000);
    const inForce = await everywhere();
    await lab.insideShell("nft delete table ip vmmesh; nft delete table inet vmmesh-fence");
    expect((await loadConfirmed(lab.host, lab.rulesDir)).repaired).toHaveLength(2);
    expect(await everywhere()).toEqual(inForce);
    // The first answer to an event, without Node.
    await lab.insideShell(`nft delete table ip6 vmmesh; sh ${lab.rulesDir}/confirmed/mend.sh`);
    expect(await everywhere()).toEqual(inForce);
    if (envoy.pid !== undefined) process.kill(envoy.pid, "SIGKILL");
    await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "DIRECT", 8000);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("refused");
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({
      residue: [],
      foreignUnchanged: true,
    });
    expect(await everywhere()).toEqual(before);
  });
});

describe("from one backend to another", () => {
  test.each([
    { how: "nft, legacy, nftables, nft", hidden: /^$/, steps: ["legacy", "nftables", "nft"] },
    // Nothing holds the traffic meanwhile: the new rules have to be in force before the old ones go.
    { how: "nft, legacy, nft without guard and fence", hidden: /^nft$/, steps: ["legacy", "nft"] },
  ] as const)(
    "$how under a loop of connections: none goes past Envoy, and rules are in one place",
    async ({ hidden, steps }) => {
      const host = without(hidden);
      const guard = hidden.test("nft") ? [] : ["nftables"];
      await lab.populate();
      await registerLegacy();
      await lab.insideShell(OTHERS);
      const before = await everywhere();
      await install("nft", WISH, host);
      const inForce = await everywhere();
      const loops = await Promise.all([SERVICE.ip, SERVICE.ip6].map((address) => loop(address)));
      for (const backend of steps) {
        await install(backend, WISH, host);
        expect(await places()).toEqual(backend === "nftables" ? guard : [backend, ...guard]);
      }
      const met = await Promise.all(loops.map((it) => it.end()));
      console.log(`met: ${JSON.stringify(met)}`);
      for (const counts of met) {
        expect(Object.keys(counts)).toEqual(["ENVOY-OUT"]);
        expect(counts["ENVOY-OUT"]).toBeGreaterThan(100);
      }
      expect(await everywhere()).toEqual(inForce);
      await removeCapture(host, lab.rulesDir);
      // Without nft a table of iptables-nft that became empty cannot be taken away.
      const rules = (lines: readonly string[]) =>
        guard.length > 0 ? lines : lines.filter((line) => line.startsWith("-A "));
      expect(rules(await everywhere())).toEqual(rules(before));
    },
  );

  test.each([
    { from: "nft", to: "legacy" },
    { from: "legacy", to: "nftables" },
    { from: "nftables", to: "nft" },
  ] as const)("a trial of $to over $from that is taken back", async ({ from, to }) => {
    await lab.populate();
    await registerLegacy();
    await lab.insideShell(OTHERS);
    await install(from);
    const before = await everywhere();
    const trial = await apply(to);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    await trial.rollBack();
    expect(await everywhere()).toEqual(before);
    expect(await loadConfirmed(lab.host, lab.rulesDir)).toMatchObject({ state: "in place" });
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("ENVOY-OUT");
  });

  test("rules of ours in another backend: FW013 names them, and an apply takes them out", async () => {
    await lab.populate();
    await install("legacy");
    const record = (await lab.host.files.readLink(`${lab.rulesDir}/confirmed`)) ?? "";
    await lab.host.files.remove(`${lab.rulesDir}/confirmed`);
    await lab.host.files.remove(`${lab.rulesDir}/${record}`);
    await install("nft");
    expect(await places()).toEqual(["nft", "nftables"]);
    expect((await auditCapture(lab.host, lab.rulesDir)).map(({ id }) => id)).not.toContain("FW013");
    await lab.insideShell("iptables-nft-save -t nat | iptables-legacy-restore --noflush");
    const found = (await auditCapture(lab.host, lab.rulesDir)).find(({ id }) => id === "FW013");
    expect(found).toMatchObject({ severity: "high", command: "vmmesh iptables apply" });
    expect(found?.evidence.join("\n")).toContain("iptables-legacy, nat (IPv4): -A ISTIO_REDIRECT");
    await install("nft");
    expect(await places()).toEqual(["nft", "nftables"]);
  });

  test("somebody else's istio-iptables in the other backend is left alone", async () => {
    await lab.insideShell(
      "iptables-legacy -t nat -N ISTIO_OUTPUT; iptables-legacy -t nat -A ISTIO_OUTPUT -j RETURN",
    );
    const theirs = await lab.firewall("legacy");
    await install("nft");
    await removeCapture(lab.host, lab.rulesDir);
    expect(await lab.firewall("legacy")).toEqual(theirs);
  });
});

/** Without some programs: each of them is as if it were not installed. */
function without(programs: RegExp): Host {
  return {
    ...lab.host,
    run: async (command, signal) => {
      if (programs.test(command.argv[0]))
        throw new VmmeshError("COMMAND_MISSING", `there is no ${command.argv[0]}`);
      // A line of its own for each program (inTurn.ts).
      const absent = (word: string): string =>
        word.replace(/^'([^']+)'/gm, (line, program: string) => (programs.test(program) ? "'absent'" : line));
      const [program, ...words] = command.argv;
      return lab.host.run({ ...command, argv: [program, ...words.map(absent)] }, signal);
    },
  };
}

/** The machine's iptables without the library of one extension. */
async function withoutExtension(extension: string): Promise<Host> {
  const libraries = join(dirname(lab.rulesDir), "xtables");
  await lab.outside([
    "sh",
    "-ec",
    `cp -r "$(dirname "$(find /usr/lib* -name libxt_owner.so | head -1)")" ${libraries}; rm ${libraries}/libxt_${extension}.so`,
  ]);
  return {
    ...lab.host,
    run: (command, signal) =>
      lab.host.run(
        {
          ...command,
          argv: command.argv.slice(0, 3).some((word) => /^ip6?tables|^sh$/.test(word))
            ? ["env", `XTABLES_LIBDIR=${libraries}`, ...command.argv]
            : command.argv,
        },
        signal,
      ),
  };
}

describe("what a machine has not", () => {
  test("ip6tables: the guard captures IPv6 alone", async () => {
    await lab.populate();
    const host = without(/^ip6tables/);
    await install("auto", WISH, host);
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.app, MACHINE.ip6, 9000, lab.world)).toBe("ENVOY-IN");
    expect(await lab.insideShell("ip6tables-nft-save")).not.toContain("ISTIO");
    expect(await removeCapture(host, lab.rulesDir)).toMatchObject({ residue: [] });
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("DIRECT");
  });

  test("any iptables: the guard captures alone, without being asked", async () => {
    await lab.populate();
    const host = without(/^ip6?tables/);
    await install("auto", WISH, host);
    expect(await places()).toEqual(["nftables"]);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await removeCapture(host, lab.rulesDir)).toMatchObject({ residue: [] });
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("DIRECT");
  });

  test.each(
    (["nft", "legacy"] as const).flatMap((backend) =>
      ["owner", "recent", "TPROXY"].map((extension) => ({ backend, extension })),
    ),
  )(
    "iptables-$backend without $extension: one sentence, and nothing is changed",
    async ({ backend, extension }) => {
      await registerLegacy();
      const before = await everywhere();
      const host = await withoutExtension(extension);
      // Where nft is, it hands over, and iptables needs no TPROXY.
      const plan = planCapture(
        { ...WISH, interception: { mode: "TPROXY", routeTable: 133 } },
        { ...(await readMachine(lab.host, backend)), nft: false },
      );
      const applied = applyPlan(host, renderPlan(plan), options());
      await expect(applied).rejects.toMatchObject({
        code: "RULES_REJECTED",
        message: `the iptables of this machine has no extension \`${extension}\`, which the rules need`,
        next: expect.stringContaining("--backend nftables"),
      });
      expect(await everywhere()).toEqual(before);
      expect(await lab.host.files.readLink(`${lab.rulesDir}/trial`)).toBeUndefined();
    },
  );

  test.each(["nft", "legacy"] as const)(
    "iptables-%s without comment: the rules go in without their reasons, and are known, repaired and removed all the same",
    async (backend) => {
      await registerLegacy();
      await lab.populate();
      const before = await lab.firewall(backend);
      const host = await withoutExtension("comment");
      const plan = planCapture(WISH, { ...(await readMachine(host, backend)), nft: false });
      for (const time of ["first", "second"]) {
        const trial = await applyPlan(host, renderPlan(plan), options());
        expect(trial.plan.notes.slice(plan.notes.length), time).toEqual([
          expect.stringContaining("no comment match"),
        ]);
        await trial.confirm();
      }
      expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
      const applied = await lab.firewall(backend);
      expect(applied.filter((line) => line.includes("vmmesh: "))).toEqual([]);
      const found = await auditCapture(host, lab.rulesDir, plan);
      const drift = ["FW001", "FW002", "FW006", "FW007", "FW047"];
      expect(found.filter(({ id }) => drift.includes(id))).toEqual([]);

      if (backend === "nft") {
        await lab.insideShell("iptables-nft -t nat -F OUTPUT");
        // As vmmesh-order.service does it, without Node; iptables-legacy causes no event that would start it.
        await host.run({ argv: ["sh", `${lab.rulesDir}/confirmed/mend.sh`] });
        expect(await lab.firewall(backend)).toEqual(applied);
      }
      await lab.insideShell(`iptables-${backend} -t nat -F OUTPUT`);
      expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("DIRECT");
      expect(await loadConfirmed(host, lab.rulesDir)).toMatchObject({ state: "repaired" });
      expect(await lab.firewall(backend)).toEqual(applied);
      expect(await removeCapture(host, lab.rulesDir)).toMatchObject({ residue: [], foreignUnchanged: true });
      expect(await lab.firewall(backend)).toEqual(before);
    },
  );

  test("the backend that was asked for: refused with the next step, and nothing is changed", async () => {
    const before = await everywhere();
    for (const [wished, missing] of [
      ["nft", /^ip6?tables/],
      ["legacy", /legacy/],
      ["nftables", /^nft$/],
    ] as const) {
      await expect(apply(wished, WISH, without(missing))).rejects.toMatchObject({
        code: "RULES_REJECTED",
        next: expect.stringContaining("--backend auto"),
      });
    }
    expect(await everywhere()).toEqual(before);
  });
});

/** New connections, one after the other, until `end`: how often each listener was met. */
async function loop(address: string) {
  const child = spawn("ip", [
    ...["netns", "exec", lab.machine, "/usr/bin/python3", new URL("peer.py", import.meta.url).pathname],
    ...["loop", String(UID.app), address, "80"],
  ]);
  let out = "";
  child.stdout.on("data", (data) => {
    out += String(data);
  });
  await new Promise((resolve) => child.stdout.once("data", resolve));
  return {
    async end(): Promise<Record<string, number>> {
      const ended = new Promise((resolve) => child.stdout.once("end", resolve));
      child.stdin.end();
      await ended;
      return JSON.parse(out.split("\n")[1] ?? "{}") as Record<string, number>;
    },
  };
}
