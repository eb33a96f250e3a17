import { describe, expect, test } from "vitest";
import { MACHINE, WISH } from "../../test/fakes/capture.ts";
import { MemoryFiles } from "../../test/fakes/files.ts";
import type { Command, CommandResult } from "../platform/host.ts";
import { applyPlan, covers } from "./apply.ts";
import { loadConfirmed, tableDrift } from "./load.ts";
import { planCapture } from "./plan.ts";
import type { SeenTable } from "./read.ts";
import { removeCapture } from "./remove.ts";
import { renderPlan } from "./render.ts";
import { takeBackTrial } from "./rollback.ts";

const READS = / -S | list |'list'/;

/** A kernel without any rules that takes whatever it is given, except what `refuse` names. */
function machine(refuse: (argv: readonly string[]) => boolean = () => false) {
  const ran: string[] = [];
  const files = new MemoryFiles({
    "/proc/sys/kernel/random/boot_id": "b\n",
    "/proc/uptime": "100.00 1.00\n",
  });
  const host = {
    files,
    random: (bytes: number) => new Uint8Array(bytes),
    clock: { monotonicMs: () => 0, now: () => new Date(0), sleep: async () => undefined },
    async run({ argv }: Command): Promise<CommandResult> {
      ran.push(argv.join(" "));
      if (refuse(argv)) return { code: 4, stdout: "", stderr: "no" };
      return { code: READS.test(argv.join(" ")) ? 1 : 0, stdout: "", stderr: "" };
    },
  };
  return { host, ran, files };
}

const OPTIONS = { confirmWithinMs: 30_000, rulesDir: "/rules", unit: "systemd" } as const;
const writes = (ran: readonly string[]): string[] => ran.filter((line) => !READS.test(line));
/** Of the kernel's rules; the timer of a trial that never began finds nothing to do. */
const changes = (ran: readonly string[]): string[] =>
  writes(ran).filter((line) => !/--(test|check)\b|vmmesh-rollback|^flock/.test(line));

