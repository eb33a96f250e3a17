import { VmmeshError } from "../core/errors.ts";
import { type Fields, fieldsOf, textMapOf, textOf } from "../mesh/yaml.ts";
import { apiVersionOf, type KubeClient, type KubeObject, path } from "./client.ts";
import { protocolOfName, type ServedPort } from "./ports.ts";

/** A name or number that was given or found, and why it is this one: all of them are printed. */
export interface Choice {
  readonly name: string;
  readonly value: string;
  readonly why: string;
}

export interface MeshRequest {
  readonly namespace: string;
  /** Of the machine; the names that are not given are made from it. */
  readonly hostname: string;
  readonly workloadGroup?: string;
  readonly serviceAccount?: string;
  readonly service?: string;
  readonly ports: readonly ServedPort[];
  readonly labels: Readonly<Record<string, string>>;
  readonly network?: string;
  /** `spec.probe` for a group that is made. */
  readonly probe?: Fields;
}

/** What the cluster has already. */
export interface MeshSurvey {
  readonly group: KubeObject | undefined;
}

export interface MeshPlan {
  readonly namespace: string;
  /** As it is in the cluster, or as it will be made. */
  readonly group: KubeObject;
  readonly serviceAccount: string;
  /** In the order they are made. What of them exists is kept as it is. */
  readonly objects: readonly KubeObject[];
  readonly choices: readonly Choice[];
}

const APP = "app";
const GIVEN = "as given";
const DNS_LABEL_MOST = 63;

/**
 * The group that a machine registers under, before the cluster is asked.
 * @throws {VmmeshError} USAGE if it cannot be an object's name
 */
export function groupNameOf(request: Pick<MeshRequest, "workloadGroup" | "hostname">): Choice {
  if (request.workloadGroup !== undefined) {
    return {
      name: "workload group",
      value: checkedName(request.workloadGroup, "--workload-group"),
      why: GIVEN,
    };
  }
  return { name: "workload group", value: dnsLabel(request.hostname), why: "this machine's host name" };
}

/** A host name as an object's name: its first label, lower case, everything else a dash (RFC 1123). */
export function dnsLabel(hostname: string): string {
  const [first = ""] = hostname.toLowerCase().split(".", 1);
  const label = first
    .replace(/[^a-z0-9-]/g, "-")
    .slice(0, DNS_LABEL_MOST)
    .replace(/^-+|-+$/g, "");
  return label === "" ? "vm" : label;
}

/**
 * The objects that let this machine join and be called: ServiceAccount, WorkloadGroup and, if it serves ports, a Service
 * with ports that carry their protocol. Pure; what already exists is judged by `ensureMeshObjects`.
 *
 * The namespace is never made: a namespace comes with policies, quotas and an owner, and a typo would make a new one.
 *
 * @throws {VmmeshError} USAGE, KUBE_CONFLICT if the existing group contradicts the request
 */
export function planMeshObjects(request: MeshRequest, survey: MeshSurvey): MeshPlan {
  const { namespace } = request;
  checkedName(namespace, "--namespace");
  const groupName = groupNameOf(request);
  if (survey.group !== undefined) checkGroup(survey.group, request);
  const account = serviceAccountOf(request, survey.group, groupName.value);
  const group = survey.group ?? newGroup(request, groupName.value, account.value);
  const labels = { ...groupLabels(group), ...request.labels };
  const app = appOf(survey.group, labels, groupName.value);
  const ports = request.ports.length > 0 ? request.ports : portsOf(group);
  const service = serviceOf(request, labels, app.value, ports);
  return {
    namespace,
    group,
    serviceAccount: account.value,
    objects: [
      { apiVersion: "v1", kind: "ServiceAccount", metadata: { name: account.value, namespace } },
      group,
      ...(service.object === undefined ? [] : [service.object]),
    ],
    choices: [
      { name: "namespace", value: namespace, why: GIVEN },
      groupName,
      account,
      app,
      portsChoice(request, survey.group, ports),
      service.choice,
    ],
  };
}

