import { VmmeshError } from "../core/errors.ts";
import type { Svid } from "../identity/svid.ts";
import type { Host } from "../platform/host.ts";
import type { KeyPair } from "../telemetry/tls.ts";

/** Certificate chain and key in a folder, by the names that a Secret of type kubernetes.io/tls and cert-manager use. */
export const PAIR_FILES = { chain: "tls.crt", key: "tls.key" } as const;

/**
 * What the metrics port shows for `VMMESH_METRICS_TLS`: the workload's own certificate, or what lies in a folder now.
 *
 * @throws {VmmeshError} NOT_READY before the first certificate, CONFIG_MALFORMED naming a file that cannot be read
 */
export async function metricsPair(
  files: Pick<Host["files"], "readText">,
  setting: string,
  svid: Svid | undefined,
): Promise<KeyPair> {
  if (setting === "workload") {
    if (svid === undefined) throw new VmmeshError("NOT_READY", "there is no workload certificate yet");
    return { key: svid.key, chain: svid.chain };
  }
  const read = async (name: string): Promise<string> => {
    const path = `${setting}/${name}`;
    const unreadable = (why: string, cause?: unknown): VmmeshError =>
      new VmmeshError("CONFIG_MALFORMED", `${path} ${why}`, { cause });
    const text = await files.readText(path).catch((thrown: unknown) => {
      throw unreadable("cannot be read by the agent", thrown);
    });
    if (text === undefined) throw unreadable("does not exist");
    return text;
  };
  const [chain, key] = await Promise.all([read(PAIR_FILES.chain), read(PAIR_FILES.key)]);
  return { key, chain };
}
