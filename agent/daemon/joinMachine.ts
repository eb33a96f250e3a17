import { messageOf, VmmeshError } from "../core/errors.ts";
import { type Paths, PORTS, RESOLV_CONF } from "../core/paths.ts";
import { SECOND_MS } from "../core/time.ts";
import { parseResolvConf } from "../dns/resolvConf.ts";
import { enrollByAny } from "../identity/credentials.ts";
import { storeSvid } from "../identity/svid.ts";
import { applyPlan } from "../iptables/apply.ts";
import { backendWords } from "../iptables/plan/describe.ts";
import { readSshPorts } from "../iptables/read.ts";
import { removeCapture } from "../iptables/remove.ts";
import { renderPlan } from "../iptables/render.ts";
import { takeBackTrial } from "../iptables/rollback.ts";
import { refuseSharedRouting } from "../iptables/routing.ts";
import { addDropIns, pruneDropIns } from "../iptables/scope.ts";
import type { Workload } from "../mesh/types.ts";
import type { Host } from "../platform/host.ts";
import { type Services, stopRepairs, UNITS } from "../platform/services.ts";
import type { Owners } from "../platform/users.ts";
import { adminClient } from "../telemetry/admin.ts";
import { captureWords, planFor } from "./capture.ts";
import { writeCaptureState } from "./captureState.ts";
import { grantEnvoy } from "./envoyCapability.ts";
import type { Machine } from "./execute.ts";
import { istiodTarget, readWorkload, spiffeOf } from "./workloadFiles.ts";

const CHECK_TIMEOUT_MS = 3 * SECOND_MS;
const POLL_MS = 200;
const READY_WITHIN_MS = 60 * SECOND_MS;

/**
 * The machine as the steps of a join see it: the feature rooms behind the four verbs that are not plain files and units.
 *
 * @param say takes one line for the person who waits
 */
export function joinMachine(
  host: Host,
  paths: Paths,
  owners: Owners,
  services: Services,
  say: (line: string) => void,
): Machine {
  const machine: Machine = {
    host,
    paths,
    owners,
    services,
    async enroll(signal) {
      const workload = await readWorkload(host, paths);
      const spiffe = spiffeOf(workload);
      const ca = await istiodTarget(host, workload, (await host.files.readText(paths.rootCert)) ?? "");
      const { svid } = await enrollByAny(
        {
          host,
          tokenFile: paths.token,
          credentialExec: workload.credentialExec,
          runAs: owners.agent,
        },
        { ca, spiffe, ttlMs: workload.certificateTtlMs, keyKind: workload.keyKind },
        undefined,
        signal,
      );
      await storeSvid(host.files, paths.identity, svid, owners.agent);
    },
    async awaitReady(withinMs, signal) {
      const admin = adminClient(host.net, paths.adminSocket, host.clock);
      const deadline = host.clock.monotonicMs() + withinMs;
      let waitsFor = "the agent";
      let because: string | undefined;
      while (host.clock.monotonicMs() < deadline) {
        try {
          const status = await admin.status();
          if (status.waitingFor.length === 0) return;
          waitsFor = status.waitingFor.join(", ");
          because = status.controlPlane.lastRejection ?? status.conditions[0]?.message;
        } catch (thrown) {
          because = messageOf(thrown);
        }
        await host.clock.sleep(POLL_MS, signal);
      }
      throw new VmmeshError(
        "NOT_READY",
        `not ready after ${withinMs / SECOND_MS} s: still waiting for ${waitsFor}`,
        {
          ...(because === undefined ? {} : { cause: new Error(because) }),
          next: "Read `journalctl -u vmmesh-agent -u vmmesh-envoy`; if the mesh is only slow, give --ready-within more seconds.",
        },
      );
    },
    async installRules(confirmWithinMs, signal) {
      const workload = await readWorkload(host, paths);
      const plan = await planFor(host, workload, owners);
      const unit = services.kind === "systemd" ? "systemd" : "detached";
      // We hold the lock: a trial that is still there belongs to a join that was killed.
      await takeBackTrial(host, paths.rules, unit);
      await refuseSharedRouting(host, plan);
      // The mode was changed since the join: Envoy's listener first, a handover to one that is not transparent goes nowhere.
      if (await grantEnvoy(machine, workload.interception.mode)) {
        // Not beside the new agent: it would open istiod's stream in the name of the former Envoy, with the former mode, and
        // the next one would be given listeners that it cannot have.
        await services.stop(UNITS.envoy);
        try {
          await services.restart(UNITS.agent);
        } finally {
          await services.start(UNITS.envoy);
        }
        await machine.awaitReady(READY_WITHIN_MS, signal);
      }
      const checks = await passing(await connectivityChecks(host, workload), signal);
      await addDropIns(host, plan, paths.rules);
      const trial = await applyPlan(host, renderPlan(plan), {
        confirmWithinMs,
        rulesDir: paths.rules,
        unit,
      });
      // The agent's answer renews the lease by which questions are redirected; its own next one is up to a second away.
      if (workload.dnsCapture)
        for (const address of ["127.0.0.1", ...(plan.families.length > 1 ? ["::1"] : [])])
          await answersDns(host, address, signal, PORTS.dns);
      const lost = await firstLost(host, checks, signal);
      if (lost !== undefined) {
        await trial.rollBack();
        throw new VmmeshError(
          "RULES_NOT_CONFIRMED",
          `with the rules in force ${lost} no longer worked, so they were taken out again`,
          {
            next: "Leave the destination out with --exclude-outbound-cidr or --exclude-outbound-port; `vmmesh iptables plan` says what is captured.",
          },
        );
      }
      await trial.confirm();
      for (const note of trial.plan.notes.slice(plan.notes.length)) say(`warning: ${note}`);
      await pruneDropIns(host, plan);
      await writeCaptureState(host, paths, {
        inForce: true,
        backend: backendWords(plan),
        ...captureWords(workload),
      });
      return { appliedInMs: trial.appliedInMs };
    },
    async removeRules() {
      const report = await removeCapture(host, paths.rules, () => stopRepairs(services));
      await pruneDropIns(host, {});
      await host.files.remove(paths.captureState);
      if (report.residue.length > 0) {
        throw new VmmeshError("RULES_REJECTED", `rules of ours are still there: ${report.residue[0]}`, {
          next: "Run `vmmesh iptables audit`, then `vmmesh leave` again.",
        });
      }
    },
  };
  return machine;
}