function serviceOf(
  request: MeshRequest,
  labels: Readonly<Record<string, string>>,
  app: string,
  ports: readonly ServedPort[],
): { readonly object?: KubeObject; readonly choice: Choice } {
  const wished = request.service;
  if (wished === undefined && request.ports.length === 0) {
    return { choice: { name: "service", value: "none", why: "neither --service nor --port was given" } };
  }
  if (ports.length === 0) {
    throw new VmmeshError(
      "USAGE",
      `--service ${wished ?? ""} has no ports: neither --port was given nor has the group any`,
      {
        next: "Say what it serves, e.g. `--port http:9080`.",
      },
    );
  }
  const name = wished === undefined ? checkedName(app, "the label app") : checkedName(wished, "--service");
  const why = wished === undefined ? "the app's name, because ports were given" : GIVEN;
  return {
    object: newService(name, request.namespace, labels, app, ports),
    choice: { name: "service", value: name, why },
  };
}

function serviceAccountOf(request: MeshRequest, group: KubeObject | undefined, groupName: string): Choice {
  const name = "service account";
  if (request.serviceAccount !== undefined) {
    return { name, value: checkedName(request.serviceAccount, "--service-account"), why: GIVEN };
  }
  const known = group === undefined ? undefined : templateAccount(group);
  return known === undefined
    ? { name, value: groupName, why: "the group's name" }
    : { name, value: known, why: "that of the workload group" };
}

function appOf(
  existing: KubeObject | undefined,
  labels: Readonly<Record<string, string>>,
  groupName: string,
): Choice {
  const known = labels[APP];
  if (known === undefined)
    return { name: "app", value: groupName, why: "the group's name (the group has no label app)" };
  return {
    name: "app",
    value: known,
    why: existing === undefined ? "the group's name, or --labels app=" : "label of the workload group",
  };
}

function portsChoice(
  request: MeshRequest,
  group: KubeObject | undefined,
  ports: readonly ServedPort[],
): Choice {
  const value = ports.map(({ protocol, port }) => `${protocol}:${port}`).join(", ");
  if (request.ports.length > 0) return { name: "ports", value, why: GIVEN };
  if (ports.length > 0) return { name: "ports", value, why: "those of the workload group" };
  return {
    name: "ports",
    value: "all inbound",
    why:
      group === undefined ? "no --port was given" : "no --port was given, and the workload group names none",
  };
}

function newGroup(request: MeshRequest, name: string, serviceAccount: string): KubeObject {
  return {
    apiVersion: apiVersionOf("WorkloadGroup"),
    kind: "WorkloadGroup",
    metadata: { name, namespace: request.namespace },
    spec: {
      metadata: { labels: { [APP]: name, ...request.labels } },
      template: {
        // Without it peers would send this machine plain text (chapter 8.5 of Istio's VM protocol).
        serviceAccount,
        ...(request.ports.length === 0
          ? {}
          : { ports: Object.fromEntries(request.ports.map((port) => [port.name, port.port])) }),
        ...(request.network === undefined ? {} : { network: request.network }),
      },
      ...(request.probe === undefined ? {} : { probe: request.probe }),
    },
  };
}

function newService(
  name: string,
  namespace: string,
  labels: Readonly<Record<string, string>>,
  app: string,
  ports: readonly ServedPort[],
): KubeObject {
  return {
    apiVersion: "v1",
    kind: "Service",
    metadata: { name, namespace, labels: { [APP]: app } },
    spec: {
      selector: labels[APP] === undefined ? labels : { [APP]: app },
      ports: ports.map((port) => ({
        name: port.name,
        port: port.port,
        targetPort: port.port,
        protocol: "TCP",
        appProtocol: port.protocol,
      })),
    },
  };
}

