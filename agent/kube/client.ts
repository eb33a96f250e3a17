import { Agent, type Dispatcher, ProxyAgent, request } from "undici";
import { VmmeshError } from "../core/errors.ts";
import { textWithin } from "../core/textWithin.ts";
import { type Fields, fieldsOf, isFields, textOf } from "../mesh/yaml.ts";
import type { KubeAccess } from "./kubeconfig.ts";
import { whyUnreachable } from "./unreachable.ts";

/** Where each kind lives in the API, and who makes one by hand. */
export const KINDS = {
  Namespace: { group: "", version: "v1", resource: "namespaces", namespaced: false },
  ServiceAccount: { group: "", version: "v1", resource: "serviceaccounts", namespaced: true },
  Service: { group: "", version: "v1", resource: "services", namespaced: true },
  ConfigMap: { group: "", version: "v1", resource: "configmaps", namespaced: true },
  Secret: { group: "", version: "v1", resource: "secrets", namespaced: true },
  WorkloadGroup: {
    group: "networking.istio.io",
    version: "v1",
    resource: "workloadgroups",
    namespaced: true,
  },
  WorkloadEntry: {
    group: "networking.istio.io",
    version: "v1",
    resource: "workloadentries",
    namespaced: true,
  },
  ServiceCIDR: { group: "networking.k8s.io", version: "v1", resource: "servicecidrs", namespaced: false },
} as const;

export type Kind = keyof typeof KINDS;

export interface ObjectRef {
  readonly kind: Kind;
  readonly name: string;
  /** Left out for kinds without one. */
  readonly namespace?: string;
}

/** An object as the API carries it; what we do not know stays in it. */
export interface KubeObject {
  readonly apiVersion: string;
  readonly kind: Kind;
  readonly metadata: {
    readonly name: string;
    readonly namespace?: string;
    readonly uid?: string;
    readonly labels?: Readonly<Record<string, string>>;
    readonly annotations?: Readonly<Record<string, string>>;
  };
  readonly spec?: Fields;
  readonly status?: Fields;
  readonly data?: Readonly<Record<string, string>>;
}

export interface TokenWish {
  readonly namespace: string;
  readonly serviceAccount: string;
  readonly audience: string;
  /** At least 600: the API server grants no less. */
  readonly seconds: number;
  /** The token dies with this object. */
  readonly boundTo?: { readonly kind: "Secret" | "Pod"; readonly name: string; readonly uid?: string };
}

export interface GrantedToken {
  readonly token: string;
  /** The server may grant another time than was asked for. */
  readonly expires: Date;
}

type Verb = "get" | "list" | "create" | "patch";

interface Call {
  readonly verb: Verb;
  readonly ref: ObjectRef;
  /** `serviceaccounts/token` */
  readonly subresource?: string;
  readonly query?: Readonly<Record<string, string>>;
  readonly body?: unknown;
}

const METHODS: Readonly<Record<Verb, Dispatcher.HttpMethod>> = {
  get: "GET",
  list: "GET",
  create: "POST",
  patch: "PATCH",
};
const CONNECT_TIMEOUT_MS = 10_000;
const ANSWER_TIMEOUT_MS = 30_000;
/** The longest list that a join asks for is a cluster's nodes or services; one object of Kubernetes is below 2 MiB. */
const MAX_ANSWER_BYTES = 64 * 1024 * 1024;
const tooLong = (): Error => new Error(`its answer is longer than ${MAX_ANSWER_BYTES} bytes`);
const FIELD_MANAGER = "vmmesh";

/** The API server grants no less. */
const LEAST_TOKEN_SECONDS = 600;

/** @throws {VmmeshError} USAGE, in the words of the command line */
export function refuseShortToken(seconds: number): void {
  if (seconds >= LEAST_TOKEN_SECONDS) return;
  throw new VmmeshError("USAGE", `--token-duration ${seconds} is too short`, {
    next: `The API server grants ${LEAST_TOKEN_SECONDS} seconds or more.`,
  });
}