/** Something that works now and must still work with the rules in force. */
interface Check {
  readonly name: string;
  works(signal: AbortSignal): Promise<boolean>;
}

async function connectivityChecks(host: Host, workload: Workload): Promise<Check[]> {
  const target = await istiodTarget(host, workload, "");
  const { servers } = parseResolvConf((await host.files.readText(RESOLV_CONF)) ?? "");
  const connects = (address: string, port: number) => async (): Promise<boolean> => {
    try {
      (await host.net.connectTcp(address, port, { timeoutMs: CHECK_TIMEOUT_MS })).destroy();
      return true;
    } catch {
      return false;
    }
  };
  return [
    ...target.addresses.map((address) => ({
      name: `the control plane (${address}:${target.port})`,
      works: connects(address, target.port),
    })),
    { name: "readiness", works: connects("127.0.0.1", PORTS.readiness) },
    ...servers.map((server) => ({
      name: `DNS (${server})`,
      works: (signal: AbortSignal) => answersDns(host, server, signal),
    })),
    ...(await readSshPorts(host)).map((port) => ({
      name: `a new login (port ${port})`,
      works: connects(workload.addresses[0] ?? "127.0.0.1", port),
    })),
  ];
}

/** A query for the root's name servers: every resolver has some reply to it, if only a refusal. */
async function answersDns(host: Host, server: string, signal: AbortSignal, port = 53): Promise<boolean> {
  const query = Buffer.from([0x5e, 0x1f, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1]);
  const socket = await host.net.bindUdp(server.includes(":") ? "::" : "0.0.0.0", 0);
  const scope = new AbortController();
  try {
    const answered = new Promise<true>((resolve) => socket.onMessage(() => resolve(true)));
    const late = host.clock.sleep(CHECK_TIMEOUT_MS, AbortSignal.any([signal, scope.signal]));
    socket.send(query, port, server);
    return await Promise.race([answered, late.then(() => false)]);
  } finally {
    // A timer that runs on would keep `vmmesh join` from ending.
    scope.abort();
    socket.close();
  }
}

/** What does not work beforehand is no proof of anything afterwards. */
async function passing(checks: readonly Check[], signal: AbortSignal): Promise<Check[]> {
  const results = await Promise.all(checks.map((check) => check.works(signal)));
  return checks.filter((_, index) => results[index]);
}

/** Each check gets three tries: one lost packet is no lockout. */
async function firstLost(
  host: Host,
  checks: readonly Check[],
  signal: AbortSignal,
): Promise<string | undefined> {
  for (const check of checks) {
    let works = false;
    for (let attempt = 0; attempt < 3 && !works; attempt += 1) {
      if (attempt > 0) await host.clock.sleep(POLL_MS, signal);
      works = await check.works(signal);
    }
    if (!works) return check.name;
  }
  return undefined;
}
