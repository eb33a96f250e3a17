import { VmmeshError } from "../core/errors.ts";
import { ipFamily, isRoutable, whyNotCidr } from "../core/net.ts";
import { SECOND_MS } from "../core/time.ts";
import { planFor, policyScope, sendersOf } from "../daemon/capture.ts";
import { execute } from "../daemon/execute.ts";
import { renewByToken, wantsToken } from "../daemon/freshToken.ts";
import { joinMachine } from "../daemon/joinMachine.ts";
import { type Journal, readJournal } from "../daemon/journal.ts";
import { PAIR_FILES } from "../daemon/metricsTls.ts";
import { describeStep, planJoin, type Step } from "../daemon/steps.ts";
import { spiffeOf } from "../daemon/workloadFiles.ts";
import { checkEnvoy } from "../envoy/version.ts";
import { judgesByPort } from "../iptables/hostFirewall.ts";
import { checkFailurePolicy } from "../iptables/plan/failure.ts";
import { checkScope } from "../iptables/plan/senders.ts";
import { checkInterfaces, fitsInterface } from "../iptables/plan/wish.ts";
import { parsePolicyRule } from "../iptables/policy.ts";
import { describePreview, type Preview, preview, readLive } from "../iptables/preview.ts";
import { readMachine } from "../iptables/read.ts";
import { readBundle, renderMeshConfig } from "../mesh/bundle.ts";
import { parseEnv, renderEnv, sieveMeshEnv } from "../mesh/env.ts";
import { renderSidecarEnv } from "../mesh/sidecar.ts";
import type { Bundle, Workload } from "../mesh/types.ts";
import { workloadOf } from "../mesh/workload.ts";
import type { Host } from "../platform/host.ts";
import type { Owners } from "../platform/users.ts";
import { contextOf } from "../telemetry/tls.ts";
import type { Options } from "./commands.ts";
import {
  type Context,
  flag,
  list,
  number,
  openContext,
  openServices,
  ports,
  print,
  requireRoot,
  say,
  takeLock,
  text,
  untilInterrupted,
  wantsJson,
} from "./context.ts";

/** `vmmesh join`: both ways end in one bundle, from there on they are the same. */
export async function join(options: Options): Promise<number> {
  const context = openContext(options);
  const { host, paths } = context;
  const rehearse = flag(options, "dry-run");
  checkOptions(options);
  if (!rehearse) requireRoot("vmmesh join");
  const signal = untilInterrupted();

  const { services, owners } = await openServices(context);
  await using _lock = rehearse ? undefined : await takeLock(context);
  if (await isJoinedWithoutIdentity(context)) return renewIdentity(context, options, owners, signal);
  const journal = await openJournal(context, options);
  await tellMissingInterfaces(context, options);
  if (!rehearse) await checkBackend(context, options);
  const envoy = await checkEnvoy(host, text(options, "envoy"));
  if (services.kind === "systemd") checkVisible(envoy.path);
  const credentialExec = text(options, "credential-exec");
  if (credentialExec !== undefined)
    await checkCredentialExec(context, credentialExec, services.kind === "systemd");
  const metricsTls = text(options, "metrics-tls");
  if (metricsTls !== undefined && metricsTls !== "workload")
    await checkMetricsPair(context, metricsTls, owners, services.kind === "systemd", rehearse);
  const bundle = await bundleOf(context, options, rehearse);
  const asked = text(options, "interception-mode");
  const draft = await render(context, options, bundle, envoy.path, asked);
  for (const key of draft.refused)
    say(`warning: cluster.env: ${key} is not a key of the mesh and is left out`);
  const needed =
    asked === undefined && services.kind === "systemd"
      ? await neededMode(context, bundle, draft.workload)
      : undefined;
  const { files, workload } =
    needed === undefined ? draft : await render(context, options, bundle, envoy.path, needed);
  const spiffe = spiffeOf(workload);
  const steps = planJoin({
    paths,
    files,
    token: bundle.token,
    spiffe,
    envoyPath: envoy.path,
    interceptionMode: workload.interception.mode,
    confirmWithinMs: number(options, "confirm-within") * SECOND_MS,
    readyWithinMs: number(options, "ready-within") * SECOND_MS,
  });
  tellFacts(workload, `${envoy.path} (${envoy.version.text})`, bundle);
  if (rehearse) {
    const live = await liveEffects(host, workload, owners);
    print(
      wantsJson(options)
        ? { steps: steps.map(withoutContent), ...(live === undefined ? {} : { live }) }
        : [
            ...steps.map((step) => `would ${describeStep(step)}`),
            ...(live === undefined ? [] : ["", describePreview(live)]),
          ].join("\n"),
    );
    return 0;
  }
  await execute(
    steps,
    journal,
    joinMachine(host, paths, owners, services, say),
    (line) => say(`- ${line}`),
    signal,
  );
  if (wantsJson(options))
    print({ joined: true, spiffe, address: workload.addresses[0], group: workload.workloadGroup });
  else print(`joined: this machine is ${spiffe}\nNow: vmmesh status`);
  return 0;
}

