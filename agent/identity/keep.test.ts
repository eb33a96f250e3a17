import "reflect-metadata";
import { createPrivateKey } from "node:crypto";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  type ControlPlane,
  type ControlPlaneOptions,
  startControlPlane,
} from "../../test/controlplane/server.ts";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { Latest } from "../core/signals.ts";
import { DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS } from "../core/time.ts";
import { Conditions } from "../health/conditions.ts";
import { type IdentityStatus, type KeepDeps, keepIdentity } from "./keep.ts";
import { pause } from "./pause.ts";
import { untilRenewal } from "./renew.ts";
import { type Svid, splitPem } from "./svid.ts";

const SPIFFE = "spiffe://cluster.local/ns/default/sa/details";
const FOLDER = "/var/lib/vmmesh/identity";
const PLANE: ControlPlaneOptions = { address: "127.0.0.1", port: 0, services: [], groups: [] };

/** A machine whose wall clock a test sets; each sleep is over at once, and `onSleep` says what happened meanwhile. */
class Machine {
  readonly files = new MemoryFiles();
  readonly svids = new Latest<Svid>();
  readonly conditions = new Conditions(() => new Date());
  readonly renewed: string[] = [];
  status: IdentityStatus | undefined;
  offsetMs = 0;
  monotonicOffsetMs = 0;
  slept: number[] = [];
  attempts = 0;
  reachable = true;
  readonly #plane: ControlPlane;
  readonly #stop = new AbortController();

  constructor(plane: ControlPlane, token: string | undefined) {
    this.#plane = plane;
    if (token !== undefined) this.putToken(token);
  }

  putToken(token: string): void {
    const { nodes } = new MemoryFiles({ "/token": token });
    for (const [path, node] of nodes) this.files.nodes.set(path, node);
  }

  /** Runs until `step`, called at each sleep with the number of the sleep, says true. */
  async live(step: (sleeps: number) => boolean, more: Partial<KeepDeps> = {}): Promise<void> {
    await keepIdentity(
      {
        host: {
          files: this.files,
          clock: {
            now: () => new Date(Date.now() + this.offsetMs),
            monotonicMs: () => performance.now() + this.monotonicOffsetMs,
            sleep: async (ms) => {
              this.slept.push(ms);
              if (step(this.slept.length)) this.#stop.abort();
              await new Promise((resolve) => setImmediate(resolve));
            },
          },
          random: (bytes) => new Uint8Array(bytes),
          run: () => Promise.reject(new Error("nothing is run")),
        },
        ca: async () => {
          this.attempts += 1;
          const { port, serverName, rootCert } = this.#plane;
          return {
            addresses: ["127.0.0.1"],
            port: this.reachable ? port : 1,
            serverName,
            rootCert,
            clusterId: "Kubernetes",
          };
        },
        spiffe: SPIFFE,
        folder: FOLDER,
        tokenFile: "/token",
        credentialExec: undefined,
        conditions: this.conditions,
        onRenewed: (_, by) => void this.renewed.push(by),
        onFailed: () => undefined,
        onStatus: (status) => {
          this.status = status;
        },
        ...more,
      },
      this.svids,
      this.#stop.signal,
    );
  }

  get problems(): string[] {
    return this.conditions.list().map(({ id, severity }) => `${severity} ${id}`);
  }

  get words(): string {
    return this.conditions
      .list()
      .map(({ message, next }) => `${message} ${next}`)
      .join("\n");
  }
}

const mint = (plane: ControlPlane, seconds = 3600): string =>
  plane.mintToken({ namespace: "default", serviceAccount: "details", seconds });