describe("applyPlan", () => {
  test("tests both families, arms the timer, ends the former rules' repair, and only then writes", async () => {
    const { host, ran } = machine();
    await applyPlan(host, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
    expect(writes(ran)).toEqual([
      "flock --wait 30 /rules true",
      "nft --check -f -",
      "iptables-nft-restore --test --noflush",
      "ip6tables-nft-restore --test --noflush",
      "systemctl stop vmmesh-rollback.timer",
      "systemd-run --unit=vmmesh-rollback --on-active=30s --timer-property=AccuracySec=100ms --collect /bin/sh /rules/gen-00000000/undo.sh trial",
      "systemctl stop vmmesh-order.service vmmesh-rules.service",
      "nft -f -",
      "iptables-nft-restore --noflush",
      "ip6tables-nft-restore --noflush",
      "ip -6 addr add ::6/128 dev lo",
    ]);
  });

  test.for([
    {
      name: "a text that the kernel would not take: nothing is written",
      refuse: "ip6tables-nft-restore --test",
      code: "RULES_REJECTED",
      undone: false,
    },
    {
      name: "a repair of the former rules that does not end: nothing is applied",
      refuse: "systemctl stop vmmesh-order.service",
      code: "UNIT_FAILED",
      undone: true,
    },
    {
      name: "no timer: nothing is applied",
      refuse: "systemd-run",
      code: "RULES_NOT_CONFIRMED",
      undone: false,
    },
    {
      name: "the second family fails: the first is taken out again",
      refuse: "ip6tables-nft-restore --noflush",
      code: "RULES_REJECTED",
      undone: true,
    },
    {
      name: "the guard fails: both families are taken out again",
      refuse: "nft -f",
      code: "RULES_REJECTED",
      undone: true,
    },
  ])("$name", async ({ refuse, code, undone }) => {
    const { host, ran } = machine((argv) => argv.join(" ").startsWith(refuse));
    const rendered = renderPlan(planCapture(WISH, MACHINE));
    await expect(applyPlan(host, rendered, OPTIONS)).rejects.toMatchObject({ code });
    expect(ran.some((line) => line.startsWith("sh /rules/gen-00000000/undo.sh trial"))).toBe(undone);
    if (!undone) expect(changes(ran)).toEqual([]);
  });
});

test("the timer does not run before the tests have ended: one that waits for a lock could outlast it", async () => {
  const { host, ran } = machine();
  const gate = Promise.withResolvers<void>();
  const slow = {
    ...host,
    run: async (command: Command): Promise<CommandResult> => {
      if (command.argv.includes("--test")) await gate.promise;
      return host.run(command);
    },
  };
  const applied = applyPlan(slow, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(ran.filter((line) => line.startsWith("systemd-run"))).toEqual([]);
  gate.resolve();
  await applied;
  expect(ran.filter((line) => line.startsWith("systemd-run"))).toHaveLength(1);
});

test.each([
  { when: "is ours to take back", code: 0, after: true },
  { when: "was there before us", code: 2, after: false },
])("the address for IPv6 passthrough $when: marked before it is added", async ({ code, after }) => {
  const { host, files } = machine();
  const mark = "/rules/gen-00000000/made.address";
  let markedAtAdd: boolean | undefined;
  const seeing = {
    ...host,
    run: async (command: Command): Promise<CommandResult> => {
      if (!command.argv.includes("addr")) return host.run(command);
      markedAtAdd = (await files.stat(mark)) !== undefined;
      return { code, stdout: "", stderr: "" };
    },
  };
  await applyPlan(seeing, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
  expect(markedAtAdd).toBe(true);
  expect((await files.stat(mark)) !== undefined).toBe(after);
});

describe("on a machine of which nft knows no table", () => {
  const fresh = (refuse?: string) => {
    const { host, ran, files } = machine();
    const inputs: string[] = [];
    return {
      host: {
        ...host,
        run: async (command: Command): Promise<CommandResult> => {
          const line = command.argv.join(" ");
          if (line === "nft -f -") inputs.push(command.input ?? "");
          const result = await host.run(command);
          if (line === refuse && inputs.length < 2) return { ...result, code: 1 };
          return line === "nft list chains" || line.endsWith("-save") ? { ...result, code: 0 } : result;
        },
      },
      ran,
      files,
      inputs,
    };
  };

  test("the texts are tried in an empty network namespace, and no chain is asked for by name", async () => {
    const { host, ran, files } = fresh();
    await applyPlan(host, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
    expect(ran.filter((line) => / -S /.test(line))).toEqual([]);
    expect(writes(ran).slice(1, 4)).toEqual([
      "nft --check -f -",
      "unshare --net iptables-nft-restore --noflush",
      "unshare --net ip6tables-nft-restore --noflush",
    ]);
    expect(await files.list("/rules/gen-00000000")).toContain("made.ip.nat");
  });

  test("where no namespace may be made, the kernel itself is asked", async () => {
    const { host, ran } = fresh("unshare --net iptables-nft-restore --noflush");
    await applyPlan(host, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
    expect(writes(ran)).toContain("iptables-nft-restore --test --noflush");
    expect(writes(ran)).not.toContain("ip6tables-nft-restore --test --noflush");
  });

  test("a table of our name that came meanwhile is replaced, not added to", async () => {
    const { host, inputs } = fresh("nft -f -");
    await applyPlan(host, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
    expect(inputs.map((text) => text.split("\n").slice(0, 2))).toEqual([
      ["create table ip vmmesh", "table ip vmmesh {"],
      ["add table ip vmmesh", "delete table ip vmmesh"],
    ]);
  });
});

test("what the kernel lacks ends an apply before anything is changed, though the test only warns of it", async () => {
  const { host, ran, files } = machine();
  const warns = {
    ...host,
    run: async (command: Command): Promise<CommandResult> => {
      const result = await host.run(command);
      const warning = "Warning: Extension owner revision 0 not supported, missing kernel module?\n";
      return command.argv.join(" ") === "ip6tables-nft-restore --test --noflush"
        ? { ...result, stderr: warning }
        : result;
    },
  };
  const rendered = renderPlan(planCapture(WISH, MACHINE));
  await expect(applyPlan(warns, rendered, OPTIONS)).rejects.toMatchObject({
    code: "RULES_REJECTED",
    message: "this kernel has no `owner`, which the rules need",
    next: expect.stringContaining("modprobe xt_owner"),
  });
  expect(changes(ran)).toEqual([]);
  expect(ran.at(-1)).toBe("systemctl stop vmmesh-rollback.timer");
  expect(await files.readLink("/rules/trial")).toBeUndefined();
});

describe("a kernel without the comment match", () => {
  const warn = (extension: string): string =>
    `Warning: Extension ${extension} revision 0 not supported, missing kernel module?\n`;

  /** As iptables-nft: a warning for each extension that a text names. */
  function lacking(...extensions: readonly string[]) {
    const { host, ran, files } = machine();
    const inputs: string[] = [];
    const warns = {
      ...host,
      run: async (command: Command): Promise<CommandResult> => {
        const input = command.input ?? "";
        const missing = extensions.filter((extension) => input.includes(`-m ${extension} `));
        if (command.argv.join(" ").includes("-restore --noflush")) inputs.push(input);
        return { ...(await host.run(command)), stderr: missing.map(warn).join("") };
      },
    };
    return { host: warns, ran, files, inputs };
  }

  test("gets the rules without their reasons: applied, recorded, said once", async () => {
    const { host, files, inputs } = lacking("comment");
    const plan = planCapture(WISH, MACHINE);
    const trial = await applyPlan(host, renderPlan(plan), OPTIONS);
    expect(trial.plan).toEqual({
      ...plan,
      comments: false,
      notes: [...plan.notes, expect.stringContaining("xt_comment")],
    });
    expect(inputs).toHaveLength(2);
    const kept = ["mend.sh", "undo.sh", "plan.json"].map((name) =>
      files.readText(`/rules/${trial.generation}/${name}`),
    );
    const [mend = "", undo = "", state = ""] = await Promise.all(kept);
    for (const text of [mend, undo]) expect(text).toContain("ISTIO_OUTPUT");
    for (const text of [...inputs, mend, undo]) expect(text).not.toContain("--comment");
    expect(JSON.parse(state)).toMatchObject({ plan: { comments: false } });
  });

  test("and without another one that is needed: that one is named, and nothing is written", async () => {
    const { host, ran, files } = lacking("comment", "owner");
    await expect(applyPlan(host, renderPlan(planCapture(WISH, MACHINE)), OPTIONS)).rejects.toMatchObject({
      code: "RULES_REJECTED",
      message: "this kernel has no `owner`, which the rules need",
    });
    expect(changes(ran)).toEqual([]);
    expect(await files.readLink("/rules/trial")).toBeUndefined();
  });
});

test("with nothing confirmed there is nothing to load, and nothing is run", async () => {
  const { host, ran } = machine();
  expect(await loadConfirmed(host, "/rules")).toEqual({
    state: "nothing confirmed",
    repaired: [],
    droppedTrial: false,
  });
  expect(ran).toEqual([]);
});

test("a state written by a newer vmmesh is not guessed at", async () => {
  const { host, files } = machine();
  await files.makeDir("/rules/gen-1", { mode: 0o700 });
  await files.swapLink("/rules/confirmed", "gen-1");
  await files.writeAtomic("/rules/gen-1/plan.json", '{"version":2}', { mode: 0o600 });
  await expect(loadConfirmed(host, "/rules")).rejects.toMatchObject({ code: "STATE_UNREADABLE" });
});

describe("tableDrift", () => {
  const seen: SeenTable = {
    family: 4,
    table: "nat",
    own: ["a", "b"],
    jumps: [{ table: "nat", line: "j" }],
    ahead: [],
    benign: [],
    untracking: [],
    missing: [],
  };
  const wanted = [{ family: 4, table: "nat", own: ["a", "b"] }] as const;
  test.for([
    { name: "as it was applied", change: {}, want: undefined },
    {
      name: "a harmless rule ahead is left where it is",
      change: { benign: ["-A OUTPUT -j cali-OUTPUT"] },
      want: undefined,
    },
    {
      name: "the jump is gone",
      change: { missing: ["OUTPUT"] },
      want: "nat (IPv4): the jump in OUTPUT was missing",
    },
    {
      name: "somebody is ahead, and is named",
      change: {
        ahead: [{ hook: "OUTPUT", line: "-A OUTPUT -j KUBE-SERVICES", by: "kube-proxy", position: 1 }],
      },
      want: "nat (IPv4): `-A OUTPUT -j KUBE-SERVICES` stood ahead of us, put there by kube-proxy",
    },
    {
      name: "the jump is there twice",
      change: { jumps: [...seen.jumps, ...seen.jumps] },
      want: "nat (IPv4): a jump was there twice",
    },
    { name: "a rule is gone", change: { own: ["a"] }, want: "nat (IPv4): our own chains were changed" },
    {
      name: "two rules changed places",
      change: { own: ["b", "a"] },
      want: "nat (IPv4): our own chains were changed",
    },
  ] as const)("$name", ({ change, want }) => {
    expect(tableDrift({ ...seen, ...change }, wanted)).toBe(want);
  });
});

test("a plan covers another if it writes all of its chains", () => {
  const both = planCapture(WISH, MACHINE);
  const one = planCapture({ ...WISH, ipv6: false }, MACHINE);
  expect([covers(both, both), covers(both, one), covers(one, both)]).toEqual([true, true, false]);
});

test("a chain that only the guard holds does not cover the one of its name in iptables", () => {
  const declared = planCapture({ ...WISH, inbound: { kind: "ports", ports: [9080] } }, MACHINE);
  const all = planCapture({ ...WISH, inbound: { kind: "all", excludePorts: [] } }, MACHINE);
  expect(renderPlan(all).guard).toContain("chain nat_ISTIO_INBOUND");
  expect(covers(all, declared)).toBe(false);
});

describe("a trial whose owner was killed", () => {
  const rendered = () => renderPlan(planCapture(WISH, MACHINE));

  test("is taken back by the next join, with its timer, and the next trial begins", async () => {
    const { host, ran, files } = machine();
    await applyPlan(host, rendered(), OPTIONS);
    await expect(applyPlan(host, rendered(), OPTIONS)).rejects.toMatchObject({ code: "BUSY" });
    ran.length = 0;
    await takeBackTrial(host, OPTIONS.rulesDir, "systemd");
    expect(ran).toEqual(["sh /rules/gen-00000000/undo.sh trial 10", "systemctl stop vmmesh-rollback.timer"]);
    // The script is not run here; it renames the link.
    await files.remove("/rules/trial");
    await expect(applyPlan(host, rendered(), OPTIONS)).resolves.toHaveProperty("generation");
  });

  test("of a former boot is only forgotten: nothing of it is in force", async () => {
    const { host, ran, files } = machine();
    await applyPlan(host, rendered(), OPTIONS);
    await files.writeAtomic("/proc/sys/kernel/random/boot_id", "another\n", { mode: 0o444 });
    ran.length = 0;
    await takeBackTrial(host, OPTIONS.rulesDir, "systemd");
    expect(ran).toEqual(["systemctl stop vmmesh-rollback.timer"]);
    expect(await files.readLink("/rules/trial")).toBeUndefined();
  });
});

describe("taking the rules out", () => {
  const confirmed = async () => {
    const { host, ran, files } = machine();
    await applyPlan(host, renderPlan(planCapture(WISH, MACHINE)), OPTIONS);
    await files.swapLink("/rules/confirmed", "gen-00000000");
    await files.remove("/rules/trial");
    ran.length = 0;
    return { host, ran, files };
  };

  test("no repair finds anything to put back from the first moment on", async () => {
    const { host, ran, files } = await confirmed();
    await removeCapture(host, OPTIONS.rulesDir, async () => {
      expect(changes(ran)).toEqual([]);
      expect(await files.readLink("/rules/confirmed")).toBeUndefined();
      expect(await loadConfirmed(host, OPTIONS.rulesDir)).toMatchObject({ state: "nothing confirmed" });
    });
    expect(ran).toContain("sh /rules/gen-00000000/undo.sh now 10");
    expect(await files.list("/rules")).toBeUndefined();
  });

  test("a rollback that does not end: nobody writes beside it, and it is said", async () => {
    const { files } = await confirmed();
    const { host, ran } = machine((argv) => argv[0] === "flock");
    const beside = { ...host, files };
    const rendered = renderPlan(planCapture(WISH, MACHINE));
    await expect(applyPlan(beside, rendered, OPTIONS)).rejects.toMatchObject({ code: "BUSY" });
    await expect(removeCapture(beside, OPTIONS.rulesDir)).rejects.toMatchObject({ code: "BUSY" });
    expect(await loadConfirmed(beside, OPTIONS.rulesDir)).toMatchObject({ state: "trial running" });
    expect(changes(ran)).toEqual([]);
    expect(await files.readLink("/rules/confirmed")).toBe("gen-00000000");
  });

  test("killed before the rules are out, the next one still knows them", async () => {
    const { host, ran } = await confirmed();
    const killed = removeCapture(host, OPTIONS.rulesDir, () => Promise.reject(new Error("killed")));
    await expect(killed).rejects.toThrow("killed");
    expect((await removeCapture(host, OPTIONS.rulesDir)).removed).toEqual(["/rules/gen-00000000"]);
    expect(ran).toContain("sh /rules/gen-00000000/undo.sh now 10");
  });
});