/** As much of the Kubernetes API as a join needs: get, list, create, server-side apply and TokenRequest. */
export class KubeClient implements AsyncDisposable {
  readonly #access: KubeAccess;
  readonly #dispatcher: Dispatcher;

  constructor(access: KubeAccess) {
    this.#access = access;
    const tls = {
      rejectUnauthorized: access.verify,
      timeout: CONNECT_TIMEOUT_MS,
      ...(access.ca === undefined ? {} : { ca: access.ca }),
      ...access.certificate,
      ...(access.serverName === undefined ? {} : { servername: access.serverName }),
    };
    const timeouts = { headersTimeout: ANSWER_TIMEOUT_MS, bodyTimeout: ANSWER_TIMEOUT_MS };
    this.#dispatcher =
      access.proxyUrl === undefined
        ? new Agent({ connect: tls, ...timeouts })
        : new ProxyAgent({ uri: access.proxyUrl, requestTls: tls, ...timeouts });
  }

  /** @throws {VmmeshError} KUBE_NOT_FOUND and those of `find` */
  async get(ref: ObjectRef): Promise<KubeObject> {
    const found = await this.find(ref);
    if (found !== undefined) return found;
    throw notFound(ref);
  }

  /**
   * @returns undefined if there is no such object
   * @throws {VmmeshError} KUBE_FORBIDDEN, KUBE_UNREACHABLE, KUBE_NOT_FOUND if the cluster does not have the kind, KUBE_FAILED
   */
  async find(ref: ObjectRef): Promise<KubeObject | undefined> {
    const answer = await this.#send({ verb: "get", ref });
    return answer.status === 404 ? undefined : (answer.body as unknown as KubeObject);
  }

  /** All of a kind, in one namespace or (kinds without one) in the cluster. @throws as `find` */
  async list(kind: Kind, namespace?: string): Promise<KubeObject[]> {
    const ref = { kind, name: "", ...(namespace === undefined ? {} : { namespace }) };
    const { body } = await this.#send({ verb: "list", ref });
    return Array.isArray(body["items"]) ? (body["items"] as KubeObject[]) : [];
  }

  /**
   * @returns undefined if somebody else has made it meanwhile
   * @throws as `find`; KUBE_NOT_FOUND if its namespace is missing
   */
  async create(object: KubeObject): Promise<KubeObject | undefined> {
    const { status, body } = await this.#send({ verb: "create", ref: refOf(object), body: object });
    if (status === 409) return undefined;
    if (status === 404) throw missingParent(refOf(object));
    return body as unknown as KubeObject;
  }

  /** Server-side apply: owns the fields that `object` has, and leaves those of others. @throws as `create` */
  async apply(object: KubeObject): Promise<KubeObject> {
    const ref = refOf(object);
    const query = { fieldManager: FIELD_MANAGER };
    const { status, body } = await this.#send({ verb: "patch", ref, body: object, query });
    if (status === 404) throw missingParent(ref);
    return body as unknown as KubeObject;
  }

  /** A token for a service account, by its TokenRequest. @throws as `get` */
  async requestToken(wish: TokenWish): Promise<GrantedToken> {
    const ref: ObjectRef = { kind: "ServiceAccount", name: wish.serviceAccount, namespace: wish.namespace };
    const body = {
      apiVersion: "authentication.k8s.io/v1",
      kind: "TokenRequest",
      spec: {
        audiences: [wish.audience],
        expirationSeconds: wish.seconds,
        ...(wish.boundTo === undefined ? {} : { boundObjectRef: { apiVersion: "v1", ...wish.boundTo } }),
      },
    };
    const answer = await this.#send({ verb: "create", ref, subresource: "token", body });
    if (answer.status === 404) {
      const missing = fieldsOf(answer.body["details"])["name"];
      throw missing === wish.serviceAccount
        ? notFound(ref)
        : failed(`a token for ${path(ref)} was refused`, answer);
    }
    const status = fieldsOf(answer.body["status"]);
    const token = textOf(status["token"]);
    if (token === undefined) throw failed(`${path(ref)} gave no token`, answer);
    return { token, expires: new Date(textOf(status["expirationTimestamp"]) ?? Number.NaN) };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#dispatcher.close();
  }

