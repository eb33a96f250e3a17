import type { Paths } from "../core/paths.ts";
import type { FenceCounts } from "../iptables/counts.ts";
import type { Host } from "../platform/host.ts";

/** What root last saw of the rules; the agent, which may not read them, shows it. */
export interface CaptureState {
  readonly inForce: boolean;
  readonly repairs: number;
  readonly inbound: string;
  readonly outbound: string;
  readonly failurePolicy?: readonly string[];
  /** Whose tables the rules are in, and why there. */
  readonly backend?: string;
  /** Absent until a fence was read. */
  readonly counts?: FenceCounts;
}

const NOTHING: CaptureState = { inForce: false, repairs: 0, inbound: "nothing", outbound: "nothing" };

export async function readCaptureState(
  files: Pick<Host["files"], "readText">,
  paths: Paths,
): Promise<CaptureState> {
  const text = await files.readText(paths.captureState);
  if (text === undefined) return NOTHING;
  try {
    return { ...NOTHING, ...(JSON.parse(text) as Partial<CaptureState>) };
  } catch {
    return NOTHING;
  }
}

export async function writeCaptureState(
  host: Pick<Host, "files">,
  paths: Paths,
  change: Partial<CaptureState>,
): Promise<void> {
  const state = { ...(await readCaptureState(host.files, paths)), ...change };
  await host.files.writeAtomic(paths.captureState, `${JSON.stringify(state)}\n`, { mode: 0o644 });
}