/** Our units have ProtectHome= and PrivateTmp=: what lies there does not exist for them. */
const hiddenFolder = (path: string): string | undefined =>
  ["/root", "/home", "/run/user", "/tmp", "/var/tmp"].find((folder) => path.startsWith(`${folder}/`));

/** @throws {VmmeshError} USAGE if the agent could not run it, or anybody could change it */
async function checkCredentialExec({ host }: Context, path: string, units: boolean): Promise<void> {
  const wrong = (why: string, next: string): VmmeshError =>
    new VmmeshError("USAGE", `--credential-exec: ${path} ${why}`, { next });
  if (!path.startsWith("/"))
    throw wrong("is not an absolute path", "Write it from / on; it gets no arguments.");
  const hidden = units ? hiddenFolder(path) : undefined;
  if (hidden !== undefined)
    throw wrong(
      `cannot be run by the agent's unit, which does not see ${hidden}`,
      "Move it, e.g. to /usr/local/lib/vmmesh.",
    );
  const found = await host.files.stat(path);
  if (found === undefined)
    throw wrong("does not exist", "Install it first, then run the same command again.");
  if (found.kind === "link") return;
  if (found.kind !== "file" || (found.mode & 0o111) === 0)
    throw wrong("is not a program", `Make it one: chmod 0755 ${path}`);
  if ((found.mode & 0o002) !== 0)
    throw wrong("may be changed by every user of this machine", `Take that away: chmod o-w ${path}`);
}

/** @throws {VmmeshError} USAGE if the agent could not serve with what lies there; whether it may read it only root can try */
async function checkMetricsPair(
  { host }: Context,
  folder: string,
  owners: Owners,
  units: boolean,
  rehearse: boolean,
): Promise<void> {
  const wrong = (why: string, next: string, cause?: unknown): VmmeshError =>
    new VmmeshError("USAGE", `--metrics-tls: ${why}`, { next, cause });
  if (!folder.startsWith("/"))
    throw wrong(
      `${folder} is neither \`workload\` nor an absolute path`,
      "Name the folder of tls.crt and tls.key.",
    );
  const hidden = units ? hiddenFolder(`${folder}/`) : undefined;
  if (hidden !== undefined)
    throw wrong(
      `the agent's unit does not see ${hidden}`,
      "Put the folder elsewhere, e.g. at /etc/ssl/vmmesh-metrics.",
    );
  if (rehearse) return;
  const read = async (name: string): Promise<string> => {
    const path = `${folder}/${name}`;
    const { code, stdout, stderr } = await host.run({ argv: ["cat", "--", path], as: owners.agent });
    if (code === 0) return stdout;
    throw wrong(
      `user vmmesh cannot read ${path}: ${stderr.trim()}`,
      `Let it: the key root:vmmesh 0640, the folder open to that group.`,
    );
  };
  const pair = { chain: await read(PAIR_FILES.chain), key: await read(PAIR_FILES.key) };
  try {
    contextOf(pair);
  } catch (thrown) {
    throw wrong(
      `${PAIR_FILES.chain} and ${PAIR_FILES.key} in ${folder} are no pair for TLS`,
      "Both are PEM; the certificate comes first in its chain, and the key is its own, without a passphrase.",
      thrown,
    );
  }
}

