import { gunzipSync } from "node:zlib";
import { VmmeshError } from "../core/errors.ts";
import { ipFamily, whyNotCidr } from "../core/net.ts";
import type { Files } from "../platform/host.ts";
import { parseEnv, renderEnv, sieveMeshEnv } from "./env.ts";
import { isTar, untar } from "./tar.ts";
import type { Bundle, ProxyConfig } from "./types.ts";
import { fieldsOf, isFields, parseYamlFields, renderYaml, textMapOf } from "./yaml.ts";

/** Names of istioctl's files, and of the one that carries what istioctl's have no place for. */
const NAMES = {
  meshConfig: "mesh.yaml",
  clusterEnv: "cluster.env",
  rootCert: "root-cert.pem",
  token: "istio-token",
  hosts: "hosts",
  extra: "vmmesh.json",
} as const;

const FORMAT = "vmmesh-bundle";
const VERSION = 1;
/** A bundle is some kilobytes; a compressed file that grows beyond this is none. */
const MOST_BYTES = 4 * 1024 * 1024;

const MAKE_ONE =
  "Make a new bundle with `vmmesh bundle create` or `istioctl x workload entry configure`, then run the same command again.";

/** A file of a bundle, to be written by whoever has a place for it. */
export interface BundleFile {
  readonly text: string;
  readonly mode: number;
}

/** Mode of the directory that a bundle is written into: it holds a token. */
const BUNDLE_DIRECTORY_MODE = 0o700;
const SECRET_MODE = 0o600;

/**
 * Reads a bundle from a directory (as istioctl writes it), a tar of one (also gzipped), or vmmesh's own one-file form.
 *
 * @throws {VmmeshError} BUNDLE_MALFORMED or ENV_FILE_MALFORMED with file, line where there is one, and the next step
 */
export async function readBundle(files: Pick<Files, "read" | "list">, path: string): Promise<Bundle> {
  const names = await files.list(path);
  if (names !== undefined) {
    const parts = new Map<string, string>();
    for (const name of Object.values(NAMES)) {
      const data = names.includes(name) ? await files.read(`${path}/${name}`) : undefined;
      if (data !== undefined) parts.set(name, Buffer.from(data).toString());
    }
    return bundleOfParts(parts, path);
  }
  const data = await files.read(path);
  if (data === undefined) throw malformed(path, "there is no such file or directory");
  return bundleOfFile(data, path);
}

function bundleOfFile(data: Uint8Array, path: string): Bundle {
  const plain = data[0] === 0x1f && data[1] === 0x8b ? gunzip(data, path) : data;
  if (!isTar(plain)) return bundleOfOneFile(Buffer.from(plain).toString(), path);
  const entries = untar(plain);
  if (entries === undefined) throw malformed(path, "the archive is cut off or damaged");
  return bundleOfParts(
    new Map([...entries].map(([name, bytes]) => [name, Buffer.from(bytes).toString()])),
    path,
  );
}

function gunzip(data: Uint8Array, path: string): Uint8Array {
  try {
    return gunzipSync(data, { maxOutputLength: MOST_BYTES });
  } catch (cause) {
    throw malformed(path, "cannot be decompressed", cause);
  }
}

function bundleOfParts(parts: ReadonlyMap<string, string>, path: string): Bundle {
  const part = (name: string): string => {
    const text = parts.get(name);
    if (text === undefined) {
      throw malformed(
        path,
        `\`${name}\` is missing, a bundle has ${NAMES.meshConfig}, ${NAMES.clusterEnv} and ${NAMES.rootCert}`,
      );
    }
    return text;
  };
  const at = (name: string): string => `${path}/${name}`;
  const { kept, refused } = sieveMeshEnv(parseEnv(part(NAMES.clusterEnv), at(NAMES.clusterEnv)));
  const extraText = parts.get(NAMES.extra);
  const extra = extraText === undefined ? undefined : readExtra(extraText, at(NAMES.extra));
  return {
    clusterEnv: kept,
    proxyConfig: parseMeshConfig(part(NAMES.meshConfig), at(NAMES.meshConfig)),
    rootCert: checkedRoots(part(NAMES.rootCert), at(NAMES.rootCert)),
    ...withToken(parts.get(NAMES.token), at(NAMES.token)),
    hosts: extra?.hosts ?? parseHosts(parts.get(NAMES.hosts) ?? "", at(NAMES.hosts)),
    meshCidrs: extra?.meshCidrs ?? [],
    refusedKeys: refused,
  };
}

