import { VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import { planFor } from "../daemon/capture.ts";
import { writeCaptureState } from "../daemon/captureState.ts";
import { joinMachine } from "../daemon/joinMachine.ts";
import { repairCapture } from "../daemon/repair.ts";
import { readWorkload } from "../daemon/workloadFiles.ts";
import { removeCapture } from "../iptables/apply.ts";
import { auditCapture, auditExitCode, type Finding } from "../iptables/audit.ts";
import { canonicalAddress } from "../iptables/compat/address.ts";
import { compatFacts, type GivenFacts } from "../iptables/compat/facts.ts";
import { type FlagSpec, parseCompat } from "../iptables/compat/flags.ts";
import { compatRules } from "../iptables/compat/rules.ts";
import { describePlan } from "../iptables/plan.ts";
import { renderPlan } from "../iptables/render.ts";
import { readOwners } from "../platform/users.ts";
import type { Options } from "./commands.ts";
import {
  flag,
  list,
  number,
  openContext,
  openServices,
  print,
  requireRoot,
  say,
  takeLock,
  untilInterrupted,
  wantsJson,
} from "./context.ts";

export async function plan(options: Options): Promise<number> {
  if (options["compat"] !== undefined) return await planOfPeer(options);
  requireRoot("vmmesh iptables plan reads the firewall, which only root may; it changes nothing, but it too");
  const { host, paths } = openContext(options);
  const workload = await readWorkload(host, paths);
  const planned = await planFor(host, workload, await readOwners(host, paths.root === "/"));
  const rendered = renderPlan(planned, { comments: true });
  if (wantsJson(options)) print({ plan: planned });
  else if (flag(options, "rules"))
    print(
      [rendered.ipv4, rendered.ipv6, rendered.guard, rendered.fence]
        .filter((part) => part !== undefined)
        .join("\n"),
    );
  else print(describePlan(planned));
  return 0;
}

/** What stands in for facts of the machine, and may stand among the peer's own flags. */
const STAND_INS: readonly FlagSpec[] = ["family", "ipv6", "dns-server"].map((long) => ({
  long,
  kind: "text",
  default: "",
  meaning: "in the command table",
}));

async function planOfPeer(options: Options): Promise<number> {
  const { host } = openContext({});
  const config = parseCompat(list(options, "words"), process.env, STAND_INS);
  const given = (long: string): readonly string[] => config.own.get(long) ?? [];
  const oneOf = (long: string, known: readonly [string, string]): boolean | undefined => {
    const word = given(long).at(-1);
    if (word === undefined || known.includes(word)) return word === undefined ? undefined : word === known[0];
    throw new VmmeshError("USAGE", `--${long} is ${known.join(" or ")}, not \`${word}\``);
  };
  const ipv6 = oneOf("ipv6", ["true", "false"]);
  const servers = given("dns-server").flatMap((item) => item.split(","));
  const strange = servers.find((server) => server !== "none" && canonicalAddress(server) === undefined);
  if (strange !== undefined)
    throw new VmmeshError("USAGE", `--dns-server is an address or none, not \`${strange}\``);
  const facts: GivenFacts = {
    ...(ipv6 === undefined ? {} : { ipv6 }),
    ...(servers.length === 0 ? {} : { dnsServers: servers.filter((server) => server !== "none") }),
  };
  const machine = {
    addresses: host.net.addresses().map(({ address }) => address),
    resolvConf: await host.files.readText("/etc/resolv.conf"),
    passwd: await host.files.readText("/etc/passwd"),
  };
  const family = oneOf("family", ["ipv6", "ipv4"]) === true ? 6 : 4;
  process.stdout.write(compatRules(config, compatFacts(config, machine, facts), family));
  return 0;
}

export async function apply(options: Options): Promise<number> {
  requireRoot("vmmesh iptables apply");
  const context = openContext(options);
  const { services, owners } = await openServices(context);
  await using _lock = await takeLock(context);
  const machine = joinMachine(context.host, context.paths, owners, services);
  const { appliedInMs } = await machine.installRules(
    number(options, "confirm-within") * SECOND_MS,
    untilInterrupted(),
  );
  print(wantsJson(options) ? { applied: true, appliedInMs } : "applied and confirmed");
  return 0;
}

export async function audit(options: Options): Promise<number> {
  const { host, paths } = openContext(options);
  const joined = (await host.files.stat(paths.clusterEnv)) !== undefined;
  const findings = await auditCapture(host, joined ? paths.rules : undefined);
  if (wantsJson(options)) print({ findings });
  else if (findings.length === 0) print("nothing found: capture is complete and in order");
  else print(findings.map(tell).join("\n\n"));
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
  requireRoot("vmmesh iptables clean");
  const context = openContext(options);
  await using _lock = await takeLock(context);
  const report = await removeCapture(context.host, context.paths.rules);
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

/** The same as vmmesh-rules.service does, by hand. */
export async function repair(options: Options): Promise<number> {
  requireRoot("vmmesh iptables repair");
  const { host, paths } = openContext(options);
  await repairCapture(host, paths, say);
  return 0;
}