/** Labels that a WorkloadEntry of the group gets: those of its metadata over those of its template. */
export function groupLabels(group: KubeObject): Record<string, string> {
  const template = fieldsOf(group.spec?.["template"]);
  const metadata = fieldsOf(group.spec?.["metadata"]);
  return { ...textMapOf(template["labels"]), ...textMapOf(metadata["labels"]) };
}

function templateAccount(group: KubeObject): string | undefined {
  return textOf(fieldsOf(group.spec?.["template"])["serviceAccount"]) || undefined;
}

/** Ports of the group whose name carries a protocol; others cannot be told to a Service. */
function portsOf(group: KubeObject): ServedPort[] {
  const ports = Object.entries(fieldsOf(fieldsOf(group.spec?.["template"])["ports"]));
  return ports.flatMap(([name, port]) => {
    const protocol = protocolOfName(name);
    return protocol === undefined || typeof port !== "number" ? [] : [{ name, port, protocol }];
  });
}

/** What an existing group must have to be used as it is. Labels and network may differ: a machine brings its own. */
function checkGroup(group: KubeObject, request: MeshRequest): void {
  const account = templateAccount(group);
  const wished = request.serviceAccount ?? account;
  if (account === undefined) {
    throw conflict(group, "has no service account, so peers would send plain text to this machine", {
      spec: { template: { serviceAccount: wished ?? group.metadata.name } },
    });
  }
  if (wished !== account) {
    throw conflict(
      group,
      `has the service account \`${account}\`, not \`${wished}\`: istiod would refuse this machine`,
      undefined,
      `Leave --service-account out, or name another group with --workload-group.`,
    );
  }
  const known = Object.entries(fieldsOf(fieldsOf(group.spec?.["template"])["ports"]));
  // A group without ports stands for machines that serve on any.
  if (known.length === 0) return;
  for (const port of request.ports) {
    const [name] = known.find(([, number]) => number === port.port) ?? [];
    if (name === undefined) {
      throw conflict(group, `does not have port ${port.port}`, {
        spec: { template: { ports: { [port.name]: port.port } } },
      });
    }
    if (protocolOfName(name) !== port.protocol) {
      throw conflict(group, `has port ${port.port} as \`${name}\`, which is not ${port.protocol}`, {
        spec: { template: { ports: { [name]: null, [port.name]: port.port } } },
      });
    }
  }
}

/** What an existing Service must have, so that peers reach this machine by it. */
function checkService(
  existing: KubeObject,
  wished: KubeObject,
  labels: Readonly<Record<string, string>>,
): void {
  const selector = textMapOf(existing.spec?.["selector"]);
  const misses = Object.entries(selector).find(([key, value]) => labels[key] !== value);
  if (existing.spec?.["type"] === "ExternalName")
    throw conflict(existing, "is of type ExternalName", undefined, "Name another with --service.");
  if (Object.keys(selector).length === 0 || misses !== undefined) {
    const selects =
      Object.entries(selector)
        .map(([key, value]) => `${key}=${value}`)
        .join(",") || "nothing";
    throw conflict(
      existing,
      `selects ${selects}, which is not this machine`,
      undefined,
      "Name another with --service, or join a group with these labels.",
    );
  }
  const known = Array.isArray(existing.spec?.["ports"]) ? existing.spec["ports"].map(fieldsOf) : [];
  for (const port of (wished.spec?.["ports"] as Fields[]) ?? []) {
    const match = known.find((item) => item["port"] === port["port"]);
    const protocol =
      match === undefined
        ? undefined
        : (textOf(match["appProtocol"]) ?? protocolOfName(textOf(match["name"]) ?? ""));
    if (protocol !== port["appProtocol"]) {
      const has =
        match === undefined ? "does not have port" : `has, but not as ${String(port["appProtocol"])}, port`;
      throw conflict(
        existing,
        `${has} ${String(port["port"])}`,
        { spec: { ports: [port] } },
        undefined,
        "strategic",
      );
    }
  }
}

