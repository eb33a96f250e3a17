import { uniformFrom } from "../core/backoff.ts";
import { messageOf, type VmmeshError } from "../core/errors.ts";
import { type Paths, PORTS, RESOLV_CONF } from "../core/paths.ts";
import { aborted, Latest } from "../core/signals.ts";
import { inSlices } from "../core/slices.ts";
import { supervise } from "../core/supervise.ts";
import { SECOND_MS } from "../core/time.ts";
import { VERSION } from "../core/version.ts";
import { RESOLVED_STUB, readResolvConf } from "../dns/resolvConf.ts";
import { ROUTE_DOMAIN, routedDomains } from "../dns/routed.ts";
import { leaseBeat, serveDns } from "../dns/server.ts";
import { type DnsTable, tableInSteps } from "../dns/table.ts";
import { Upstreams } from "../dns/upstream.ts";
import { EnvoyAdmin } from "../envoy/admin.ts";
import { LEASE, renderBootstrap } from "../envoy/bootstrap.ts";
import { Conditions } from "../health/conditions.ts";
import { Gates } from "../health/gates.ts";
import { type Health, runProbe } from "../health/probes.ts";
import { chooseCredential, readTokenFile } from "../identity/credentials.ts";
import { targetOf } from "../identity/enroll.ts";
import { type IdentityStatus, keepIdentity } from "../identity/keep.ts";
import type { Svid } from "../identity/svid.ts";
import { nodeOf } from "../mesh/node.ts";
import type { Host } from "../platform/host.ts";
import type { Owners } from "../platform/users.ts";
import { serveSds } from "../sds/serve.ts";
import { ACCESS_LOG_SERVICE, countAccessLog } from "../telemetry/accessLog.ts";
import { serveAdmin } from "../telemetry/admin.ts";
import { istioWorkload } from "../telemetry/istioLabels.ts";
import { IstioStats } from "../telemetry/istioStats.ts";
import type { Logger } from "../telemetry/log.ts";
import { createMetrics } from "../telemetry/metrics.ts";
import { Notifier } from "../telemetry/notify.ts";
import { parseAppTargets, serveScrape } from "../telemetry/scrape.ts";
import type { StatusSnapshot } from "../telemetry/status.ts";
import { TlsDoor } from "../telemetry/tls.ts";
import { LastGoodFile } from "../xds/lastGood.ts";
import { AdsRelay } from "../xds/relay.ts";
import { captureWords } from "./capture.ts";
import { readCaptureState } from "./captureState.ts";
import { metricsPair } from "./metricsTls.ts";
import { RelayNews, shortType } from "./relayNews.ts";
import { tellResolved } from "./tellResolved.ts";
import { watchRules } from "./watchRules.ts";
import { istiodTarget, readWorkload, spiffeOf } from "./workloadFiles.ts";

const PROXY_DOMAIN = "svc.cluster.local";
/** How often Envoy is asked whether it is ready: often while it is not, so that a start is not a poll longer than it is. */
const ENVOY_LOOK_MS = { ready: SECOND_MS, waiting: 100 };

export interface AgentDeps {
  readonly host: Host;
  readonly paths: Paths;
  readonly owners: Owners;
  readonly log: Logger;
  readonly env: Readonly<Record<string, string | undefined>>;
}

/**
 * The agent: wires the rooms, then runs their tasks until `signal` aborts. It holds no privilege and needs no control
 * plane to start; what is missing is a condition, shown by `vmmesh status`.
 *
 * @throws {VmmeshError} NOT_JOINED, ENV_FILE_MALFORMED, CONFIG_MALFORMED; the error of a socket that cannot be bound
 */
