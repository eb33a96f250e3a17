import { VmmeshError } from "../core/errors.ts";
import type { Host } from "../platform/host.ts";

/** The oldest Envoy whose extensions and flags the bootstrap uses; the newest one it is tested with is 1.40.0. */
export const OLDEST_ENVOY = { major: 1, minor: 36 } as const;

/** Looked at in this order when no path is given, after $PATH. */
const USUAL_PLACES = ["/usr/local/bin/envoy", "/usr/bin/envoy", "/opt/vmmesh/envoy"] as const;

const VERSION_TIMEOUT_MS = 10_000;

export interface EnvoyVersion {
  readonly major: number;
  readonly minor: number;
  readonly patch: number;
  /** As Envoy prints it: `1.40.0`, `1.41.0-dev`. */
  readonly text: string;
}

export interface EnvoyBinary {
  readonly path: string;
  readonly version: EnvoyVersion;
}

/**
 * The version in the output of `envoy --version`:
 * `/usr/bin/envoy  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`.
 *
 * @returns undefined if the text holds none
 */
export function parseEnvoyVersion(output: string): EnvoyVersion | undefined {
  const match = /version:\s*[^/\s]*\/((\d+)\.(\d+)\.(\d+)[^/\s]*)\//.exec(output);
  if (match === null) return undefined;
  const [, text = "", major, minor, patch] = match;
  return { major: Number(major), minor: Number(minor), patch: Number(patch), text };
}

/**
 * Finds Envoy and asks it for its version.
 *
 * @param given absolute path that the operator chose; then no other place is looked at
 * @param searchPath in the form of $PATH; its relative entries are passed over
 * @throws {VmmeshError} ENVOY_MISSING if there is none or it does not run; ENVOY_TOO_OLD below 1.36
 */
export async function checkEnvoy(
  host: Pick<Host, "run" | "files">,
  given?: string,
  searchPath = process.env["PATH"] ?? "",
): Promise<EnvoyBinary> {
  const path = given ?? (await findEnvoy(host.files, searchPath));
  if (path === undefined) {
    throw new VmmeshError("ENVOY_MISSING", `no Envoy in $PATH nor at ${USUAL_PLACES.join(", ")}`, {
      next: `Install Envoy ${OLDEST_ENVOY.major}.${OLDEST_ENVOY.minor} or newer, or name the binary with --envoy PATH.`,
    });
  }
  const version = await askVersion(host, path);
  if (!isSupported(version)) {
    throw new VmmeshError(
      "ENVOY_TOO_OLD",
      `${path} is Envoy ${version.text}; vmmesh needs ${OLDEST_ENVOY.major}.${OLDEST_ENVOY.minor} or newer`,
      { next: "Install a newer Envoy, or name another binary with --envoy PATH." },
    );
  }
  return { path, version };
}

function isSupported({ major, minor }: EnvoyVersion): boolean {
  return major > OLDEST_ENVOY.major || (major === OLDEST_ENVOY.major && minor >= OLDEST_ENVOY.minor);
}

async function findEnvoy(
  files: Pick<Host["files"], "stat">,
  searchPath: string,
): Promise<string | undefined> {
  // A relative entry would make root run whatever lies in the folder it happens to stand in.
  const inPath = searchPath.split(":").filter((folder) => folder.startsWith("/"));
  for (const path of [...inPath.map((folder) => `${folder.replace(/\/+$/, "")}/envoy`), ...USUAL_PLACES]) {
    const info = await files.stat(path);
    if (info === undefined) continue;
    // Of a link stat tells only the link's own mode; `--version` shows soon enough what it leads to.
    if (info.kind === "link" || (info.kind === "file" && (info.mode & 0o111) !== 0)) return path;
  }
  return undefined;
}

async function askVersion(host: Pick<Host, "run">, path: string): Promise<EnvoyVersion> {
  const next =
    "Check that it is an Envoy for this machine's processor and C library, or name another with --envoy PATH.";
  let output: string;
  try {
    const result = await host.run({ argv: [path, "--version"], timeoutMs: VERSION_TIMEOUT_MS });
    output = result.stdout + result.stderr;
  } catch (cause) {
    throw new VmmeshError("ENVOY_MISSING", `${path} cannot be run`, { cause, next });
  }
  const version = parseEnvoyVersion(output);
  if (version === undefined) {
    const cause = new Error(output.trim().slice(0, 200) || "it printed nothing");
    throw new VmmeshError("ENVOY_MISSING", `\`${path} --version\` names no Envoy version`, { cause, next });
  }
  return version;
}
