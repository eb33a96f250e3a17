import { isMap, isSeq, LineCounter, parseDocument } from "yaml";
import { VmmeshError } from "../core/errors.ts";
import { type Fields, fieldsOf, isFields, plainOf, textOf, YAML_OPTIONS } from "../mesh/yaml.ts";
import type { Host } from "../platform/host.ts";

/** How to reach and talk to one API server, with everything read from disk already. Never written anywhere. */
export interface KubeAccess {
  /** Where it comes from, for people: `/root/.kube/config (the default place)`, context included. */
  readonly source: string;
  /** `https://HOST:PORT`, perhaps with a path. */
  readonly server: string;
  /** Name of the user entry: for errors, until the server tells the real one. */
  readonly user: string;
  /** Namespace of the context. */
  readonly namespace: string | undefined;
  /** PEM; undefined: the system's roots. */
  readonly ca: string | undefined;
  readonly certificate: { readonly cert: string; readonly key: string } | undefined;
  readonly token: string | undefined;
  /** Name in the server's certificate, if not that of the URL. */
  readonly serverName: string | undefined;
  readonly proxyUrl: string | undefined;
  readonly verify: boolean;
  /** `as`, `as-groups` of the user entry. */
  readonly impersonate: { readonly user: string; readonly groups: readonly string[] } | undefined;
  /** To be printed: what a careful operator would want to know. */
  readonly warnings: readonly string[];
}

export interface KubeconfigOptions {
  /** `--kubeconfig` */
  readonly path?: string;
  /** `--context`; default: the file's current one. */
  readonly context?: string;
  /** The process's environment: KUBECONFIG is read from it. */
  readonly env: Readonly<Record<string, string | undefined>>;
  /** Home directory of the caller; under sudo that is root's. */
  readonly home: string;
  /** Effective uid of the caller. */
  readonly uid: number;
  /** Accept `insecure-skip-tls-verify: true`. */
  readonly insecure?: boolean;
}

interface Place {
  readonly path: string;
  readonly why: string;
}

const ADMIN_CONF = "/etc/kubernetes/admin.conf";
const EXEC_TIMEOUT_MS = 60_000;

/**
 * Finds and reads a kubeconfig: `--kubeconfig`, else $KUBECONFIG (a list, merged as kubectl does: the first to name a
 * thing wins), else ~/.kube/config, else /etc/kubernetes/admin.conf (where kubeadm puts it).
 *
 * @throws {VmmeshError} KUBECONFIG_MISSING, KUBECONFIG_MALFORMED with file and line
 */
export async function loadKubeconfig(
  host: Pick<Host, "files" | "run">,
  options: KubeconfigOptions,
): Promise<KubeAccess> {
  const config = new Kubeconfig(await readPlaces(host.files, options));
  const contextName = options.context ?? config.currentContext();
  const context = config.named("contexts", contextName, "context");
  const clusterName = context.text("cluster");
  const userName = context.text("user");
  const cluster = config.named("clusters", clusterName ?? "", "cluster");
  const user = config.named("users", userName ?? "", "user");

  const server = checkedServer(cluster, options.insecure === true);
  const insecure = cluster.fields["insecure-skip-tls-verify"] === true;
  if (insecure && options.insecure !== true) {
    throw cluster.malformed(
      "insecure-skip-tls-verify",
      "is set: whoever answers would be given your credential",
      "Put the API server's root in `certificate-authority-data` instead.",
    );
  }
  const proxyUrl = cluster.text("proxy-url");
  if (proxyUrl !== undefined && !/^https?:\/\//.test(proxyUrl)) {
    throw cluster.malformed(
      "proxy-url",
      `is \`${proxyUrl}\`: only http and https proxies are supported`,
      "Use an http proxy, or run `vmmesh bundle create` where none is needed.",
    );
  }
  const warnings: string[] = insecure ? ["the API server's certificate is not checked, as you asked"] : [];
  return {
    source: `${config.label()}, context ${contextName}`,
    server,
    user: userName ?? "",
    namespace: context.text("namespace"),
    ca: await pemOf(host.files, cluster, "certificate-authority"),
    serverName: cluster.text("tls-server-name"),
    proxyUrl,
    verify: !insecure,
    ...(await credentialOf(host, user, { cluster, server, uid: options.uid, warnings })),
    impersonate: impersonationOf(user),
    warnings,
  };
}

