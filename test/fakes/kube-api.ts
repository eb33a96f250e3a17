import { createServer, type IncomingMessage, type Server } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import type { KubeObject } from "../../agent/kube/client.ts";

/** What one request asked for, as RBAC sees it. */
export interface Seen {
  readonly user: string;
  readonly verb: "get" | "list" | "create" | "patch";
  /** `serviceaccounts/token`, `workloadgroups.networking.istio.io` */
  readonly resource: string;
  readonly namespace: string | undefined;
  readonly name: string | undefined;
  readonly body: unknown;
}

export interface FakeKubeOptions {
  /** Bearer token → user; others are answered 401. */
  readonly users?: Readonly<Record<string, string>>;
  /** Default: everything is allowed. */
  readonly may?: (seen: Seen) => boolean;
  readonly objects?: readonly KubeObject[];
  /** Groups that the cluster has beside the core one. */
  readonly groups?: readonly string[];
  /** With `clients`, a root in PEM: only who shows a certificate from it is let in. */
  readonly tls?: { readonly cert: string; readonly key: string; readonly clients?: string };
}

/**
 * A small API server in this process: stores objects, knows users and rights, and refuses as the real one does
 * (kube-apiserver 1.37: status, reason, details and message of its answers).
 */
export class FakeKube implements AsyncDisposable {
  readonly objects = new Map<string, KubeObject>();
  readonly seen: Seen[] = [];
  readonly #server: Server;
  readonly #options: FakeKubeOptions;

  private constructor(server: Server, options: FakeKubeOptions) {
    this.#server = server;
    this.#options = options;
    for (const object of options.objects ?? []) {
      this.objects.set(keyOf(plural(object.kind), object.metadata.namespace, object.metadata.name), object);
    }
  }

  static async start(options: FakeKubeOptions = {}): Promise<FakeKube> {
    const server = options.tls === undefined ? createServer() : createTls(options.tls);
    const fake = new FakeKube(server, options);
    server.on("request", (request: IncomingMessage, response) => {
      void read(request).then((text) => {
        const { status, body } = fake.#answer(request, text);
        response.writeHead(status, {
          "content-type": typeof body === "string" ? "text/plain" : "application/json",
        });
        response.end(typeof body === "string" ? body : JSON.stringify(body));
      });
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    return fake;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  get url(): string {
    return `${this.#options.tls === undefined ? "http" : "https"}://127.0.0.1:${this.port}`;
  }

  /** `create serviceaccounts`, … of what was asked, in order. */
  get asked(): string[] {
    return this.seen.map(({ verb, resource }) => `${verb} ${resource}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  #answer(request: IncomingMessage, text: string): { status: number; body: unknown } {
    const url = new URL(request.url ?? "/", "http://x");
    const match =
      /^\/(?:api|apis\/([^/]+))\/v1(?:\/namespaces\/([^/]+)(?=\/))?\/([a-z]+)(?:\/([^/]+))?(?:\/([a-z]+))?$/.exec(
        url.pathname,
      );
    if (match === null || (match[1] !== undefined && this.#options.groups?.includes(match[1]) === false)) {
      return { status: 404, body: "404 page not found\n" };
    }
    const [, group, namespace, kind = "", name, subresource] = match;
    const token = request.headers.authorization?.replace("Bearer ", "") ?? "";
    const user = this.#options.users === undefined ? "admin" : this.#options.users[token];
    if (user === undefined)
      return {
        status: 401,
        body: { kind: "Status", reason: "Unauthorized", message: "Unauthorized", code: 401 },
      };
    const local = subresource === undefined ? kind : `${kind}/${subresource}`;
    const seen: Seen = {
      user: request.headers["impersonate-user"]?.toString() ?? user,
      verb:
        request.method === "GET"
          ? name === undefined
            ? "list"
            : "get"
          : request.method === "PATCH"
            ? "patch"
            : "create",
      resource: group === undefined ? local : `${local}.${group}`,
      namespace,
      name,
      body: text === "" ? undefined : JSON.parse(text),
    };
    this.seen.push(seen);
    const where = namespace === undefined ? "at the cluster scope" : `in the namespace "${namespace}"`;
    if (this.#options.may?.(seen) === false) {
      const message = `${seen.resource} is forbidden: User "${user}" cannot ${seen.verb} resource "${local}" in API group "${group ?? ""}" ${where}`;
      return failure(403, "Forbidden", message, { name, kind: local });
    }
    return this.#act(seen, kind, subresource);
  }

  #act(
    { verb, namespace, name, body }: Seen,
    kind: string,
    subresource: string | undefined,
  ): { status: number; body: unknown } {
    const missing = (what: string, of: string) =>
      failure(404, "NotFound", `${what} "${of}" not found`, { name: of, kind: what });
    if (verb === "list") {
      const items = [...this.objects]
        .filter(([key]) => key.startsWith(`${kind}/${namespace ?? ""}/`))
        .map(([, item]) => item);
      return { status: 200, body: { items } };
    }
    const object = body as KubeObject | undefined;
    const key = keyOf(kind, namespace, name ?? object?.metadata.name ?? "");
    if (verb === "get" || subresource !== undefined) {
      const found = this.objects.get(key);
      if (found === undefined) return missing(kind, name ?? "");
      return { status: 200, body: subresource === "token" ? tokenRequest(body, namespace, name) : found };
    }
    if (namespace !== undefined && !this.objects.has(keyOf("namespaces", undefined, namespace))) {
      return missing("namespaces", namespace);
    }
    if (verb === "create" && this.objects.has(key)) {
      return failure(409, "AlreadyExists", `${kind} "${object?.metadata.name}" already exists`, { kind });
    }
    if (object === undefined) return { status: 201, body: object };
    this.objects.set(key, object);
    const uid = `uid-of-${object.metadata.name}`;
    return { status: 201, body: { ...object, metadata: { ...object.metadata, uid } } };
  }
}

function createTls({ cert, key, clients }: NonNullable<FakeKubeOptions["tls"]>): Server {
  const asks = clients === undefined ? {} : { requestCert: true, rejectUnauthorized: true, ca: clients };
  return createTlsServer({ cert, key, ...asks }) as unknown as Server;
}

/** The audience and times are the asked ones; the signature is none. */
function tokenRequest(body: unknown, namespace: string | undefined, name: string | undefined): unknown {
  const { spec } = body as { spec: { audiences: string[]; expirationSeconds: number } };
  const part = (value: unknown): string => Buffer.from(JSON.stringify(value)).toString("base64url");
  const claims = { aud: spec.audiences, sub: `system:serviceaccount:${namespace}:${name}` };
  const expires = new Date(Date.UTC(2026, 10, 23) + spec.expirationSeconds * 1000);
  return {
    status: {
      token: `${part({ alg: "none" })}.${part(claims)}.c2ln`,
      expirationTimestamp: expires.toISOString(),
    },
  };
}

function failure(
  code: number,
  reason: string,
  message: string,
  details: unknown,
): { status: number; body: unknown } {
  return {
    status: code,
    body: { kind: "Status", apiVersion: "v1", status: "Failure", code, reason, message, details },
  };
}

function keyOf(kind: string, namespace: string | undefined, name: string): string {
  return `${kind}/${namespace ?? ""}/${name}`;
}

function plural(kind: string): string {
  return kind === "WorkloadEntry" ? "workloadentries" : `${kind.toLowerCase()}s`;
}

async function read(request: IncomingMessage): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of request) parts.push(part as Buffer);
  return Buffer.concat(parts).toString();
}
