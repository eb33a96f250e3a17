import { once } from "node:events";
import type { Duplex } from "node:stream";
import { createSecureContext, type SecureContext, TLSSocket } from "node:tls";

/** Private key and certificate chain, both PEM. */
export interface KeyPair {
  readonly key: string;
  readonly chain: string;
}

/** The first byte of a connection that opens with TLS: a record of type handshake (RFC 8446, section 5.1). No HTTP method begins with it. */
const HANDSHAKE = 0x16;

/** @throws OpenSSL's words if one of both cannot be read or they do not fit */
export function contextOf({ key, chain }: KeyPair): SecureContext {
  return createSecureContext({ key, cert: chain, minVersion: "TLSv1.2" });
}

/**
 * TLS on a port that also takes plain text. The pair is asked for at each connection, so one that was renewed counts at
 * once; while there is none that fits, the last good one is used: a renewal replaces two files, one after the other.
 */
export class TlsDoor {
  readonly #pair: () => Promise<KeyPair>;
  readonly #report: (trouble: unknown) => void;
  #context: { readonly of: KeyPair; readonly value: SecureContext } | undefined;

  /** @param report gets what is wrong with the pair, and undefined when nothing is (any more) */
  constructor(pair: () => Promise<KeyPair>, report: (trouble: unknown) => void) {
    this.#pair = pair;
    this.#report = report;
  }

  /** What TLS carries on `socket`; the socket itself if it begins in plain text. @throws if there was never a pair that fits */
  async open(socket: Duplex): Promise<Duplex> {
    await once(socket, "readable");
    const head = socket.read() as Buffer | null;
    if (head !== null) socket.unshift(head);
    if (head?.[0] !== HANDSHAKE) return socket;
    const inner = new TLSSocket(socket as never, { isServer: true, secureContext: await this.#current() });
    return inner.on("error", () => inner.destroy());
  }

  async #current(): Promise<SecureContext> {
    try {
      const pair = await this.#pair();
      const before = this.#context?.of;
      if (this.#context === undefined || before?.key !== pair.key || before.chain !== pair.chain)
        this.#context = { of: pair, value: contextOf(pair) };
      this.#report(undefined);
    } catch (thrown) {
      this.#report(thrown);
      if (this.#context === undefined) throw thrown;
    }
    return this.#context.value;
  }
}
