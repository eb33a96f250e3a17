import { messageOf } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Conditions } from "../health/conditions.ts";
import type { Host } from "../platform/host.ts";

export interface TellDeps {
  readonly host: Pick<Host, "clock"> & { readonly net: Pick<Host["net"], "connectUnix"> };
  /** Of vmmesh-resolved.socket. */
  readonly socket: string;
  readonly conditions: Pick<Conditions, "raise" | "clear">;
  /** Whether resolv.conf names systemd-resolved, and there is somebody to tell it. */
  applies(): Promise<boolean>;
  /** As resolved.conf(5) writes them. */
  domains(): readonly string[];
  /** What resolved sends us from now on, or may. */
  onRoutes(domains: readonly string[]): void;
  /** A question of ours to resolved came back to us. */
  routed(signal: AbortSignal): Promise<boolean>;
}

const LOOK_MS = 2 * SECOND_MS;
/** Each order starts a program. One that fails (a systemd before 246, a resolved that was stopped) is repeated ever later. */
const MAX_LOOK_MS = 64 * SECOND_MS;
const REPLY_MS = 15 * SECOND_MS;

/**
 * Keeps systemd-resolved sending us the questions for the mesh's names, until `signal` aborts: told when the domains
 * change, and again when a question of ours does not come back, whoever took the route away.
 */
export async function tellResolved(deps: TellDeps, signal: AbortSignal): Promise<void> {
  let told: readonly string[] = [];
  let pauseMs = LOOK_MS;
  for (;;) {
    if (await deps.applies()) {
      const wanted = deps.domains();
      if (wanted.join(" ") !== told.join(" ") || !(await deps.routed(signal))) {
        deps.onRoutes([...told, ...wanted]);
        const fault = await tell(deps, wanted.join(" "), signal);
        if (fault === undefined) {
          told = wanted;
          deps.onRoutes(told);
          pauseMs = LOOK_MS;
          deps.conditions.clear("names-not-routed");
        } else {
          pauseMs = Math.min(2 * pauseMs, MAX_LOOK_MS);
          deps.conditions.raise(
            "names-not-routed",
            "warning",
            `programs that ask systemd-resolved without resolv.conf do not get the mesh's names: ${fault}`,
            "Others get them, their questions are captured. `resolvectl status` and `journalctl -u 'vmmesh-resolved@*'` say more; vmmesh keeps trying.",
          );
        }
      }
    } else {
      pauseMs = LOOK_MS;
      deps.conditions.clear("names-not-routed");
    }
    await deps.host.clock.sleep(pauseMs, signal);
  }
}

/** @returns what went wrong */
async function tell(
  { host, socket }: TellDeps,
  wanted: string,
  signal: AbortSignal,
): Promise<string | undefined> {
  const scope = new AbortController();
  try {
    const connection = await host.net.connectUnix(socket, { timeoutMs: REPLY_MS });
    try {
      const reply = new Promise<string>((resolve, reject) => {
        let text = "";
        connection.on("data", (part: Buffer) => {
          text += part.toString("utf8");
          if (text.includes("\n") || text.length > 4096) resolve(text.trim());
        });
        connection.on("error", reject);
        connection.on("close", () => reject(new Error("it ended without an answer")));
      });
      const late = host.clock.sleep(REPLY_MS, AbortSignal.any([signal, scope.signal])).then(() => {
        throw new Error(`no answer within ${REPLY_MS / SECOND_MS} s`);
      });
      connection.write(`${wanted}\n`);
      const said = await Promise.race([reply, late]);
      return said === "ok" ? undefined : said;
    } finally {
      connection.destroy();
    }
  } catch (thrown) {
    signal.throwIfAborted();
    return messageOf(thrown);
  } finally {
    scope.abort();
  }
}
