import { VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import { planFor } from "../daemon/capture.ts";
import { writeCaptureState } from "../daemon/captureState.ts";
import { joinMachine } from "../daemon/joinMachine.ts";
import { repairCapture } from "../daemon/repair.ts";
import { resolversChanged } from "../daemon/resolvers.ts";
import { readWorkload } from "../daemon/workloadFiles.ts";
import { auditCapture } from "../iptables/audit/audit.ts";
import { auditExitCode, type Finding } from "../iptables/audit/finding.ts";
import { readState } from "../iptables/generation.ts";
import { findLeftovers, removeLeftovers } from "../iptables/leftovers.ts";
import { describePlan } from "../iptables/plan/describe.ts";
import { describePreview, preview, readLive } from "../iptables/preview.ts";
import { removeCapture } from "../iptables/remove.ts";
import { renderPlan } from "../iptables/render.ts";
import { pruneDropIns } from "../iptables/scope.ts";
import { hasSystemd, stopRepairs, systemdServices } from "../platform/services.ts";
import { readOwners } from "../platform/users.ts";
import type { Options } from "./commands.ts";
import { planOfPeer, wantsPeer } from "./compat.ts";
import {
  type Context,
  flag,
  number,
  openContext,
  openServices,
  print,
  requireNetAdmin,
  requireRoot,
  say,
  takeLock,
  untilInterrupted,
  wantsJson,
} from "./context.ts";

export async function plan(options: Options): Promise<number> {
  if (wantsPeer(options)) return await planOfPeer(options);
  requireRoot("vmmesh iptables plan reads the firewall, which only root may; it changes nothing, but it too");
  const { host, paths } = openContext(options);
  const workload = await readWorkload(host, paths);
  const planned = await planFor(host, workload, await readOwners(host, paths.root === "/"));
  const rendered = renderPlan(planned);
  const live = preview(planned, await readLive(host));
  if (wantsJson(options)) print({ plan: planned, live });
  else if (flag(options, "rules"))
    print(
      [rendered.ipv4, rendered.ipv6, rendered.guard, rendered.fence]
        .filter((part) => part !== undefined)
        .join("\n"),
    );
  else print(`${describePlan(planned)}\n${describePreview(live)}`);
  return 0;
}

export async function apply(options: Options): Promise<number> {
  requireRoot("vmmesh iptables apply");
  const context = openContext(options);
  const { services, owners } = await openServices(context);
  await using _lock = await takeLock(context);
  const { files } = context.host;
  const changed = async (): Promise<boolean> =>
    resolversChanged(files, (await readState(files, context.paths.rules, "confirmed"))?.state.plan.resolvers);
  const asked = flag(options, "if-resolvers-changed");
  if (asked && !(await changed())) {
    print(wantsJson(options) ? { applied: false } : "the rules capture what resolv.conf names");
    return 0;
  }
  const machine = joinMachine(context.host, context.paths, owners, services, say);
  let appliedInMs = 0;
  // systemd does not tell of a change to the file while the service runs.
  do {
    ({ appliedInMs } = await machine.installRules(
      number(options, "confirm-within") * SECOND_MS,
      untilInterrupted(),
    ));
  } while (asked && (await changed()));
  print(wantsJson(options) ? { applied: true, appliedInMs } : "applied and confirmed");
  return 0;
}

export async function audit(options: Options): Promise<number> {
  const { host, paths } = openContext(options);
  const joined = (await host.files.stat(paths.clusterEnv)) !== undefined;
  const started = host.clock.monotonicMs();
  // Who may not read the firewall hears so as a finding, not as an error.
  const wanted =
    joined && process.getuid?.() === 0
      ? Promise.all([readWorkload(host, paths), readOwners(host, paths.root === "/")]).then(
          ([workload, owners]) => planFor(host, workload, owners),
        )
      : undefined;
  const findings = await auditCapture(host, joined ? paths.rules : undefined, wanted);
  const tookMs = Math.round(host.clock.monotonicMs() - started);
  if (wantsJson(options)) print({ findings, tookMs });
  else {
    const wrong = findings.some(({ severity }) => severity !== "info");
    const verdict = wrong ? [] : ["nothing wrong found: capture is complete and in order"];
    print([...verdict, ...findings.map(tell)].join("\n\n"));
    say(`looked for ${tookMs} ms`);
  }
  return auditExitCode(findings);
}

function tell(finding: Finding): string {
  return [
    `${finding.id} ${finding.severity}: ${finding.title}`,
    ...finding.evidence.map((line) => `    ${line}`),
    `  what to do: ${finding.remedy}`,
    ...(finding.command === undefined || finding.command === "" ? [] : [`  command:    ${finding.command}`]),
  ].join("\n");
}

export async function clean(options: Options): Promise<number> {
  const context = openContext(options);
  await requireNetAdmin(context, "vmmesh iptables clean");
  if (flag(options, "leftovers")) return await cleanLeftovers(options, context);
  if (flag(options, "dry-run"))
    throw new VmmeshError("USAGE", "--dry-run goes with --leftovers", {
      next: "`vmmesh iptables plan` shows what vmmesh itself has in force.",
    });
  await using _lock = await takeLock(context);
  const { host } = context;
  const report = await removeCapture(host, context.paths.rules, async () => {
    if (await hasSystemd(host)) await stopRepairs(systemdServices(host));
  });
  await pruneDropIns(host, {});
  await writeCaptureState(context.host, context.paths, { inForce: false });
  if (wantsJson(options)) print(report);
  else {
    for (const line of report.residue) say(`still there: ${line}`);
    print(
      `taken out: ${report.removed.length === 0 ? "nothing was in force" : report.removed.join(", ")}; other programs' rules ${report.foreignUnchanged ? "are unchanged" : "changed meanwhile"}`,
    );
  }
  return report.residue.length === 0 ? 0 : 1;
}

async function cleanLeftovers(options: Options, context: Context): Promise<number> {
  const { host, paths } = context;
  await using _lock = await takeLock(context);
  if ((await readState(host.files, paths.rules, "confirmed"))?.state.plan.comments === false) {
    throw new VmmeshError(
      "USAGE",
      "without comments nothing tells our rules from those of Istio's own tools",
      {
        next: "Where iptables has the comment match (`modprobe xt_comment`), set VMMESH_RULE_COMMENTS=true in sidecar.env, run `vmmesh iptables apply`, then this command again.",
      },
    );
  }
  const leftovers = await findLeftovers(host);
  const dry = flag(options, "dry-run");
  const { foreignUnchanged } = dry ? { foreignUnchanged: true } : await removeLeftovers(host, leftovers);
  const { found } = leftovers;
  if (wantsJson(options)) print({ found, removed: !dry, foreignUnchanged });
  else if (found.length === 0) print("nothing of Istio's own tools is here");
  else
    print(
      [
        dry ? "would be taken out:" : "taken out:",
        ...found.map((line) => `  ${line}`),
        ...(dry ? [] : [`other programs' rules ${foreignUnchanged ? "are unchanged" : "changed meanwhile"}`]),
      ].join("\n"),
    );
  return 0;
}

/** The same as vmmesh-rules.service does, by hand. */
export async function repair(options: Options): Promise<number> {
  const context = openContext(options);
  await requireNetAdmin(context, "vmmesh iptables repair");
  const { host, paths } = context;
  await repairCapture(host, paths, say);
  return 0;
}
