import { execFile } from "node:child_process";
import { promisify } from "node:util";

/** The oldest and the newest Envoy that vmmesh is tested with. */
export const ENVOY_VERSIONS = ["1.36.2", "1.40.0"] as const;
export type EnvoyTestVersion = (typeof ENVOY_VERSIONS)[number];

/** Path of a stock Envoy, fetched once for the machine. */
export async function fetchEnvoy(version: EnvoyTestVersion): Promise<string> {
  const script = new URL("../../scripts/fetch-envoy", import.meta.url).pathname;
  return (await promisify(execFile)(script, [version])).stdout.trim();
}