async function readPlaces(files: Host["files"], options: KubeconfigOptions): Promise<Source[]> {
  const found: Source[] = [];
  const looked: string[] = [];
  for (const places of placesOf(options)) {
    for (const place of places) {
      looked.push(place.path);
      const text = await readable(files, place);
      if (text !== undefined) found.push(new Source(place, text));
    }
    if (found.length > 0) return found;
  }
  throw new VmmeshError("KUBECONFIG_MISSING", `there is no kubeconfig: looked for ${looked.join(", ")}`, {
    next: "Give one with `--kubeconfig FILE` (under sudo, ~ is root's home), or make a bundle where you have one with `vmmesh bundle create`, and join with `--bundle`.",
  });
}

/** What was asked for must be there; of the usual places the first that has a file is taken. */
function placesOf(options: KubeconfigOptions): Place[][] {
  if (options.path !== undefined) return [[{ path: options.path, why: "--kubeconfig" }]];
  const listed = (options.env["KUBECONFIG"] ?? "").split(":").filter((path) => path !== "");
  if (listed.length > 0) return [listed.map((path) => ({ path, why: "$KUBECONFIG" }))];
  return [
    [{ path: `${options.home}/.kube/config`, why: "the default place" }],
    [{ path: ADMIN_CONF, why: "kubeadm's place" }],
  ];
}

async function readable(files: Host["files"], place: Place): Promise<string | undefined> {
  try {
    return await files.readText(place.path);
  } catch (cause) {
    throw new VmmeshError(
      "KUBECONFIG_MISSING",
      `the kubeconfig ${place.path} (${place.why}) cannot be read`,
      {
        cause,
        next: "Give one that you may read with `--kubeconfig FILE`.",
      },
    );
  }
}

/** One file, with the lines of its parts. */
class Source {
  readonly place: Place;
  readonly fields: Fields;
  readonly #document: ReturnType<typeof parseDocument>;
  readonly #lines = new LineCounter();

  constructor(place: Place, text: string) {
    this.place = place;
    this.#document = parseDocument(text, { ...YAML_OPTIONS, lineCounter: this.#lines });
    const [error] = this.#document.errors;
    if (error !== undefined) {
      throw this.malformed(
        error.linePos?.[0].line,
        error.message.split("\n")[0]?.replace(/ at line .*$/, "") ?? "",
      );
    }
    const value = plainOf(this.#document);
    if (value instanceof Error) throw this.malformed(undefined, value.message);
    if (!isFields(value)) throw this.malformed(1, "there is no map of keys in it");
    this.fields = value;
  }

  /** 1-based line of an entry of a named list; undefined if it has no place. */
  lineOf(list: string, index: number): number | undefined {
    const sequence = this.#document.get(list);
    const item: unknown = isSeq(sequence) ? sequence.items[index] : undefined;
    const offset = isMap(item) ? item.range?.[0] : undefined;
    return offset === undefined ? undefined : this.#lines.linePos(offset).line;
  }

  malformed(line: number | undefined, what: string, next?: string, cause?: unknown): VmmeshError {
    const at = line === undefined ? this.place.path : `${this.place.path}, line ${line}`;
    return new VmmeshError("KUBECONFIG_MALFORMED", `${at}: ${what}`, {
      cause,
      next:
        next ??
        "`kubectl config view` reads the same file: correct it until that works, then run the same command again.",
    });
  }
}

/** A cluster, context or user, and where it stands. */
class Entry {
  readonly fields: Fields;
  readonly #source: Source;
  readonly #line: number | undefined;
  readonly #what: string;

