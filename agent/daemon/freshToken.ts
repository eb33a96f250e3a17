import { VmmeshError } from "../core/errors.ts";
import type { Paths } from "../core/paths.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host } from "../platform/host.ts";
import type { Owners } from "../platform/users.ts";
import { adminClient } from "../telemetry/admin.ts";
import type { StatusSnapshot } from "../telemetry/status.ts";
import { readWorkload, spiffeOf } from "./workloadFiles.ts";

const WITHIN_MS = 30 * SECOND_MS;
const POLL_MS = 200;
const CONDITION = "identity-not-renewed";

/** What a new bundle brings for a machine that is joined already. */
export interface FreshToken {
  readonly token: string | undefined;
  readonly rootCert: string;
  readonly spiffe: string;
}

/** Does the running agent fail to renew its certificate? An agent that does not answer says nothing of it. */
export async function wantsToken(host: Pick<Host, "net" | "clock">, paths: Paths): Promise<boolean> {
  try {
    return failure(await adminClient(host.net, paths.adminSocket, host.clock).status()) !== undefined;
  } catch {
    return false;
  }
}

/**
 * Puts token and roots where the agent looks for them, and waits until it has a certificate by them. Nothing else of the
 * machine is touched.
 *
 * @throws {VmmeshError} USAGE if the bundle is of another workload or holds no token; NOT_READY in the agent's words
 */
export async function renewByToken(
  host: Pick<Host, "files" | "net" | "clock">,
  paths: Paths,
  owners: Owners,
  fresh: FreshToken,
  signal: AbortSignal,
): Promise<void> {
  const ours = spiffeOf(await readWorkload(host, paths));
  if (fresh.spiffe !== ours) {
    throw new VmmeshError("USAGE", `the bundle is for ${fresh.spiffe}, but this machine is ${ours}`, {
      next: "Make one for this machine's workload group, or `vmmesh leave` first to become another.",
    });
  }
  if (fresh.token === undefined) {
    throw new VmmeshError("USAGE", "the bundle holds no token, and the identity needs one", {
      next: "Make the bundle anew: `vmmesh bundle create`.",
    });
  }
  await host.files.writeAtomic(paths.rootCert, fresh.rootCert, { mode: 0o644 });
  await host.files.writeAtomic(paths.token, fresh.token, { mode: 0o600, owner: owners.agent });
  const admin = adminClient(host.net, paths.adminSocket, host.clock);
  const deadline = host.clock.monotonicMs() + WITHIN_MS;
  let why: string | undefined;
  do {
    await host.clock.sleep(POLL_MS, signal);
    why = failure(await admin.status());
    if (why === undefined) return;
  } while (host.clock.monotonicMs() < deadline);
  throw new VmmeshError("NOT_READY", `the new token is in place, but the identity is not renewed: ${why}`, {
    next: "`vmmesh status` shows each attempt; the agent goes on trying.",
  });
}

function failure({ conditions }: StatusSnapshot): string | undefined {
  return conditions.find(({ id }) => id === CONDITION)?.message;
}
