/**
 * Below them are questions that we send to find out where they arrive. Nobody has them, and unlike `.invalid` resolvers
 * pass them on: ICANN reserved `.internal` for private use.
 */
export const LOOP_SUFFIX = ".loop.vmmesh.internal.";
/** systemd-resolved is told to send these to us: what comes back is no loop, and says that the route stands. */
export const ROUTE_SUFFIX = ".route.vmmesh.internal.";

/**
 * Finds resolvers that send our questions back to us, as dnsmasq does where capture also takes what it forwards
 * (istio #29555): each is asked for a name that it alone was asked for, so what arrives here says whose it is.
 */
export class LoopWatch {
  /** Names that are on their way. */
  readonly #asked = new Map<string, { readonly server: string; cameBack: boolean }>();
  readonly #looping = new Set<string>();
  readonly #suffix: string;

  constructor(suffix: string) {
    this.#suffix = suffix;
  }

  /** The name to ask `server` for. `token` must be fresh. */
  nameFor(server: string, token: string): string {
    const name = `${token}${this.#suffix}`;
    this.#asked.set(name, { server, cameBack: false });
    return name;
  }

  /** Whether a question that arrived here, in lower case, is one of this kind. If we sent it, its server is a loop. */
  arrived(name: string): boolean {
    const asked = this.#asked.get(name);
    if (asked !== undefined) {
      asked.cameBack = true;
      this.#looping.add(asked.server);
    }
    return name.endsWith(this.#suffix);
  }

  /** The server has answered or was silent for long: one that loops no more is asked again. */
  settle(name: string): void {
    const asked = this.#asked.get(name);
    if (asked?.cameBack === false) this.#looping.delete(asked.server);
    this.#asked.delete(name);
  }

  loops(server: string): boolean {
    return this.#looping.has(server);
  }
}
