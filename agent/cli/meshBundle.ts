import { VmmeshError } from "../core/errors.ts";
import { type MadeBundle, makeBundle, readMesh } from "../kube/bundle.ts";
import { KubeClient, type KubeObject } from "../kube/client.ts";
import { parseLabels } from "../kube/labels.ts";
import { type Choice, ensureMeshObjects, type MeshDeed } from "../kube/meshObjects.ts";
import { parsePorts } from "../kube/ports.ts";
import type { Bundle } from "../mesh/types.ts";
import type { Options } from "./commands.ts";
import { type Context, list, number, say, text } from "./context.ts";
import { kubeAccess } from "./kubeAccess.ts";

export interface FromCluster {
  /** Without a token when it was only a rehearsal. */
  readonly bundle: Bundle & Partial<Pick<MadeBundle, "tokenExpires">>;
  readonly choices: readonly Choice[];
  readonly deeds: readonly MeshDeed[];
}

/**
 * What the Kubernetes API gives: objects made where they are missing, and a bundle. The kubeconfig is read, used, and
 * not kept.
 *
 * @param rehearse makes nothing and mints no token
 * @throws {VmmeshError} USAGE, PORT_WITHOUT_PROTOCOL, KUBECONFIG_*, KUBE_*
 */
export async function bundleFromCluster(
  { host }: Context,
  options: Options,
  given: {
    readonly hostname: string;
    readonly ip: string | undefined;
    readonly rehearse: boolean;
    /** Name of a Secret to make: the token dies with it. */
    readonly bindTokenTo?: string;
  },
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
  const labels = parseLabels(list(options, "labels"));
  const access = await kubeAccess(host, options);
  say(`kubeconfig: ${access.source}, used now and not kept`);

  await using client = new KubeClient(access);
  const request = {
    namespace,
    hostname: given.hostname,
    ports: parsedPorts,
    labels,
    ...optional("workloadGroup", "workload-group"),
    ...optional("serviceAccount", "service-account"),
    ...optional("service", "service"),
    ...optional("network", "network"),
  };
  const readRequest = (group: KubeObject) => ({
    group,
    labels,
    ...optional("network", "network"),
    ...optional("revision", "revision"),
    ...optional("clusterId", "cluster-id"),
    ...optional("istiodAddress", "istiod-address"),
    ...(given.ip === undefined ? {} : { internalIp: given.ip }),
  });
  // Everything is read and judged before anything is made: a missing right leaves the cluster as it was.
  const planned = await ensureMeshObjects(client, request, { rehearse: true });
  const mesh = await readMesh(client, readRequest(planned.group));
  if (given.rehearse) {
    return { bundle: mesh, choices: [...planned.choices, ...mesh.choices], deeds: planned.deeds };
  }
  const { group, deeds } = await ensureMeshObjects(client, request);
  const bundle = await makeBundle(client, {
    ...readRequest(group),
    tokenSeconds: number(options, "token-duration"),
    ...(given.bindTokenTo === undefined ? {} : { bindTokenTo: given.bindTokenTo }),
  });
  return { bundle, choices: [...planned.choices, ...bundle.choices], deeds };
}

/** What was chosen and why, and what was made: one line each. */
export function tellOutcome({ choices, deeds }: Pick<FromCluster, "choices" | "deeds">): void {
  const width = Math.max(0, ...choices.map(({ name }) => name.length));
  for (const { name, value, why } of choices) say(`  ${name.padEnd(width)}  ${value}  (${why})`);
  for (const { did, what } of deeds) say(`  ${did === "missing" ? "would be made" : did}: ${what}`);
}