  constructor(source: Source, line: number | undefined, what: string, fields: Fields) {
    this.#source = source;
    this.#line = line;
    this.#what = what;
    this.fields = fields;
  }

  /** undefined if absent or empty. */
  text(key: string): string | undefined {
    return textOf(this.fields[key]) || undefined;
  }

  /** Paths in a kubeconfig are relative to the file. */
  path(relative: string): string {
    const file = this.#source.place.path;
    return relative.startsWith("/") || !file.includes("/")
      ? relative
      : `${file.slice(0, file.lastIndexOf("/"))}/${relative}`;
  }

  malformed(key: string, what: string, next?: string, cause?: unknown): VmmeshError {
    return this.#source.malformed(this.#line, `\`${key}\` of ${this.#what} ${what}`, next, cause);
  }
}

class Kubeconfig {
  readonly #sources: readonly Source[];

  constructor(sources: readonly Source[]) {
    this.#sources = sources;
  }

  label(): string {
    return this.#sources.map(({ place }) => `${place.path} (${place.why})`).join(", ");
  }

  currentContext(): string {
    for (const { fields } of this.#sources) {
      const name = textOf(fields["current-context"]);
      if (name !== undefined && name !== "") return name;
    }
    throw this.#first().malformed(
      undefined,
      "there is no `current-context`",
      "Say which with `--context NAME`; `kubectl config get-contexts` lists them.",
    );
  }

  named(list: string, name: string, kind: string): Entry {
    for (const source of this.#sources) {
      const items: unknown = source.fields[list];
      const index = Array.isArray(items) ? items.findIndex((item) => fieldsOf(item)["name"] === name) : -1;
      if (index < 0) continue;
      const item = fieldsOf((items as unknown[])[index]);
      return new Entry(source, source.lineOf(list, index), `${kind} \`${name}\``, fieldsOf(item[kind]));
    }
    throw this.#first().malformed(undefined, `there is no ${kind} named \`${name}\``);
  }

  #first(): Source {
    const [first] = this.#sources;
    if (first === undefined) throw new VmmeshError("KUBECONFIG_MISSING", "there is no kubeconfig");
    return first;
  }
}

function checkedServer(cluster: Entry, insecure: boolean): string {
  const text = cluster.text("server");
  if (text === undefined || !URL.canParse(text)) throw cluster.malformed("server", "is missing or no URL");
  const url = new URL(text);
  const loopback = ["localhost", "127.0.0.1", "[::1]"].includes(url.hostname);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && (loopback || insecure))) {
    throw cluster.malformed(
      "server",
      `is \`${text}\`: your credential would cross the network unencrypted`,
      "Use the https address of the API server.",
    );
  }
  return text.replace(/\/+$/, "");
}

/** `KEY-data` (base64) or the file that `KEY` names. */
async function pemOf(files: Host["files"], entry: Entry, key: string): Promise<string | undefined> {
  const data = entry.text(`${key}-data`);
  if (data !== undefined) {
    const pem = Buffer.from(data, "base64").toString();
    if (!pem.includes("-----BEGIN ")) throw entry.malformed(`${key}-data`, "is not a PEM text in base64");
    return pem;
  }
  const path = entry.text(key);
  return path === undefined ? undefined : await fileOf(files, entry, key, path);
}

async function fileOf(files: Host["files"], entry: Entry, key: string, path: string): Promise<string> {
  const full = entry.path(path);
  const text = await files.readText(full).catch((cause: unknown) => {
    throw entry.malformed(key, `names ${full}, which cannot be read`, undefined, cause);
  });
  if (text === undefined) throw entry.malformed(key, `names ${full}, which does not exist`);
  return text;
}

type Credential = Pick<KubeAccess, "certificate" | "token">;