function checkVisible(envoyPath: string): void {
  const hidden = hiddenFolder(envoyPath);
  if (hidden === undefined) return;
  throw new VmmeshError(
    "ENVOY_MISSING",
    `${envoyPath} cannot be run by Envoy's unit, which does not see ${hidden}`,
    {
      next: `Move it: install -m 0755 ${envoyPath} /usr/local/bin/envoy`,
    },
  );
}

function checkOptions(options: Options): void {
  if (text(options, "bundle") !== undefined) {
    const ofCluster = [
      "kubeconfig",
      "workload-group",
      "service-account",
      "service",
      "revision",
      "network",
      "cluster-id",
    ].filter((name) => text(options, name) !== undefined);
    if (list(options, "port").length > 0) ofCluster.push("port");
    if (ofCluster.length > 0) {
      throw new VmmeshError(
        "USAGE",
        `--bundle and --${ofCluster[0]} exclude each other: the bundle says it already`,
        {
          next: "Leave one of them out.",
        },
      );
    }
  }
  const ip = text(options, "ip");
  if (ip !== undefined && (ipFamily(ip) === undefined || !isRoutable(ip))) {
    throw new VmmeshError("USAGE", `--ip: ${ip} is not an address that peers can reach`, {
      next: "Give an address of this machine: `ip address`.",
    });
  }
  for (const name of ["include-outbound-cidr", "exclude-outbound-cidr", "mesh-cidr"]) {
    const all = name === "include-outbound-cidr" && list(options, name).join() === "*";
    for (const item of all ? [] : list(options, name)) {
      const why = whyNotCidr(item);
      if (why === undefined) continue;
      throw new VmmeshError("USAGE", `--${name}: \`${item}\` ${why}`, {
        next: "Write it like 10.1.0.0/16 or fd00:1::/64.",
      });
    }
  }
  list(options, "failure-policy").forEach(parsePolicyRule);
  checkInterfaces(list(options, "exclude-interface"), list(options, "virtual-interface"));
  for (const name of ["include-outbound-port", "exclude-outbound-port", "exclude-inbound-port"])
    ports(options, name);
  if (list(options, "include-inbound-port").join() !== "*") {
    const excluded = ports(options, "exclude-inbound-port");
    const both = ports(options, "include-inbound-port").find((port) => excluded.includes(port));
    if (both !== undefined)
      throw new VmmeshError("USAGE", `inbound port ${both} is both included and excluded`, {
        next: "Leave one of the two out.",
      });
  }
  for (const name of ["confirm-within", "ready-within"]) {
    if (number(options, name) < 5)
      throw new VmmeshError("USAGE", `--${name}: at least 5 seconds are needed`, {
        next: `Leave --${name} out for the default.`,
      });
  }
}

/** It may come later, as docker0 does with Docker: worth a word, no reason to refuse. */
async function tellMissingInterfaces({ host }: Context, options: Options): Promise<void> {
  const there = await host.files.list("/sys/class/net");
  for (const name of [...list(options, "exclude-interface"), ...list(options, "virtual-interface")]) {
    if (there?.some((it) => fitsInterface(name, it)) === false)
      say(`warning: there is no interface ${name} now; its rules wait for it`);
  }
}

async function isJoinedWithoutIdentity({ host, paths }: Context): Promise<boolean> {
  return (await readJournal(host.files, paths))?.state === "joined" && (await wantsToken(host, paths));
}

/** A joined machine whose agent gets no new certificate takes only token and roots out of the bundle. */
async function renewIdentity(
  context: Context,
  options: Options,
  owners: Owners,
  signal: AbortSignal,
): Promise<number> {
  const { host, paths } = context;
  say("this machine is joined already, but its identity is not renewed: only token and roots are taken");
  const rehearse = flag(options, "dry-run");
  const bundle = await bundleOf(context, options, rehearse);
  const { kept } = sieveMeshEnv(bundle.clusterEnv);
  const workload = workloadOf({
    clusterEnv: kept,
    sidecarEnv: parseEnv((await host.files.readText(paths.sidecarEnv)) ?? "", paths.sidecarEnv),
    proxyConfig: bundle.proxyConfig,
    machine: { hostname: host.net.hostname(), addresses: host.net.addresses() },
  });
  const spiffe = spiffeOf(workload);
  if (!rehearse) {
    const { token, rootCert } = bundle;
    await renewByToken(host, paths, owners, { token, rootCert, spiffe }, signal);
  }
  if (wantsJson(options)) print({ joined: true, renewed: !rehearse, spiffe });
  else print(`${rehearse ? "would be renewed" : "renewed"}: this machine is ${spiffe}\nNow: vmmesh status`);
  return 0;
}

