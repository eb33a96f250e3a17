import type { Host } from "../platform/host.ts";

/** What can be told to systemd (sd_notify(3)). */
export interface Notice {
  readonly ready?: true;
  readonly stopping?: true;
  /** One line for `systemctl status`. */
  readonly status?: string;
}

/**
 * Tells systemd how we are, through `systemd-notify`: Node can send no datagram to a unix socket. The unit needs
 * `NotifyAccess=all`, because a child does the sending. Without NOTIFY_SOCKET in `env` nothing is started at all.
 *
 * Each call is one fork, about 8 ms of processor time in both processes together: meant for changes of state and a slow watchdog, not for progress.
 */
export class Notifier {
  readonly #host: Pick<Host, "run" | "clock">;
  readonly #env: Readonly<Record<string, string | undefined>>;
  readonly #onFailure: (cause: unknown) => void;

  constructor(
    host: Pick<Host, "run" | "clock">,
    env: Readonly<Record<string, string | undefined>>,
    onFailure: (cause: unknown) => void,
  ) {
    this.#host = host;
    this.#env = env;
    this.#onFailure = onFailure;
  }

  /** Never rejects: a service manager that does not listen is no reason to end. */
  async tell(notice: Notice): Promise<void> {
    const words: string[] = [];
    if (notice.ready === true) words.push("READY=1");
    if (notice.stopping === true) words.push("STOPPING=1");
    if (notice.status !== undefined) words.push(`STATUS=${notice.status.replace(/\s+/g, " ")}`);
    await this.#send(words);
  }

  /** Half of the period that systemd asks for, in milliseconds; undefined if it does not watch us. */
  get watchdogMs(): number | undefined {
    const { NOTIFY_SOCKET: socket, WATCHDOG_USEC: usec = "", WATCHDOG_PID: pid } = this.#env;
    if (socket === undefined || !/^[1-9]\d*$/.test(usec)) return undefined;
    return pid === undefined || pid === String(process.pid) ? Number(usec) / 2000 : undefined;
  }

  /**
   * Beats until `signal` aborts; returns at once if nobody watches. `alive` is asked before each beat: false leaves it
   * out, and systemd restarts us when the period is over.
   */
  async keepAlive(alive: () => boolean, signal: AbortSignal): Promise<void> {
    const periodMs = this.watchdogMs;
    while (periodMs !== undefined && !signal.aborted) {
      if (alive()) await this.#send(["WATCHDOG=1"]);
      await this.#host.clock.sleep(periodMs, signal).catch(() => undefined);
    }
  }

  async #send(words: readonly string[]): Promise<void> {
    if (this.#env["NOTIFY_SOCKET"] === undefined || words.length === 0) return;
    try {
      const result = await this.#host.run({ argv: ["systemd-notify", ...words], timeoutMs: 5000 });
      if (result.code !== 0) this.#onFailure(new Error(`systemd-notify: ${result.stderr.trim()}`));
    } catch (thrown) {
      this.#onFailure(thrown);
    }
  }
}