async function credentialOf(
  host: Pick<Host, "files" | "run">,
  user: Entry,
  context: { cluster: Entry; server: string; uid: number; warnings: string[] },
): Promise<Credential> {
  if (user.fields["auth-provider"] !== undefined) {
    throw user.malformed(
      "auth-provider",
      "is a form that Kubernetes gave up in 1.26",
      "Use an exec plugin or a token.",
    );
  }
  if (isFields(user.fields["exec"])) return runPlugin(host, user, user.fields["exec"], context);
  const tokenFile = user.text("tokenFile");
  const token =
    tokenFile === undefined
      ? user.text("token")
      : (await fileOf(host.files, user, "tokenFile", tokenFile)).trim();
  const cert = await pemOf(host.files, user, "client-certificate");
  const key = await pemOf(host.files, user, "client-key");
  if ((cert === undefined) !== (key === undefined)) {
    throw user.malformed(
      cert === undefined ? "client-key" : "client-certificate",
      "has no counterpart: a certificate needs its key",
    );
  }
  return { token, certificate: cert === undefined || key === undefined ? undefined : { cert, key } };
}

/** A client-go credential plugin. @see https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins */
async function runPlugin(
  host: Pick<Host, "run">,
  user: Entry,
  exec: Fields,
  context: { cluster: Entry; server: string; uid: number; warnings: string[] },
): Promise<Credential> {
  const command = textOf(exec["command"]) ?? "";
  const apiVersion = textOf(exec["apiVersion"]) ?? "";
  if (command === "") throw user.malformed("exec.command", "is missing");
  const program = command.includes("/") ? user.path(command) : command;
  if (context.uid === 0) {
    context.warnings.push(
      `the kubeconfig runs \`${program}\` as root to get a credential; make a bundle as another user if you do not trust it`,
    );
  }
  const args = Array.isArray(exec["args"]) ? exec["args"].map(String) : [];
  const env = Array.isArray(exec["env"]) ? exec["env"].map(fieldsOf) : [];
  const info = {
    apiVersion,
    kind: "ExecCredential",
    spec: {
      interactive: false,
      ...(exec["provideClusterInfo"] === true
        ? {
            cluster: {
              server: context.server,
              "certificate-authority-data": context.cluster.text("certificate-authority-data"),
            },
          }
        : {}),
    },
  };
  const result = await host.run({
    argv: [program, ...args],
    timeoutMs: EXEC_TIMEOUT_MS,
    env: {
      ...Object.fromEntries(env.map((item) => [String(item["name"]), String(item["value"])])),
      KUBERNETES_EXEC_INFO: JSON.stringify(info),
    },
  });
  // What a plugin prints may hold the credential, so none of its stdout goes into an error.
  if (result.code !== 0) {
    throw user.malformed(
      "exec",
      `ran \`${program}\`, which ended with status ${result.code}`,
      "Run it by hand until it prints an ExecCredential.",
      new Error(result.stderr.trim()),
    );
  }
  const status = fieldsOf(parsedJson(result.stdout)["status"]);
  const token = textOf(status["token"]);
  const cert = textOf(status["clientCertificateData"]);
  const key = textOf(status["clientKeyData"]);
  if (token === undefined && (cert === undefined || key === undefined)) {
    throw user.malformed(
      "exec",
      `ran \`${program}\`, which printed no credential`,
      "Run it by hand until it prints an ExecCredential.",
    );
  }
  return { token, certificate: cert === undefined || key === undefined ? undefined : { cert, key } };
}

/** An empty map if the text is not a JSON object. */
function parsedJson(text: string): Fields {
  try {
    return fieldsOf(JSON.parse(text));
  } catch {
    return {};
  }
}

function impersonationOf(user: Entry): KubeAccess["impersonate"] {
  const name = user.text("as");
  if (name === undefined) return undefined;
  const groups: unknown = user.fields["as-groups"];
  return { user: name, groups: Array.isArray(groups) ? groups.map(String) : [] };
}
