import { describe, expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { VmmeshError } from "../core/errors.ts";
import { paths } from "../core/paths.ts";
import type { Host } from "../platform/host.ts";
import type { Services } from "../platform/services.ts";
import { execute, type Machine, unwind } from "./execute.ts";
import { type Journal, readJournal } from "./journal.ts";
import { describeStep, planJoin, type Step } from "./steps.ts";

const PATHS = paths();
const SIGNAL = new AbortController().signal;
const silent = (): void => undefined;

const steps: Step[] = planJoin({
  paths: PATHS,
  files: [
    { path: PATHS.clusterEnv, content: "POD_NAMESPACE='default'\n" },
    { path: PATHS.sidecarEnv, content: "ISTIO_INBOUND_PORTS='9080'\n" },
  ],
  token: "eyJ.secret.x",
  spiffe: "spiffe://cluster.local/ns/default/sa/details",
  envoyPath: "/usr/local/bin/envoy",
  interceptionMode: "REDIRECT",
  confirmWithinMs: 30_000,
  readyWithinMs: 60_000,
});

function fakeMachine(start: Record<string, string> = {}): {
  machine: Machine;
  files: MemoryFiles;
  units: Map<string, { active: boolean; enabled: boolean }>;
  log: string[];
} {
  const files = new MemoryFiles({ "/etc/hostname": "vm\n", "/var/lib/x": "", ...start });
  const units = new Map<string, { active: boolean; enabled: boolean }>();
  const log: string[] = [];
  const change = (unit: string, to: Partial<{ active: boolean; enabled: boolean }>): void => {
    units.set(unit, { ...(units.get(unit) ?? { active: false, enabled: false }), ...to });
    log.push(
      `${unit} ${Object.entries(to)
        .map(([key, value]) => `${key}=${value}`)
        .join(" ")}`,
    );
  };
  const services: Services = {
    kind: "systemd",
    state: async (unit) => units.get(unit) ?? { active: false, enabled: false },
    start: async (unit) => change(unit, { active: true }),
    stop: async (unit) => change(unit, { active: false }),
    restart: async (unit) => void log.push(`${unit} restarted`),
    enable: async (unit) => change(unit, { enabled: true }),
    reload: async () => void log.push("units read again"),
    disable: async (unit) => change(unit, { enabled: false }),
  };
  const owner = { uid: 1, gid: 1 };
  const machine: Machine = {
    host: { files } as unknown as Host,
    paths: PATHS,
    owners: { root: { uid: 0, gid: 0 }, agent: owner, envoy: owner },
    services,
    enroll: async () => {
      log.push("enroll");
      await files.makeDir(PATHS.identity, { mode: 0o700 });
      await files.writeAtomic(`${PATHS.identity}/key.pem`, "KEY", { mode: 0o600 });
    },
    awaitReady: async () => void log.push("await-ready"),
    installRules: async () => {
      log.push("install-rules");
      return { appliedInMs: 1 };
    },
    removeRules: async () => void log.push("remove-rules"),
  };
  return { machine, files, units, log };
}

const fresh: Journal = {
  version: 1,
  state: "joining",
  startedAt: "2026-11-23T00:00:00Z",
  how: "test",
  entries: [],
};

describe("a join as steps", () => {
  test("comes in the one order that is safe", () => {
    expect(steps.map(describeStep)).toMatchInlineSnapshot(`
      [
        "make the directory /etc/vmmesh (755, root)",
        "write /etc/vmmesh/cluster.env (644, root, 24 bytes)",
        "write /etc/vmmesh/sidecar.env (644, root, 27 bytes)",
        "link /etc/vmmesh/envoy → /usr/local/bin/envoy",
        "make an empty directory /var/lib/vmmesh for the agent alone",
        "write /var/lib/vmmesh/token (600, agent, 12 bytes)",
        "make a key, ask istiod's CA for a certificate as spiffe://cluster.local/ns/default/sa/details",
        "start vmmesh-agent.service",
        "start vmmesh-envoy-log.socket",
        "leave Envoy without any capability",
        "start vmmesh-envoy.service",
        "wait until Envoy answers on 15021 (at most 60 s)",
        "install the rules; they go out again by themselves unless connectivity is confirmed within 30 s",
        "start vmmesh-fence.service and enable it at boot",
        "start vmmesh.target and enable it at boot",
      ]
    `);
  });

  test("no secret is in what is printed", () => {
    expect(steps.map(describeStep).join("\n")).not.toContain("eyJ");
  });

  test("done and taken back, the machine is as it was", async () => {
    const { machine, files, units } = fakeMachine({ "/etc/vmmesh/cluster.env": "OLD='1'\n" });
    const before = files.snapshot();
    const journal = await execute(steps, fresh, machine, silent, SIGNAL);
    expect(journal.state).toBe("joined");
    expect(files.snapshot()).not.toEqual(before);
    await unwind(journal, machine, silent);
    expect(files.snapshot()).toEqual(before);
    expect([...units.values()].every(({ active, enabled }) => !active && !enabled)).toBe(true);
  });

  test.for(steps.map((step, index) => ({ name: describeStep(step), index })))(
    "failing at “$name” leaves nothing",
    async ({ index }) => {
      const { machine, files, units, log } = fakeMachine();
      const before = files.snapshot();
      const failing: Step[] = [...steps.slice(0, index), { do: "await-ready", withinMs: 1 }];
      const broken: Machine = {
        ...machine,
        awaitReady: () => Promise.reject(new VmmeshError("NOT_READY", "Envoy is not ready")),
      };
      await expect(execute(failing, fresh, broken, silent, SIGNAL)).rejects.toThrow("Envoy is not ready");
      expect(files.snapshot()).toEqual(before);
      expect([...units.values()].every(({ active }) => !active)).toBe(true);
      expect(log.includes("install-rules")).toBe(log.includes("remove-rules"));
    },
  );

  test.for(steps.map((_, index) => index))(
    "killed in step %i, a second join goes on and leave still finds the machine as it was",
    async (index) => {
      const { machine, files } = fakeMachine({ "/etc/vmmesh/sidecar.env": "MINE='1'\n" });
      const before = files.snapshot();
      // SIGKILL: nothing runs after this write of the journal, nobody unwinds.
      const reached = Promise.withResolvers<void>();
      let written = 0;
      const write = files.writeAtomic.bind(files);
      files.writeAtomic = async (path, data, options) => {
        await write(path, data, options);
        if (path !== PATHS.journal || written++ !== index) return;
        reached.resolve();
        await new Promise<never>(() => undefined);
      };
      void execute(steps, fresh, machine, silent, SIGNAL).then(() => reached.resolve());
      await reached.promise;
      files.writeAtomic = write;
      const found = await readJournal(files, PATHS);
      const journal = await execute(steps, found ?? fresh, machine, silent, SIGNAL);
      await unwind(journal, machine, silent);
      expect(files.snapshot()).toEqual(before);
    },
  );

  test("what a killed join left running starts anew with the files of the second", async () => {
    const { machine, units, log } = fakeMachine();
    units.set("vmmesh-envoy.service", { active: true, enabled: false });
    await execute(steps, fresh, machine, silent, SIGNAL);
    expect(log.filter((line) => line.endsWith("restarted"))).toEqual(["vmmesh-envoy.service restarted"]);
    expect(log).toContain("vmmesh-agent.service active=true");
  });

  test("what a broken agent left in its directory is gone, and the agent stopped, before root writes there", async () => {
    const { machine, files, units, log } = fakeMachine();
    units.set("vmmesh-agent.service", { active: true, enabled: false });
    await files.makeDir(PATHS.state, { mode: 0o700 });
    await files.swapLink(PATHS.identity, "/etc");
    await files.swapLink(PATHS.token, "/etc/shadow");
    let found: readonly unknown[] = [];
    const enroll = async (signal: AbortSignal): Promise<void> => {
      found = await Promise.all([PATHS.identity, PATHS.token].map((path) => files.readLink(path)));
      await machine.enroll(signal);
    };
    const journal = await execute(steps, fresh, { ...machine, enroll }, silent, SIGNAL);
    expect(found).toEqual([undefined, undefined]);
    expect(log[0]).toBe("vmmesh-agent.service active=false");
    expect(JSON.stringify(journal)).not.toContain("/etc/shadow");
  });

  test("a journal of a newer vmmesh is refused with advice", async () => {
    const files = new MemoryFiles({ [PATHS.journal]: '{"version":2}' });
    await expect(readJournal(files, PATHS)).rejects.toMatchObject({ code: "STATE_UNREADABLE" });
  });

  test("a damaged journal is refused, not ignored", async () => {
    await expect(readJournal(new MemoryFiles({ [PATHS.journal]: "{" }), PATHS)).rejects.toMatchObject({
      code: "STATE_UNREADABLE",
    });
  });
});