/** The rules come last in a join: one that cannot work is refused before anything is changed. */
async function checkBackend({ host }: Context, options: Options): Promise<void> {
  const asked = text(options, "backend");
  if (asked === "nft" || asked === "legacy" || asked === "nftables") await readMachine(host, asked);
}

/** A fresh journal, or that of a join that was interrupted. */
async function openJournal({ host, paths }: Context, options: Options): Promise<Journal> {
  const found = await readJournal(host.files, paths);
  if (found?.state === "joined") {
    throw new VmmeshError(
      "ALREADY_JOINED",
      `this machine is joined already (${found.how}, ${found.startedAt})`,
      {
        next: "`vmmesh status` shows it; `vmmesh leave` first to join anew.",
      },
    );
  }
  if (found?.state === "leaving") {
    throw new VmmeshError("ALREADY_JOINED", "a leave of this machine was interrupted", {
      next: "Run `vmmesh leave` again, then join.",
    });
  }
  if (found !== undefined) {
    say("a join of this machine was interrupted: going on with it");
    return found;
  }
  const how =
    text(options, "bundle") === undefined
      ? "with a kubeconfig"
      : `with the bundle ${text(options, "bundle")}`;
  return { version: 1, state: "joining", startedAt: host.clock.now().toISOString(), how, entries: [] };
}

async function bundleOf(context: Context, options: Options, rehearse: boolean): Promise<Bundle> {
  const path = text(options, "bundle");
  if (path !== undefined) {
    say(`bundle: ${path}`);
    return readBundle(context.host.files, path);
  }
  const { bundleFromCluster, tellOutcome } = await import("./meshBundle.ts");
  const made = await bundleFromCluster(context, options, {
    hostname: context.host.net.hostname(),
    ip: text(options, "ip"),
    rehearse,
  });
  tellOutcome(made);
  return made.bundle;
}

/**
 * The mode that this machine's own firewall asks for, where neither the operator nor the mesh has named one.
 *
 * @returns undefined: nothing speaks against REDIRECT, or that cannot be seen (without root)
 */
async function neededMode(
  { host }: Context,
  bundle: Bundle,
  workload: Workload,
): Promise<"tproxy" | undefined> {
  const named = ["ISTIO_INBOUND_INTERCEPTION_MODE", "ISTIO_META_INTERCEPTION_MODE"].some(
    (key) => (bundle.clusterEnv.get(key) ?? "") !== "",
  );
  if (named) return undefined;
  const why = await judgesByPort(host, workload.inbound.kind === "all" ? "all" : workload.inbound.ports);
  if (why === undefined) return undefined;
  say(
    `inbound by TPROXY: ${why}, and only TPROXY leaves the port as it was (--interception-mode redirect overrides)`,
  );
  return "tproxy";
}