function conflict(
  object: KubeObject,
  what: string,
  patch: Fields | undefined,
  next?: string,
  type: "merge" | "strategic" = "merge",
): VmmeshError {
  const { name, namespace } = object.metadata;
  const command = `kubectl -n ${namespace} patch ${object.kind.toLowerCase()} ${name} --type ${type} -p '${JSON.stringify(patch)}'`;
  return new VmmeshError(
    "KUBE_CONFLICT",
    `${path({ kind: object.kind, name, ...(namespace === undefined ? {} : { namespace }) })} exists and ${what}`,
    {
      next:
        next ??
        `vmmesh never changes what it did not make. If it is meant to be so: \`${command}\`, then run the same command again.`,
    },
  );
}

/** What was done to one object; `missing`: it would be made, but this is a rehearsal. */
export interface MeshDeed {
  readonly did: "made" | "kept" | "missing";
  readonly what: string;
}

export interface MeshOutcome extends MeshPlan {
  readonly deeds: readonly MeshDeed[];
}

/**
 * Makes what is missing in the cluster and keeps what is there. Everything is read and judged first, so that a conflict
 * changes nothing. An object that exists is never written: one that does not fit is an error with the command that
 * would make it fit, because others may rely on it as it is.
 *
 * @param options.rehearse makes nothing and says what is missing
 * @throws {VmmeshError} KUBE_NOT_FOUND (namespace), KUBE_CONFLICT, KUBE_FORBIDDEN, KUBE_UNREACHABLE, KUBE_FAILED, USAGE
 */
export async function ensureMeshObjects(
  client: Pick<KubeClient, "find" | "create">,
  request: MeshRequest,
  options: { readonly rehearse?: boolean } = {},
): Promise<MeshOutcome> {
  const { namespace } = request;
  checkedName(namespace, "--namespace");
  await checkNamespace(client, namespace);
  const group = await client.find({ kind: "WorkloadGroup", name: groupNameOf(request).value, namespace });
  const plan = planMeshObjects(request, { group });

  const missing = new Set<KubeObject>();
  for (const object of plan.objects) {
    const existing =
      object.kind === "WorkloadGroup"
        ? group
        : await client.find({ kind: object.kind, name: object.metadata.name, namespace });
    if (existing === undefined) missing.add(object);
    else if (object.kind === "Service")
      checkService(existing, object, { ...groupLabels(plan.group), ...request.labels });
  }

  const deeds: MeshDeed[] = [];
  for (const object of plan.objects) {
    const what = path({ kind: object.kind, name: object.metadata.name, namespace });
    if (!missing.has(object)) deeds.push({ did: "kept", what });
    else if (options.rehearse === true) deeds.push({ did: "missing", what });
    else {
      // Another machine of the same group may join at the same moment and want the same object.
      const made = await client.create(object);
      deeds.push({ did: made === undefined ? "kept" : "made", what });
    }
  }
  return { ...plan, deeds };
}

/** A user who may not read the namespace itself may still work in it: then the first object tells whether it exists. */
async function checkNamespace(client: Pick<KubeClient, "find">, namespace: string): Promise<void> {
  try {
    if ((await client.find({ kind: "Namespace", name: namespace })) !== undefined) return;
  } catch (thrown) {
    if (thrown instanceof VmmeshError && thrown.code === "KUBE_FORBIDDEN") return;
    throw thrown;
  }
  throw new VmmeshError("KUBE_NOT_FOUND", `there is no Namespace ${namespace} in the cluster`, {
    next: `Make it with \`kubectl create namespace ${namespace}\`, or name another with --namespace.`,
  });
}

function checkedName(name: string, option: string): string {
  if (name.length <= DNS_LABEL_MOST && /^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/.test(name)) return name;
  throw new VmmeshError("USAGE", `${option} ${name} cannot be a name in Kubernetes`, {
    next: "Use a-z, 0-9 and dashes, at most 63 of them, a letter or digit first and last.",
  });
}
