import { VmmeshError } from "../core/errors.ts";
import { type MadeBundle, makeBundle } from "../kube/bundle.ts";
import { KubeClient } from "../kube/client.ts";
import { loadKubeconfig } from "../kube/kubeconfig.ts";
import { type Choice, ensureMeshObjects, type MeshDeed } from "../kube/meshObjects.ts";
import { parsePorts } from "../kube/ports.ts";
import type { Options } from "./commands.ts";
import { type Context, list, number, say, text } from "./context.ts";

export interface FromCluster {
  readonly bundle: MadeBundle | undefined;
  readonly choices: readonly Choice[];
  readonly deeds: readonly MeshDeed[];
}

/**
 * What the Kubernetes API gives: objects made where they are missing, and a bundle. The kubeconfig is read, used, and
 * not kept.
 *
 * @param rehearse makes nothing; then there may be no bundle yet
 * @throws {VmmeshError} USAGE, PORT_WITHOUT_PROTOCOL, KUBECONFIG_*, KUBE_*
 */
export async function bundleFromCluster(
  { host }: Context,
  options: Options,
  given: { readonly hostname: string; readonly ip: string | undefined; readonly rehearse: boolean },
): Promise<FromCluster> {
  const namespace = text(options, "namespace");
  if (namespace === undefined) {
    throw new VmmeshError("USAGE", "with a kubeconfig the namespace must be given", {
      next: "Add --namespace N, or join with --bundle DIR.",
    });
  }
  const optional = <K extends string>(key: K, name: string): { [P in K]?: string } => {
    const value = text(options, name);
    return (value === undefined ? {} : { [key]: value }) as { [P in K]?: string };
  };
  const parsedPorts = parsePorts(list(options, "port"));
  const labels = Object.fromEntries(list(options, "labels").map(labelOf));
  const access = await loadKubeconfig(host, {
    ...optional("path", "kubeconfig"),
    ...optional("context", "context"),
    env: process.env,
    home: process.env["HOME"] ?? "/root",
    uid: process.getuid?.() ?? 0,
  });
  say(`kubeconfig: ${access.source}, used now and not kept`);
  for (const warning of access.warnings) say(`warning: ${warning}`);

  await using client = new KubeClient(access);
  const outcome = await ensureMeshObjects(
    client,
    {
      namespace,
      hostname: given.hostname,
      ports: parsedPorts,
      labels,
      ...optional("workloadGroup", "workload-group"),
      ...optional("serviceAccount", "service-account"),
      ...optional("service", "service"),
      ...optional("network", "network"),
    },
    { rehearse: given.rehearse },
  );
  if (given.rehearse && outcome.deeds.some(({ did }) => did === "missing")) {
    return { bundle: undefined, choices: outcome.choices, deeds: outcome.deeds };
  }
  const bundle = await makeBundle(client, {
    group: outcome.group,
    labels,
    tokenSeconds: number(options, "token-duration"),
    ...optional("network", "network"),
    ...optional("revision", "revision"),
    ...optional("clusterId", "cluster-id"),
    ...optional("istiodAddress", "istiod-address"),
    ...(given.ip === undefined ? {} : { internalIp: given.ip }),
  });
  return { bundle, choices: [...outcome.choices, ...bundle.choices], deeds: outcome.deeds };
}

function labelOf(item: string): readonly [string, string] {
  const at = item.indexOf("=");
  if (at > 0) return [item.slice(0, at), item.slice(at + 1)];
  throw new VmmeshError("USAGE", `--labels: \`${item}\` is not KEY=VALUE`, {
    next: "Write --labels app=details,version=v1.",
  });
}

/** What was chosen and why, and what was made: one line each. */
export function tellOutcome({ choices, deeds }: Pick<FromCluster, "choices" | "deeds">): void {
  const width = Math.max(0, ...choices.map(({ name }) => name.length));
  for (const { name, value, why } of choices) say(`  ${name.padEnd(width)}  ${value}  (${why})`);
  for (const { did, what } of deeds) say(`  ${did === "missing" ? "would be made" : did}: ${what}`);
}
