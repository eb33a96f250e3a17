import type { Duplex } from "node:stream";

/**
 * Everything vmmesh may do to the machine, behind four small doors; a room asks only for those it needs
 * (`Pick<Host, "run">`), and a test hands it an object literal. The real one is `linux.ts`.
 */
export interface Host {
  /**
   * Runs a program, never through a shell. Resolves for every exit code.
   * @throws {VmmeshError} COMMAND_MISSING if it cannot be started, COMMAND_FAILED if it times out or is ended by a signal
   */
  run(command: Command, signal?: AbortSignal): Promise<CommandResult>;
  readonly files: Files;
  readonly clock: Clock;
  readonly net: Net;
  /** Cryptographically strong. */
  random(bytes: number): Uint8Array;
}

export interface Command {
  readonly argv: readonly [string, ...string[]];
  readonly input?: string;
  /** Default 30,000; 0 waits for ever (the signal ends it). */
  readonly timeoutMs?: number;
  readonly env?: Readonly<Record<string, string>>;
  /** Run as this user; only root may. */
  readonly as?: Owner;
  /** Output goes to our own stdout and stderr instead of the result. */
  readonly inheritOutput?: true;
  /**
   * For a program of somebody else's: more bytes than this on stdout or stderr, or the timeout, and it is killed with all
   * that it has started.
   */
  readonly maxOutputBytes?: number;
}

export interface CommandResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Numeric owner of a file. */
export interface Owner {
  readonly uid: number;
  readonly gid: number;
}

export interface FileInfo {
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly size: number;
  readonly modifiedMs: number;
  readonly kind: "file" | "directory" | "link" | "socket" | "other";
}

/** Files are small here: whole reads, whole writes. Missing is `undefined`, every other failure throws. */
export interface Files {
  read(path: string): Promise<Uint8Array | undefined>;
  readText(path: string): Promise<string | undefined>;
  /** Names, sorted; undefined if there is no such directory. */
  list(path: string): Promise<string[] | undefined>;
  /** Of the link itself, not of what it points to. */
  stat(path: string): Promise<FileInfo | undefined>;
  /** Temp file in the same folder, fsync, owner and mode, rename, fsync of the folder: a reader sees old or new, never a part. */
  writeAtomic(
    path: string,
    data: string | Uint8Array,
    options: { mode: number; owner?: Owner },
  ): Promise<void>;
  /** Points `path` at `target` in one step, whatever it pointed at before. */
  swapLink(path: string, target: string): Promise<void>;
  readLink(path: string): Promise<string | undefined>;
  /** With parents. An existing directory gets the mode and owner. */
  makeDir(path: string, options: { mode: number; owner?: Owner }): Promise<void>;
  /** A file, link or whole tree; missing is fine. */
  remove(path: string): Promise<void>;
  /** Changes its time, creating it empty (0660) if missing. */
  touch(path: string): Promise<void>;
  /** Whole lines out of a FIFO, as its writers come and go, until `signal` aborts. @throws the errno error of open(2) */
  lines(path: string, signal: AbortSignal): AsyncIterable<string>;
  /**
   * Holds an exclusive lock on a file while this process lives.
   * @returns undefined if another process holds it
   */
  lock(path: string): Promise<AsyncDisposable | undefined>;
}

export interface Clock {
  /** Wall clock: for dates in certificates and logs only. It may jump. */
  now(): Date;
  /** For measuring: never jumps, stands still in suspend. */
  monotonicMs(): number;
  /** Rejects with the reason of `signal`. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

/** A datagram socket. */
export interface Datagrams {
  send(data: Uint8Array, port: number, address: string): void;
  onMessage(listener: (data: Uint8Array, from: { address: string; port: number }) => void): void;
  close(): void;
  readonly port: number;
}

/** A datagram socket with one peer: nobody else's datagrams arrive, and its refusals (ICMP) are heard of. */
export interface Conversation {
  send(data: Uint8Array): void;
  onMessage(listener: (data: Uint8Array) => void): void;
  onError(listener: (error: Error) => void): void;
  close(): void;
}

export interface Listener extends AsyncDisposable {
  /** 0 for a unix socket. */
  readonly port: number;
}

export interface Net {
  /**
   * Binds a temporary name, sets mode and owner, then renames onto `path`: nobody ever meets a socket with a wrong mode.
   * A stale socket of a dead process is replaced. `onConnection` owns the socket it is given.
   */
  listenUnix(
    path: string,
    options: { mode: number; owner?: Owner },
    onConnection: (socket: Duplex) => void,
  ): Promise<Listener>;
  /** @throws the errno error of bind(2), e.g. EADDRINUSE */
  listenTcp(address: string, port: number, onConnection: (socket: Duplex) => void): Promise<Listener>;
  /** `port` 0 takes a free one. */
  bindUdp(address: string, port: number): Promise<Datagrams>;
  /** From a free port. @throws the errno error of connect(2), e.g. without a route */
  connectUdp(address: string, port: number): Promise<Conversation>;
  /** `localAddress` is the source address to bind. @throws ETIMEDOUT after `timeoutMs` */
  connectTcp(
    address: string,
    port: number,
    options: { timeoutMs: number; localAddress?: string },
  ): Promise<Duplex>;
  connectUnix(path: string, options: { timeoutMs: number }): Promise<Duplex>;
  /** Addresses of interfaces that are up, in the kernel's order, loopback included. */
  addresses(): { interface: string; family: 4 | 6; address: string; bits: number }[];
  hostname(): string;
  /** By the machine's own resolver; empty if the name has no address. */
  lookup(host: string): Promise<string[]>;
}