/**
 * The content of mesh.yaml's `defaultConfig`.
 * @param where names the file in errors
 * @throws {VmmeshError} BUNDLE_MALFORMED with the line
 */
export function parseMeshConfig(text: string, where: string): ProxyConfig {
  const { defaultConfig } = parseYamlFields(text, where, "BUNDLE_MALFORMED", MAKE_ONE);
  if (!isFields(defaultConfig)) throw malformed(`${where}, line 1`, "there is no map `defaultConfig` in it");
  return defaultConfig;
}

/** mesh.yaml as istioctl writes it: one key, everything below it sorted. */
export function renderMeshConfig(proxyConfig: ProxyConfig): string {
  return renderYaml({ defaultConfig: proxyConfig });
}

function checkedRoots(text: string, where: string): string {
  const begin = text.indexOf("-----BEGIN CERTIFICATE-----");
  if (begin < 0 || text.indexOf("-----END CERTIFICATE-----", begin) < 0) {
    throw malformed(`${where}, line 1`, "there is no PEM certificate in it");
  }
  return text;
}

/** An empty token file is none: istioctl's script reads it so too. */
function withToken(text: string | undefined, where: string): { token?: string } {
  const token = text?.trim() ?? "";
  if (token === "") return {};
  if (!/^[\w-]+\.[\w-]+\.[\w-]*$/.test(token)) {
    throw malformed(`${where}, line 1`, "is not a JSON Web Token (three parts with dots between)");
  }
  return { token };
}