/** The files of this machine, and the workload that they make together. */
async function render(
  { host, paths }: Context,
  options: Options,
  bundle: Bundle,
  envoyPath: string,
  mode: string | undefined,
): Promise<{ files: { path: string; content: string }[]; workload: Workload; refused: readonly string[] }> {
  const { kept, refused } = sieveMeshEnv(bundle.clusterEnv);
  const istiod = text(options, "istiod-address");
  const addresses = istiod === undefined ? [...bundle.hosts.values()].flat() : [istiod];
  const meshCidrs = list(options, "mesh-cidr").length > 0 ? list(options, "mesh-cidr") : bundle.meshCidrs;
  const ip = text(options, "ip");
  const credentialExec = text(options, "credential-exec");
  const metricsTls = text(options, "metrics-tls");
  const backend = text(options, "backend");
  const clusterEnv = renderEnv(kept, {
    order: "sorted",
    header:
      "What the mesh says of this workload, written by `vmmesh join`. Changes belong into sidecar.env, which wins.",
  });
  const sidecarEnv = renderSidecarEnv({
    envoyPath,
    istiodAddresses: addresses,
    meshCidrs,
    failurePolicy: list(options, "failure-policy"),
    inboundPorts: list(options, "include-inbound-port"),
    excludeInterfaces: list(options, "exclude-interface"),
    virtualInterfaces: list(options, "virtual-interface"),
    ...(flag(options, "drop-invalid") ? { dropInvalid: "true" } : {}),
    ...(text(options, "rule-comments") === "off" ? { ruleComments: "false" } : {}),
    ...(mode === undefined ? {} : { interceptionMode: mode.toUpperCase() }),
    ...(backend === undefined ? {} : { backend }),
    inboundExcludePorts: ports(options, "exclude-inbound-port"),
    outboundCidrs: list(options, "include-outbound-cidr"),
    outboundPorts: ports(options, "include-outbound-port"),
    outboundUsers: list(options, "include-outbound-user"),
    outboundExcludeUsers: list(options, "exclude-outbound-user"),
    outboundUnits: list(options, "include-outbound-unit"),
    outboundExcludeUnits: list(options, "exclude-outbound-unit"),
    outboundGroups: list(options, "include-outbound-group"),
    outboundExcludeGroups: list(options, "exclude-outbound-group"),
    outboundExcludeCidrs: list(options, "exclude-outbound-cidr"),
    outboundExcludePorts: ports(options, "exclude-outbound-port"),
    ...(ip === undefined ? {} : { ip }),
    ...(credentialExec === undefined ? {} : { credentialExec }),
    ...(metricsTls === undefined ? {} : { metricsTls }),
  });
  const workload = workloadOf({
    clusterEnv: kept,
    sidecarEnv: parseEnv(sidecarEnv, paths.sidecarEnv),
    proxyConfig: bundle.proxyConfig,
    machine: { hostname: host.net.hostname(), addresses: host.net.addresses() },
  });
  // Before anything is changed; sshd's ports are read when the rules are planned, and judged again.
  const scope = policyScope(workload, host.net);
  checkScope({ ...scope, senders: await sendersOf(host, workload) });
  checkFailurePolicy({ ...scope, sshPorts: [] });
  return {
    workload,
    refused,
    files: [
      { path: paths.clusterEnv, content: clusterEnv },
      { path: paths.sidecarEnv, content: sidecarEnv },
      { path: paths.meshConfig, content: renderMeshConfig(bundle.proxyConfig) },
      { path: paths.rootCert, content: bundle.rootCert },
    ],
  };
}

/** What the rules would do to what runs here; undefined if that cannot be read. */
async function liveEffects(host: Host, workload: Workload, owners: Owners): Promise<Preview | undefined> {
  try {
    return preview(await planFor(host, workload, owners), await readLive(host));
  } catch (thrown) {
    if (!(thrown instanceof VmmeshError) || thrown.code !== "RULES_PRIVILEGE") throw thrown;
    say("note: as root, --dry-run also says which connections of this machine would change or break");
    return undefined;
  }
}

function tellFacts(workload: Workload, envoy: string, bundle: Bundle): void {
  const rows: [string, string][] = [
    ["identity", spiffeOf(workload)],
    ["address", workload.addresses[0] ?? ""],
    [
      "control plane",
      `${workload.discoveryAddress} at ${workload.istiodAddresses.join(", ") || "the address its name resolves to"}`,
    ],
    [
      "inbound",
      workload.inbound.kind === "all"
        ? "all ports"
        : workload.inbound.ports.join(", ") || "no port: the group declares none",
    ],
    [
      "mesh networks",
      workload.meshCidrs.join(", ") || "unknown: give --mesh-cidr to have the fence protect them",
    ],
    ["Envoy", envoy],
    ["token", bundle.token === undefined ? "none in the bundle" : "in the bundle"],
    ...(workload.credentialExec === undefined
      ? []
      : [["credential", `${workload.credentialExec} prints a token when it is needed`] as [string, string]]),
  ];
  for (const [name, value] of rows) say(`  ${name.padEnd(14)}${value}`);
}

/** A step as JSON for people's programs: a token is no business of theirs. */
function withoutContent(step: Step): object {
  if (step.do !== "write-file") return step;
  const { content, ...rest } = step;
  return { ...rest, bytes: content.length };
}