describe("an identity through faults", () => {
  let plane: ControlPlane;
  let strict: ControlPlane;
  beforeAll(async () => {
    plane = await startControlPlane(PLANE);
    strict = await startControlPlane({ ...PLANE, onlyTokens: true });
  });
  afterAll(async () => {
    await plane.stop();
    await strict.stop();
  });

  test("a CA that takes only tokens is found out while the token lives, and renewals go on by it", async () => {
    const machine = new Machine(strict, mint(strict));
    await machine.live(() => machine.status !== undefined);
    expect(machine.renewed).toEqual(["token", "token"]);
    expect(machine.problems).toEqual(["warning identity-by-token-only"]);
    expect(machine.words).toContain("VMMESH_CREDENTIAL_EXEC");
    expect(machine.status?.nextCredential).toBe("token");
  });

  test("with a credential command that is no condition: the status says that the command is next", async () => {
    const machine = new Machine(strict, undefined);
    let run = 0;
    await machine
      .live(() => machine.status !== undefined, {
        credentialExec: "/usr/local/lib/token",
        host: {
          files: machine.files,
          clock: {
            now: () => new Date(),
            monotonicMs: () => performance.now(),
            sleep: () => new Promise((resolve) => setImmediate(resolve)),
          },
          random: (bytes) => new Uint8Array(bytes),
          run: async ({ argv }) => {
            expect(argv).toEqual(["/usr/local/lib/token"]);
            run += 1;
            return { code: 0, stdout: mint(strict), stderr: "" };
          },
        },
        onStatus: (status) => {
          machine.status = status;
          throw new Error("seen");
        },
      })
      .catch((thrown: unknown) => expect(thrown).toMatchObject({ message: "seen" }));
    expect(machine.renewed).toEqual(["command", "command"]);
    expect(run).toBe(2);
    expect(machine.problems).toEqual([]);
    expect(machine.status?.nextCredential).toBe("command");
  });

  test("token and certificate both ended is told with the one command that heals, and a fresh token is used at once", async () => {
    const machine = new Machine(plane, mint(plane, -60));
    let putAt = 0;
    await machine.live((sleeps) => {
      if (sleeps === 40) {
        expect(machine.problems).toEqual(["error identity-not-renewed"]);
        expect(machine.words).toMatch(/the token expired .* mutual TLS fails .*`vmmesh join --bundle DIR`/);
        expect(machine.status?.nextCredential).toBe("none");
        machine.putToken(mint(plane));
        putAt = sleeps;
      }
      return machine.renewed.length > 0;
    });
    // At most the second of the look itself: sleep 41 is after the renewal.
    expect(machine.slept.length - putAt).toBe(1);
    expect(machine.problems).toEqual([]);
  });

  test("a token that is no better does not cause another attempt", async () => {
    const machine = new Machine(plane, mint(plane, -60));
    let before = 0;
    await machine.live((sleeps) => {
      // In the middle of a long wait.
      if (sleeps === 40) {
        before = machine.attempts;
        machine.putToken(mint(plane, -30));
      }
      return sleeps === 45;
    });
    expect(before).toBeGreaterThan(3);
    expect(machine.attempts).toBe(before);
  });

  test("a token file that is a swapped link is seen, as kubelet and secret agents write it", async () => {
    const machine = new Machine(plane, undefined);
    for (const [path, node] of new MemoryFiles({ "/old/token": mint(plane, -60), "/new/token": mint(plane) })
      .nodes)
      machine.files.nodes.set(path, node);
    await machine.files.swapLink("/token", "/old/token");
    await machine.live((sleeps) => {
      if (sleeps === 40) void machine.files.swapLink("/token", "/new/token");
      return machine.renewed.length > 0;
    });
    expect(machine.slept.length).toBeLessThanOrEqual(42);
  });

  test("a clock that was put back a day: told as that, no spin, the certificate stays, and the right clock heals it", async () => {
    const machine = new Machine(plane, mint(plane));
    let serial: string | undefined;
    let attempts = 0;
    let healed = false;
    await machine.live((sleeps) => {
      if (sleeps === 10) {
        serial = machine.svids.value?.serial;
        machine.offsetMs = -DAY_MS;
      }
      if (sleeps === 200) {
        attempts = machine.attempts;
        expect(machine.problems).toEqual(["error clock-wrong", "error identity-not-renewed"]);
        expect(machine.words).toContain("clock");
        expect(machine.svids.value?.serial).toBe(serial);
        expect(machine.status?.nextCredential).not.toBe("certificate");
        machine.offsetMs = 0;
      }
      healed = sleeps > 200 && machine.problems.length === 0;
      return healed || sleeps > 210;
    });
    expect(healed).toBe(true);
    // Two to begin with; then 1, 2, 4, … s apart, not one a second.
    expect(attempts).toBeLessThan(12);
    expect(machine.svids.value?.serial).toBe(serial);
  });

  test("a clock that was put ahead two days: the end state is told, and the right clock heals it without a renewal", async () => {
    const machine = new Machine(plane, mint(plane));
    let healed = false;
    await machine.live((sleeps) => {
      if (sleeps === 10) machine.offsetMs = 2 * DAY_MS;
      if (sleeps === 60) {
        expect(machine.problems).toEqual(["error clock-wrong", "error identity-not-renewed"]);
        machine.offsetMs = 0;
      }
      healed = sleeps > 60 && machine.problems.length === 0;
      return healed || sleeps > 70;
    });
    expect(healed).toBe(true);
    expect(machine.renewed).toEqual(["token", "certificate"]);
  });

  test("a clock put ahead while the certificate is far from its end: the CA is asked once, and the condition goes with the right clock", async () => {
    const machine = new Machine(plane, mint(plane));
    let attempts = 0;
    let healed = false;
    await machine.live((sleeps) => {
      if (sleeps === 10) {
        attempts = machine.attempts;
        machine.offsetMs = HOUR_MS;
      }
      if (sleeps === 60) {
        expect(machine.attempts).toBe(attempts + 1);
        expect(machine.problems).toEqual(["error clock-wrong"]);
        expect(machine.words).toMatch(/clock is (1h|59m59s) ahead of the mesh's.*timedatectl/);
        machine.offsetMs = 0;
      }
      healed = sleeps > 60 && machine.problems.length === 0;
      return healed || sleeps > 70;
    });
    expect(healed).toBe(true);
  });

  test("a machine that wakes from suspend in the middle of a long wait tries at once", async () => {
    const machine = new Machine(plane, mint(plane));
    machine.reachable = false;
    let before = 0;
    await machine.live((sleeps) => {
      if (sleeps === 40) {
        before = machine.attempts;
        machine.reachable = true;
        // Small enough that the dates of the certificate stay credible.
        machine.offsetMs = MINUTE_MS;
      }
      return machine.renewed.length > 0;
    });
    expect(machine.attempts).toBe(before + 1);
    expect(machine.slept.length).toBe(41);
  });

  test("a long outage: attempts get rarer while the certificate lives; without one none waits longer than half a minute", async () => {
    const machine = new Machine(plane, mint(plane));
    const waits: { readonly living: boolean; readonly ms: number }[] = [];
    await machine.live(
      (sleeps) => {
        if (machine.renewed.length === 2 && machine.reachable) {
          machine.reachable = false;
          machine.offsetMs = 13 * HOUR_MS;
        }
        if (sleeps === 1000) machine.offsetMs = 25 * HOUR_MS;
        return sleeps === 1200;
      },
      {
        onStatus: ({ nextRenewal, notAfter, lastError }) => {
          if (nextRenewal === undefined || notAfter === undefined || lastError === undefined) return;
          const now = Date.now() + machine.offsetMs;
          waits.push({ living: notAfter.getTime() > now, ms: nextRenewal.getTime() - now });
        },
      },
    );
    const longest = (living: boolean): number =>
      Math.max(...waits.filter((wait) => wait.living === living).map(({ ms }) => ms));
    expect(longest(true)).toBeGreaterThan(3 * MINUTE_MS);
    expect(longest(false)).toBeGreaterThan(15 * SECOND_MS);
    expect(longest(false)).toBeLessThanOrEqual(30 * SECOND_MS);
  });

  test("istiod's stream is back in the middle of a long wait: the next attempt is made at once", async () => {
    const machine = new Machine(plane, mint(plane));
    machine.reachable = false;
    let reached = 0;
    await machine.live(
      (sleeps) => {
        if (sleeps === 40) {
          machine.reachable = true;
          reached += 1;
        }
        return machine.renewed.length > 0;
      },
      { reached: () => reached },
    );
    expect(machine.slept.length).toBe(41);
  });

  test("a certificate that the control plane refuses is not kept to half of its life, and the CA is not asked in a loop", async () => {
    const machine = new Machine(plane, mint(plane));
    await machine.live(
      (sleeps) => {
        if (sleeps === 30) {
          // Refused, but only just renewed.
          expect(machine.renewed).toEqual(["token", "certificate"]);
          machine.monotonicOffsetMs = 6 * MINUTE_MS;
        }
        return sleeps === 60;
      },
      { isRefused: () => true },
    );
    expect(machine.renewed).toEqual(["token", "certificate", "certificate"]);
  });

  test("an RSA key, where that is wished, and each certificate with a key of its own", async () => {
    const keys: string[] = [];
    const machine = new Machine(plane, mint(plane));
    machine.svids.subscribe(({ key }) => keys.push(key), new AbortController().signal);
    await machine.live(() => machine.status !== undefined, { keyKind: "rsa-2048" });
    expect(keys.map((key) => createPrivateKey(key).asymmetricKeyType)).toEqual(["rsa", "rsa"]);
    expect(new Set(keys).size).toBe(2);
  });

  test("a new root: the certificate of the old one still proves who we are, and both are trusted from then on", async () => {
    const rotating = await startControlPlane(PLANE);
    try {
      const machine = new Machine(rotating, mint(rotating));
      const { port, serverName, rootCert } = rotating;
      await machine.live(() => machine.status !== undefined, {
        ca: async () => {
          // Between the first certificate and the second; then only the certificate of the old root is left.
          if (machine.renewed.length === 1) {
            machine.files.nodes.delete("/token");
            await rotating.rotateRoot();
          }
          return { addresses: ["127.0.0.1"], port, serverName, rootCert, clusterId: "Kubernetes" };
        },
      });
      expect(machine.renewed).toEqual(["token", "certificate"]);
      const [newer, older] = splitPem(machine.svids.value?.roots ?? "");
      expect(`${older}\n`).toBe(rootCert);
      expect(newer).not.toBe(older);
    } finally {
      await rotating.stop();
    }
  });

  test("a disk that takes nothing costs no identity", async () => {
    const machine = new Machine(plane, mint(plane));
    machine.files.makeDir = () => Promise.reject(new Error("ENOSPC: no space left on device"));
    await machine.live(() => machine.status !== undefined);
    expect(machine.svids.value?.spiffe).toBe(SPIFFE);
    expect(machine.problems).toEqual(["warning identity-not-stored"]);
    expect(machine.status?.lastError).toBeUndefined();
  });

  test("a certificate that somebody else put there is taken up", async () => {
    const other = new Machine(plane, mint(plane));
    await other.live(() => other.status !== undefined);
    const machine = new Machine(plane, undefined);
    await machine.live((sleeps) => {
      if (sleeps === 20) for (const [path, node] of other.files.nodes) machine.files.nodes.set(path, node);
      return machine.svids.value !== undefined;
    });
    // Without a token of its own it had nothing else to prove itself by.
    expect(machine.renewed).toEqual(["certificate"]);
  });
});

test("a wall clock that was put back does not stretch a certificate's life", () => {
  const at = (ms: number): Date => new Date(Date.UTC(2026, 10, 23) + ms);
  const accepted = {
    notBefore: at(-2 * MINUTE_MS),
    notAfter: at(DAY_MS),
    acceptedAt: at(0),
    acceptedMs: 1000,
  };
  const until = (wallMs: number, passedMs: number): number =>
    untilRenewal(accepted, at(wallMs), 1000 + passedMs, () => 0);
  expect(until(0, 0)).toBe(12 * HOUR_MS);
  expect(until(10 * HOUR_MS, 10 * HOUR_MS)).toBe(2 * HOUR_MS);
  // Put back an hour after ten.
  expect(until(9 * HOUR_MS, 10 * HOUR_MS)).toBe(2 * HOUR_MS);
  // Ten hours of suspend.
  expect(until(10 * HOUR_MS, 0)).toBe(2 * HOUR_MS);
  expect(until(13 * HOUR_MS, 0)).toBe(0);
  // Not valid yet.
  expect(until(-DAY_MS, 0)).toBe(0);
});

test.for([
  { name: "nothing happens", wallMs: SECOND_MS, changed: false, want: "over", sleeps: 5 },
  { name: "a loaded machine", wallMs: 20 * SECOND_MS, changed: false, want: "over", sleeps: 5 },
  { name: "the clock is set ahead", wallMs: HOUR_MS, changed: false, want: "clock", sleeps: 1 },
  { name: "the clock is set back", wallMs: -HOUR_MS, changed: false, want: "clock", sleeps: 1 },
  { name: "a file changes", wallMs: SECOND_MS, changed: true, want: "changed", sleeps: 1 },
])("a wait of five seconds when $name: $want", async ({ wallMs, changed, want, sleeps }) => {
  let now = Date.UTC(2026, 10, 23);
  let count = 0;
  const clock = {
    now: () => new Date(now),
    monotonicMs: () => 0,
    sleep: async () => {
      now += wallMs;
      count += 1;
    },
  };
  expect(await pause(clock, 5 * SECOND_MS, async () => changed, new AbortController().signal)).toBe(want);
  expect(count).toBe(sleeps);
});