  /** Answers of 2xx, 404 (of an object) and 409 come back; every other one is thrown. */
  async #send(call: Call): Promise<Answer> {
    const { ref } = call;
    const collection = call.verb === "list" || (call.verb === "create" && call.subresource === undefined);
    const url = new URL(`${this.#access.server}${collectionPath(ref)}`);
    if (!collection) url.pathname += `/${encodeURIComponent(ref.name)}`;
    if (call.subresource !== undefined) url.pathname += `/${call.subresource}`;
    for (const [key, value] of Object.entries(call.query ?? {})) url.searchParams.set(key, value);

    const answer = await this.#request(url, call);
    if (answer.status >= 200 && answer.status < 300) return answer;
    if (answer.status === 404) {
      // A path that the server does not have is answered with a text, or with a Status that names no object.
      if (fieldsOf(answer.body["details"])["name"] === undefined) throw missingKind(ref.kind);
      return answer;
    }
    if (answer.status === 409 && answer.body["reason"] === "AlreadyExists") return answer;
    if (answer.status === 401) throw unauthorized(this.#access);
    if (answer.status === 403) throw forbidden(call, answer, this.#access.user);
    throw failed(`${call.verb} ${path(ref)} was answered with status ${answer.status}`, answer);
  }

  async #request(url: URL, call: Call): Promise<Answer> {
    const { token, impersonate } = this.#access;
    const patchType = "application/apply-patch+yaml";
    try {
      const response = await request(url, {
        method: METHODS[call.verb],
        dispatcher: this.#dispatcher,
        headers: {
          accept: "application/json",
          "user-agent": FIELD_MANAGER,
          ...(token === undefined ? {} : { authorization: `Bearer ${token}` }),
          ...(call.body === undefined
            ? {}
            : { "content-type": call.verb === "patch" ? patchType : "application/json" }),
          ...(impersonate === undefined
            ? {}
            : { "impersonate-user": impersonate.user, "impersonate-group": [...impersonate.groups] }),
        },
        ...(call.body === undefined ? {} : { body: JSON.stringify(call.body) }),
      });
      return {
        status: response.statusCode,
        ...parsedBody(await textWithin(response.body, MAX_ANSWER_BYTES, tooLong)),
      };
    } catch (cause) {
      throw whyUnreachable(cause, this.#access);
    }
  }
}

interface Answer {
  readonly status: number;
  readonly body: Fields;
  readonly text: string;
}

function parsedBody(text: string): Pick<Answer, "body" | "text"> {
  try {
    const value: unknown = JSON.parse(text);
    return { body: isFields(value) ? value : {}, text };
  } catch {
    return { body: {}, text };
  }
}

/** `apiVersion` of a kind. */
export function apiVersionOf(kind: Kind): string {
  const { group, version } = KINDS[kind];
  return group === "" ? version : `${group}/${version}`;
}

function collectionPath({ kind, namespace }: ObjectRef): string {
  const { group, resource, namespaced } = KINDS[kind];
  const root = group === "" ? "/api" : "/apis";
  return `${root}/${apiVersionOf(kind)}${namespaced ? `/namespaces/${encodeURIComponent(namespace ?? "")}` : ""}/${resource}`;
}

function refOf(object: KubeObject): ObjectRef {
  const { name, namespace } = object.metadata;
  return { kind: object.kind, name, ...(namespace === undefined ? {} : { namespace }) };
}

/** `ServiceAccount default/details`, as people say it. */
export function path({ kind, name, namespace }: ObjectRef): string {
  return `${kind} ${namespace === undefined ? "" : `${namespace}/`}${name}`;
}

/** `workloadgroups.networking.istio.io`, as RBAC says it. */
function resourceOf({ kind }: ObjectRef, subresource?: string): string {
  const { group, resource } = KINDS[kind];
  const name = subresource === undefined ? resource : `${resource}/${subresource}`;
  return group === "" ? name : `${name}.${group}`;
}

function notFound(ref: ObjectRef): VmmeshError {
  return new VmmeshError("KUBE_NOT_FOUND", `there is no ${path(ref)} in the cluster`, {
    next: howToMake(ref),
  });
}

function howToMake({ kind, name, namespace }: ObjectRef): string {
  switch (kind) {
    case "Namespace":
      return `Make it with \`kubectl create namespace ${name}\`, or name another with --namespace.`;
    case "ServiceAccount":
      return `Make it with \`kubectl -n ${namespace} create serviceaccount ${name}\`, or name another with --service-account.`;
    case "WorkloadGroup":
      return `Make it with \`istioctl x workload group create --name ${name} --namespace ${namespace} | kubectl apply -f -\`, or let \`vmmesh join\` make it.`;
    case "ConfigMap":
      return `istiod makes it: look whether istiod runs (\`kubectl -n ${namespace} get configmaps,pods\`); a revision is named with --revision.`;
    case "Service":
    case "Secret":
    case "WorkloadEntry":
    case "ServiceCIDR":
      return `Look for it with \`kubectl ${namespace === undefined ? "" : `-n ${namespace} `}get ${KINDS[kind].resource}\`.`;
  }
}

function missingParent(ref: ObjectRef): VmmeshError {
  return notFound({ kind: "Namespace", name: ref.namespace ?? "" });
}

function missingKind(kind: Kind): VmmeshError {
  const istio = KINDS[kind].group === "networking.istio.io";
  return new VmmeshError(
    "KUBE_NOT_FOUND",
    `this cluster has no ${resourceOf({ kind, name: "" })}/${KINDS[kind].version}`,
    {
      next: istio
        ? "Install Istio 1.22 or later in the cluster (`istioctl install`), or look whether the kubeconfig names the right cluster."
        : "Look whether the kubeconfig names the right cluster.",
    },
  );
}

function unauthorized(access: KubeAccess): VmmeshError {
  return new VmmeshError(
    "KUBE_FORBIDDEN",
    `the API server ${access.server} does not know the credential of user \`${access.user}\` in ${access.source}`,
    { next: "It may have expired: get a new kubeconfig, then run the same command again." },
  );
}

function forbidden({ verb, ref, subresource }: Call, answer: Answer, entry: string): VmmeshError {
  const message = textOf(answer.body["message"]) ?? answer.text;
  const user = /User "([^"]+)"/.exec(message)?.[1] ?? entry;
  const resource = resourceOf(ref, subresource);
  const where = ref.namespace === undefined ? "in the cluster" : `in namespace ${ref.namespace}`;
  if (!message.includes(" cannot ")) {
    return new VmmeshError("KUBE_FORBIDDEN", `the API server refuses to ${verb} ${path(ref)}`, {
      cause: new Error(message),
      next: "An admission rule of the cluster says no: the reason above is its own.",
    });
  }
  const scope = ref.namespace === undefined ? "cluster" : "";
  const flag = ref.namespace === undefined ? "" : `-n ${ref.namespace} `;
  const role = `kubectl ${flag}create ${scope}role vmmesh-${verb}-${KINDS[ref.kind].resource} --verb=${verb} --resource=${resource}`;
  return new VmmeshError("KUBE_FORBIDDEN", `user \`${user}\` may not ${verb} ${resource} ${where}`, {
    next: `An administrator grants it: \`${role}\`, then \`kubectl ${flag}create ${scope}rolebinding\` for that role and user \`${user}\`.`,
  });
}

function failed(what: string, answer: Answer): VmmeshError {
  const reason = textOf(answer.body["message"]) ?? answer.text.slice(0, 300);
  return new VmmeshError("KUBE_FAILED", what, {
    ...(reason === "" ? {} : { cause: new Error(reason) }),
    next: "Correct what the reason names, then run the same command again: what exists already is kept.",
  });
}