export async function runAgent(deps: AgentDeps, signal: AbortSignal): Promise<void> {
  const { host, paths, owners, log } = deps;
  const startedAt = host.clock.now();
  const startedMs = host.clock.monotonicMs();
  const workload = await readWorkload(host, paths);
  const spiffe = spiffeOf(workload);
  const ipv6 = host.net.addresses().some(({ family }) => family === 6);

  const metrics = createMetrics(host, { version: VERSION });
  const conditions = new Conditions(host.clock.now, (condition, raised) => {
    metrics.conditions.set({ id: condition.id, severity: condition.severity }, raised ? 1 : 0);
    const say = condition.severity === "error" ? log.error.bind(log) : log.warning.bind(log);
    if (raised) say(condition.message, { condition: condition.id, next: condition.next });
    else log.info(`over: ${condition.message}`, { condition: condition.id });
  });
  const gates = new Gates();
  const svids = new Latest<Svid>();
  const dnsTable = new Latest<DnsTable>();
  const envoyAdmin = new EnvoyAdmin(host.net, paths.envoyAdminSocket);
  const notifier = new Notifier(host, deps.env, (cause) =>
    log.debug(`systemd does not listen: ${messageOf(cause)}`),
  );

  // ——— what Envoy starts with
  const stats = (workload.proxyConfig["proxyStatsMatcher"] ?? {}) as Record<
    string,
    readonly string[] | undefined
  >;
  const bootstrap = renderBootstrap({
    node: nodeOf(workload),
    adminSocket: paths.envoyAdminSocket,
    xdsSocket: paths.xdsSocket,
    sdsSocket: paths.sdsSocket,
    adminSocketMode: 0o660,
    ipv6,
    lease: true,
    stats: {
      prefixes: stats["inclusionPrefixes"] ?? [],
      suffixes: stats["inclusionSuffixes"] ?? [],
      regexps: stats["inclusionRegexps"] ?? [],
    },
  });
  await host.files.writeAtomic(paths.bootstrap, `${JSON.stringify(bootstrap, null, 1)}\n`, { mode: 0o640 });

  // ——— identity
  let identity: IdentityStatus | undefined;
  const roots = async (): Promise<string> =>
    `${(await host.files.readText(paths.rootCert)) ?? ""}\n${svids.value?.roots ?? ""}`;
  const ca = async () => istiodTarget(host, workload, await roots());

  // ——— configuration
  const news = new RelayNews({ clock: host.clock, metrics, conditions, log });
  const istioStats = new IstioStats({
    own: istioWorkload(
      {
        workload: workload.workloadName,
        namespace: workload.namespace,
        cluster: workload.clusterId,
      },
      workload.labels,
    ),
    ownPrincipal: spiffe,
    ownProbes: [LEASE.address, LEASE.address6],
    since: startedAt,
    workloadAt: (address) => relay.workloadAt(address),
    onDropped: () => metrics.istioStatsDropped.inc(),
  });
  const relay = new AdsRelay({
    host,
    alsoServed: { [ACCESS_LOG_SERVICE]: (stream) => countAccessLog(stream, istioStats) },
    listen: (onConnection) =>
      host.net.listenUnix(paths.xdsSocket, { mode: 0o660, owner: ownGroup() }, onConnection),
    async upstreams() {
      const target = await ca();
      const token = await readTokenFile(host.files, paths.token);
      const credential = chooseCredential(svids.value, token, target.rootCert, host.clock.now());
      return target.addresses.map((address) => targetOf(target, address, credential));
    },
    ...(workload.dnsCapture
      ? {
          onNameTable: async (table) => {
            const steps = tableInSteps(table, {
              proxyDomain: PROXY_DOMAIN,
              namespace: workload.namespace,
            });
            const built = await inSlices(steps, host.clock);
            metrics.dnsNames.set(built.names.size);
            dnsTable.set(built);
          },
        }
      : {}),
    inboundPorts:
      workload.inbound.kind === "ports" ? workload.inbound.ports : workload.ports.map(({ port }) => port),
    lastGood: new LastGoodFile({
      host,
      path: paths.lastGood,
      owner: {
        spiffe,
        node: `${workload.instanceName}.${workload.namespace}`,
        cluster: workload.clusterId,
        discovery: workload.discoveryAddress,
      },
      notAfter: () => svids.value?.notAfter,
    }),
    onEvent: (event) => news.take(event),
  });

  // ——— names
  const upstreams = new Upstreams({
    host,
    resolvConf: RESOLV_CONF,
    onAttempt: ({ server, ok, durationMs }) => {
      metrics.dnsUpstreamHealthy.set({ server }, ok ? 1 : 0);
      metrics.dnsUpstreamAttempts.inc({ server, result: ok ? "answered" : "failed" });
      metrics.dnsUpstreamDuration.observe(durationMs / SECOND_MS);
    },
    onGone: (server) => {
      metrics.dnsUpstreamHealthy.remove({ server });
      for (const result of ["answered", "failed"]) metrics.dnsUpstreamAttempts.remove({ server, result });
    },
  });

  // ——— health
  let health: { readonly state: Health; readonly since: Date } | undefined;
  let leaving = false;
  const report = (state: Health): void => {
    if (leaving) return;
    health = { state, since: host.clock.now() };
    relay.setHealth(state);
    log.info(state.healthy ? "the application is healthy" : `the application is unhealthy: ${state.message}`);
  };

  // ——— readiness
  let envoyWaits: string | undefined = "Envoy has not been asked yet";
  const waitingFor = (): string[] => [
    ...gates.waitingFor,
    ...(svids.value === undefined ? ["the certificate"] : []),
    ...(envoyWaits === undefined ? [] : [envoyWaits]),
    ...(workload.dnsCapture && dnsTable.value === undefined ? ["the mesh's names"] : []),
  ];
  const ownGroup = () => ({ uid: owners.agent.uid, gid: owners.agent.gid });

  const snapshot = async (): Promise<StatusSnapshot> => {
    const { connectedTo, since, staleSince, types } = relay.status();
    const capture = await readCaptureState(host.files, paths);
    const when = (date: Date | undefined) => date?.toISOString();
    const connectedSince = when(connectedTo === undefined ? news.lostAt : since);
    const nextRenewal = when(identity?.nextRenewal);
    return {
      version: VERSION,
      startedAt: startedAt.toISOString(),
      waitingFor: waitingFor(),
      identity:
        svids.value === undefined
          ? undefined
          : {
              spiffe: svids.value.spiffe,
              notAfter: svids.value.notAfter.toISOString(),
              nextCredential: identity?.nextCredential ?? "certificate",
              ...(nextRenewal === undefined ? {} : { nextRenewal }),
              ...(identity?.lastError === undefined ? {} : { lastError: identity.lastError }),
            },
      controlPlane: {
        name: workload.discoveryAddress,
        resources: Object.fromEntries(types.map(({ typeUrl, resources }) => [shortType(typeUrl), resources])),
        ...(connectedTo === undefined ? {} : { address: connectedTo }),
        ...(connectedSince === undefined ? {} : { since: connectedSince }),
        ...(news.lastRejection === undefined ? {} : { lastRejection: news.lastRejection }),
        ...(staleSince === undefined ? {} : { staleSince: staleSince.toISOString() }),
      },
      envoy: { state: envoyWaits ?? "ready" },
      capture: {
        ...captureWords(workload),
        inForce: capture.inForce,
        repairs: capture.repairs,
        ...(capture.backend === undefined ? {} : { backend: capture.backend }),
        ...(capture.counts === undefined ? {} : { counts: capture.counts }),
      },
      dns: {
        captured: workload.dnsCapture && capture.inForce,
        names: dnsTable.value?.names.size ?? 0,
        upstreams: upstreams.health(),
      },
      registration: {
        ...(workload.workloadGroup === undefined
          ? {}
          : { group: `${workload.namespace}/${workload.workloadGroup}` }),
        ...(workload.addresses[0] === undefined ? {} : { address: workload.addresses[0] }),
        listed: relay.knowsEndpoint(workload.addresses[0] ?? ""),
      },
      health:
        workload.probe === undefined
          ? undefined
          : health === undefined
            ? { state: "unknown" }
            : {
                state: health.state.healthy ? "healthy" : "unhealthy",
                since: health.since.toISOString(),
                ...(health.state.healthy ? {} : { message: health.state.message }),
              },
      conditions: conditions
        .list()
        .map((condition) => ({ ...condition, since: condition.since.toISOString() })),
    };
  };

  const { probe, metricsTls } = workload;
  const metricsDoor =
    metricsTls === undefined
      ? undefined
      : new TlsDoor(
          () => metricsPair(host.files, metricsTls, svids.value),
          (trouble) => {
            if (trouble === undefined) conditions.clear("metrics-certificate");
            else
              conditions.raise(
                "metrics-certificate",
                "warning",
                `the metrics port has no new certificate: ${messageOf(trouble)}`,
                "Put both files there, readable by user vmmesh; they are read at each connection.",
              );
          },
        );
  const gate = Object.fromEntries(
    ["sds", "xds", "dns", "scrape", "admin"].map((name) => [name, gates.block(name)]),
  );
  const release = (name: string) => () => gate[name]?.release();

  const tasks = supervise(
    [
      {
        name: "identity",
        onFailure: "restart",
        run: (scope) =>
          keepIdentity(
            {
              host,
              ca,
              spiffe,
              ttlMs: workload.certificateTtlMs,
              keyKind: workload.keyKind,
              folder: paths.identity,
              tokenFile: paths.token,
              credentialExec: workload.credentialExec,
              conditions,
              isRefused: () => news.identityRefused,
              reached: () => news.reached,
              onRenewed: (svid, by) => {
                metrics.certRenewals.inc({ result: "success" });
                const not_after = svid.notAfter.toISOString();
                log.info("new certificate", { serial: svid.serial, not_after, by });
              },
              onFailed: () => metrics.certRenewals.inc({ result: "failure" }),
              onStatus: (status) => {
                identity = status;
              },
            },
            svids,
            scope,
          ),
      },
      {
        name: "sds",
        onFailure: "stop-all",
        run: (scope) =>
          serveSds(
            {
              listen: (onConnection) =>
                host.net.listenUnix(paths.sdsSocket, { mode: 0o660, owner: ownGroup() }, onConnection),
              onListening: release("sds"),
              onRejected: (name, reason) => log.error(`Envoy refused the secret ${name}: ${reason}`),
            },
            svids,
            scope,
          ),
      },
      {
        name: "xds",
        onFailure: "stop-all",
        run: (scope) => {
          svids.subscribe(() => relay.retryNow(), scope);
          return relay.run(scope, release("xds"));
        },
      },
      {
        name: "dns",
        onFailure: "restart",
        run: (scope) =>
          serveDns(
            {
              host,
              port: PORTS.dns,
              table: dnsTable,
              upstreams,
              onListening: release("dns"),
              onQuery: ({ outcome }) => {
                metrics.dnsRequests.inc();
                if (outcome === "forwarded" || outcome === "failed") metrics.dnsUpstreamRequests.inc();
                if (outcome === "failed") metrics.dnsUpstreamFailures.inc();
              },
            },
            scope,
          ),
      },
      ...["127.0.0.1", ...(ipv6 ? ["::1"] : [])].map((address) => ({
        name: `dns-lease ${address}`,
        onFailure: "restart" as const,
        run: (scope: AbortSignal) =>
          leaseBeat(
            {
              host,
              port: PORTS.dns,
              address,
              onBeat: (answered) => void (answered || metrics.dnsLeaseMisses.inc()),
            },
            scope,
          ),
      })),
      ...(workload.dnsCapture
        ? [
            {
              name: "resolved",
              onFailure: "restart" as const,
              run: (scope: AbortSignal) =>
                tellResolved(
                  {
                    host,
                    socket: paths.resolvedSocket,
                    conditions,
                    applies: async () =>
                      (await host.files.stat(paths.resolvedSocket)) !== undefined &&
                      readResolvConf((await host.files.readText(RESOLV_CONF)) ?? "").servers.includes(
                        RESOLVED_STUB,
                      ),
                    domains: () => [
                      ...routedDomains(dnsTable.value, PROXY_DOMAIN, workload.namespace),
                      ROUTE_DOMAIN,
                    ],
                    onRoutes: (domains) => upstreams.routesAre(domains),
                    routed: (signal) => upstreams.isRouted(signal),
                  },
                  scope,
                ),
            },
          ]
        : []),
      {
        name: "envoy-watch",
        onFailure: "restart",
        run: async (scope) => {
          while (!scope.aborted) {
            const readiness = await envoyAdmin.readiness(scope);
            const was = envoyWaits;
            envoyWaits = readiness.ready ? undefined : readiness.reason;
            if (readiness.ready && was !== undefined) {
              log.info("Envoy is ready");
              metrics.startupDuration.set((host.clock.monotonicMs() - startedMs) / SECOND_MS);
              // Envoy came (back): whatever happened to the rules meanwhile is put right by the one who may.
              await host.files.touch(paths.repairRequest);
            }
            await host.clock
              .sleep(readiness.ready ? ENVOY_LOOK_MS.ready : ENVOY_LOOK_MS.waiting, scope)
              .catch(() => undefined);
          }
        },
      },
      ...(probe === undefined
        ? []
        : [
            {
              name: "health",
              onFailure: "restart" as const,
              run: (scope: AbortSignal) =>
                runProbe(
                  { host, envoyReady: async () => envoyWaits, conditions },
                  probe,
                  workload.probeHost,
                  report,
                  scope,
                ),
            },
          ]),
      {
        name: "scrape",
        onFailure: "restart",
        run: (scope) =>
          serveScrape(
            {
              host,
              port: PORTS.status,
              agentMetrics: async () => {
                if (svids.value !== undefined) {
                  const left = (svids.value.notAfter.getTime() - host.clock.now().getTime()) / SECOND_MS;
                  metrics.certExpirySeconds.set({ resource_name: "default" }, left);
                }
                for (const { typeUrl, resources } of relay.status().types)
                  metrics.xdsResources.set({ type: shortType(typeUrl) }, resources);
                const { inForce, counts } = await readCaptureState(host.files, paths);
                metrics.captureInForce.set(inForce ? 1 : 0);
                for (const direction of ["inbound", "outbound"] as const)
                  for (const what of ["refused", "bypassed"] as const)
                    metrics.fenceConnections.set({ direction, what }, counts?.[what][direction] ?? 0);
                return `${await metrics.render()}${istioStats.render()}`;
              },
              tls: metricsDoor,
              envoyAdminSocket: paths.envoyAdminSocket,
              app: parseAppTargets(workload.appMetrics),
              waitingFor,
              onScrape: () => metrics.scrapes.inc(),
              onFailure: (part) => metrics.scrapeFailures.inc({ type: part }),
              onListening: release("scrape"),
            },
            scope,
          ),
      },
      {
        name: "admin",
        onFailure: "restart",
        run: (scope) =>
          serveAdmin(
            {
              clock: host.clock,
              listen: (onConnection) => host.net.listenUnix(paths.adminSocket, { mode: 0o600 }, onConnection),
              onListening: release("admin"),
              handlers: {
                status: snapshot,
                async unhealthy(reason) {
                  leaving = true;
                  // Without a probe the mesh takes no word on health: the entry goes when the stream ends.
                  if (probe === undefined) relay.withdraw();
                  else {
                    health = { state: { healthy: false, message: reason }, since: host.clock.now() };
                    relay.setHealth(health.state);
                  }
                  log.info(`leaving the endpoints: ${reason}`);
                },
                async drain() {
                  await envoyAdmin.drainInbound();
                },
              },
            },
            scope,
          ),
      },
      {
        name: "rules",
        onFailure: "restart",
        run: (scope) =>
          watchRules(
            {
              host,
              paths,
              conditions,
              log: log.child("rules"),
              onRepaired: (by) => metrics.captureRepairs.inc({ by }),
            },
            scope,
          ),
      },
      { name: "watchdog", onFailure: "restart", run: (scope) => keepAlive(notifier, scope) },
    ],
    {
      sleep: (ms, scope) => host.clock.sleep(ms, scope),
      random: uniformFrom(host.random),
      onRestart: (task, cause, waitMs) => {
        metrics.taskRestarts.inc({ task });
        log.child(task).error(`failed, starts again: ${messageOf(cause)}`, {
          in_ms: Math.round(waitMs),
          code: codeOf(cause),
        });
      },
    },
    signal,
  );
  void gates.ready().then(async () => {
    log.info("ready", { spiffe, version: VERSION });
    await notifier.tell({ ready: true, status: spiffe });
  });
  await tasks;
  await notifier.tell({ stopping: true });
}

/** Without a watchdog there is nothing to do, and a task that ends counts as failed. */
async function keepAlive(notifier: Notifier, signal: AbortSignal): Promise<void> {
  await notifier.keepAlive(() => true, signal);
  await aborted(signal);
}

function codeOf(thrown: unknown): string | undefined {
  return (thrown as Partial<VmmeshError>).code;
}
