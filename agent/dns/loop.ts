/**
 * Below it are questions that we send to find loops. Nobody has it, and unlike `.invalid` resolvers pass it on: ICANN
 * reserved `.internal` for private use.
 */
const SUFFIX = ".loop.vmmesh.internal.";

/** Routed to us by systemd-resolved, so that such a question to it says whether the route stands. */
export const OWN_DOMAIN = "~loop.vmmesh.internal";

/**
 * Finds resolvers that send our questions back to us, as dnsmasq does where capture also takes what it forwards
 * (istio #29555): each is asked for a name that it alone was asked for, so what arrives here says whose it is.
 */
export class LoopWatch {
  /** Names that are on their way. */
  readonly #asked = new Map<string, { readonly server: string; cameBack: boolean }>();
  readonly #looping = new Set<string>();

  /** The name to ask `server` for. `token` must be fresh. */
  nameFor(server: string, token: string): string {
    const name = `${token}${SUFFIX}`;
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
    return name.endsWith(SUFFIX);
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