function parseHosts(text: string, where: string): Map<string, string[]> {
  const hosts = new Map<string, string[]>();
  for (const [index, line] of text.split("\n").entries()) {
    const [address = "", ...names] = line.replace(/#.*/, "").trim().split(/\s+/);
    if (address === "") continue;
    if (ipFamily(address) === undefined || names.length === 0) {
      throw malformed(`${where}, line ${index + 1}`, `\`${line.trim()}\` is not an address and a name`);
    }
    for (const name of names) hosts.set(name, [...(hosts.get(name) ?? []), address]);
  }
  return hosts;
}

interface Extra {
  readonly hosts: Map<string, string[]>;
  readonly meshCidrs: readonly string[];
}

function readExtra(text: string, where: string): Extra {
  const fields = parseYamlFields(text, where, "BUNDLE_MALFORMED", MAKE_ONE);
  checkVersion(fields["version"], where);
  return extraOf(fields, where);
}

function extraOf(fields: Readonly<Record<string, unknown>>, where: string): Extra {
  const texts = (value: unknown, what: string): string[] => {
    if (value === undefined) return [];
    if (!Array.isArray(value) || !value.every((item) => typeof item === "string")) {
      throw malformed(where, `\`${what}\` is not a list of texts`);
    }
    return value;
  };
  const meshCidrs = texts(fields["meshCidrs"], "meshCidrs");
  for (const cidr of meshCidrs) {
    const why = whyNotCidr(cidr);
    if (why !== undefined) throw malformed(where, `\`${cidr}\` in \`meshCidrs\` ${why}`);
  }
  const hosts = new Map<string, string[]>();
  for (const [name, addresses] of Object.entries(fieldsOf(fields["hosts"]))) {
    hosts.set(name, texts(addresses, `hosts.${name}`));
  }
  return { hosts, meshCidrs };
}

function checkVersion(version: unknown, where: string): void {
  if (version !== VERSION) {
    throw malformed(
      where,
      `has format ${JSON.stringify(version)}, this vmmesh reads ${VERSION}`,
      undefined,
      "Use the vmmesh version that made the bundle, or a newer one.",
    );
  }
}

function bundleOfOneFile(text: string, path: string): Bundle {
  const fields = parseYamlFields(text, path, "BUNDLE_MALFORMED", MAKE_ONE);
  if (fields["format"] !== FORMAT)
    throw malformed(`${path}, line 1`, `is neither a tar archive nor \`format: ${FORMAT}\``);
  checkVersion(fields["version"], path);
  const { clusterEnv, proxyConfig, rootCert, token } = fields;
  if (!isFields(clusterEnv)) throw malformed(path, "there is no map `clusterEnv` in it");
  if (!isFields(proxyConfig)) throw malformed(path, "there is no map `proxyConfig` in it");
  if (typeof rootCert !== "string") throw malformed(path, "there is no text `rootCert` in it");
  const { kept, refused } = sieveMeshEnv(Object.entries(textMapOf(clusterEnv)));
  return {
    clusterEnv: kept,
    proxyConfig,
    rootCert: checkedRoots(rootCert, `${path}, rootCert`),
    ...withToken(typeof token === "string" ? token : undefined, `${path}, token`),
    ...extraOf(fields, path),
    refusedKeys: refused,
  };
}

function malformed(where: string, what: string, cause?: unknown, next = MAKE_ONE): VmmeshError {
  return new VmmeshError("BUNDLE_MALFORMED", `${where}: ${what}`, { next, cause });
}

/**
 * The files of a bundle directory. Those of istioctl are byte for byte as istioctl writes them; `vmmesh.json` is added
 * only for what they cannot hold: several addresses, a load balancer's host name, the cluster's service ranges.
 */
export function renderBundle(bundle: Bundle): Map<string, BundleFile> {
  const readable = (text: string): BundleFile => ({ text, mode: 0o644 });
  const files = new Map<string, BundleFile>([
    [NAMES.meshConfig, readable(renderMeshConfig(bundle.proxyConfig))],
    [NAMES.clusterEnv, readable(renderEnv(bundle.clusterEnv, { order: "sorted" }))],
    [NAMES.rootCert, readable(bundle.rootCert)],
    [NAMES.hosts, readable(renderHosts(bundle.hosts))],
  ]);
  if (bundle.token !== undefined) files.set(NAMES.token, { text: bundle.token, mode: SECRET_MODE });
  const fits = [...bundle.hosts.values()].every(
    (addresses) => addresses.length <= 1 && addresses.every((address) => ipFamily(address) !== undefined),
  );
  if (!fits || bundle.meshCidrs.length > 0) {
    const extra = { version: VERSION, hosts: Object.fromEntries(bundle.hosts), meshCidrs: bundle.meshCidrs };
    files.set(NAMES.extra, readable(`${JSON.stringify(extra, null, 2)}\n`));
  }
  return files;
}

/** One line per name, as in istioctl's file: the first address; a host name cannot stand there. */
function renderHosts(hosts: Bundle["hosts"]): string {
  return [...hosts]
    .map(([name, addresses]) => [addresses.find((address) => ipFamily(address) !== undefined), name])
    .filter(([address]) => address !== undefined)
    .map(([address, name]) => `${address} ${name}\n`)
    .join("");
}

/** The whole bundle as one JSON text; it holds the token: write it 0600. */
export function renderBundleFile(bundle: Bundle): string {
  const { proxyConfig, rootCert, token, meshCidrs } = bundle;
  const file = {
    format: FORMAT,
    version: VERSION,
    clusterEnv: Object.fromEntries(bundle.clusterEnv),
    proxyConfig,
    rootCert,
    ...(token === undefined ? {} : { token }),
    hosts: Object.fromEntries(bundle.hosts),
    meshCidrs,
  };
  return `${JSON.stringify(file, null, 2)}\n`;
}

/**
 * Writes a bundle: one file if `target` ends in `.json`, else a directory, made 0700 if it is not there. An existing
 * directory keeps its mode; of its files only those of a bundle are touched.
 *
 * @returns the paths written
 * @throws {VmmeshError} USAGE if the folder to write into does not exist
 */
export async function writeBundle(
  files: Pick<Files, "list" | "makeDir" | "writeAtomic" | "remove">,
  target: string,
  bundle: Bundle,
): Promise<string[]> {
  const slash = target.lastIndexOf("/");
  const parent = slash < 0 ? "." : target.slice(0, slash) || "/";
  if ((await files.list(parent)) === undefined) {
    throw new VmmeshError("USAGE", `there is no directory ${parent} to write the bundle into`, {
      next: `Make it with \`mkdir -p ${parent}\`, then run the same command again.`,
    });
  }
  if (target.endsWith(".json")) {
    await files.writeAtomic(target, renderBundleFile(bundle), { mode: SECRET_MODE });
    return [target];
  }
  const present = await files.list(target);
  if (present === undefined) await files.makeDir(target, { mode: BUNDLE_DIRECTORY_MODE });
  const rendered = renderBundle(bundle);
  for (const name of Object.values(NAMES)) {
    if (!rendered.has(name) && present?.includes(name) === true) await files.remove(`${target}/${name}`);
  }
  for (const [name, { text, mode }] of rendered) await files.writeAtomic(`${target}/${name}`, text, { mode });
  return [...rendered.keys()].map((name) => `${target}/${name}`);
}
