import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { createSocket } from "node:dgram";
import { lookup } from "node:dns/promises";
import { constants, openSync } from "node:fs";
import * as fs from "node:fs/promises";
import { createConnection, createServer, Socket } from "node:net";
import { hostname, networkInterfaces } from "node:os";
import { basename, dirname, join } from "node:path";
import type { Duplex } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { VmmeshError } from "../core/errors.ts";
import type { Clock, Command, CommandResult, FileInfo, Files, Host, Listener, Net, Owner } from "./host.ts";

const DEFAULT_TIMEOUT_MS = 30_000;

/** The real machine. */
export function linuxHost(): Host {
  return { run, files, clock, net, random: (bytes) => randomBytes(bytes) };
}

/** How long a program that was asked to end (SIGTERM) may take. */
const KILL_AFTER_MS = 2000;

/** Bare child_process: loading a library around it costs every repair 30 ms and the agent 9 MB. */
function run(command: Command, signal?: AbortSignal): Promise<CommandResult> {
  const { argv, input, as, env } = command;
  const timeoutMs = command.timeoutMs ?? DEFAULT_TIMEOUT_MS;
  const [program, ...args] = argv;
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const output = command.inheritOutput === true ? "inherit" : "pipe";
    const child = spawn(program, args, {
      stdio: [input === undefined ? "ignore" : "pipe", output, output],
      ...(env === undefined ? {} : { env: { ...process.env, ...env } }),
      ...(as === undefined ? {} : { uid: as.uid, gid: as.gid }),
      // A group of its own: what it starts would outlive it and hold its output open.
      detached: command.maxOutputBytes !== undefined,
    });
    const stdout: Buffer[] = [];
    const stderr: Buffer[] = [];
    let tooMuch = false;
    const collect = (into: Buffer[]) => {
      let left = command.maxOutputBytes ?? Number.POSITIVE_INFINITY;
      return (part: Buffer): void => {
        left -= part.length;
        if (left >= 0) into.push(part);
        else if (!tooMuch) {
          tooMuch = true;
          end();
        }
      };
    };
    child.stdout?.on("data", collect(stdout));
    child.stderr?.on("data", collect(stderr));
    // A program that ends without reading its input is judged by its exit code.
    child.stdin?.on("error", () => undefined);
    child.stdin?.end(input);

    let timedOut = false;
    const timers: NodeJS.Timeout[] = [];
    const end = (): void => {
      if (command.maxOutputBytes !== undefined && child.pid !== undefined) {
        killGroup(child.pid);
        return;
      }
      child.kill("SIGTERM");
      timers.push(setTimeout(() => child.kill("SIGKILL"), KILL_AFTER_MS));
    };
    if (timeoutMs > 0)
      timers.push(
        setTimeout(() => {
          timedOut = true;
          end();
        }, timeoutMs),
      );
    signal?.addEventListener("abort", end, { once: true });
    const over = (): void => {
      for (const timer of timers) clearTimeout(timer);
      signal?.removeEventListener("abort", end);
    };
    const failed = (how: string, cause?: Error): VmmeshError =>
      new VmmeshError("COMMAND_FAILED", `\`${argv.join(" ")}\` ${how}`, { cause });
    child.once("error", (cause: NodeJS.ErrnoException) => {
      over();
      reject(
        cause.code === "ENOENT"
          ? new VmmeshError("COMMAND_MISSING", `the program \`${program}\` is not installed`, {
              next: `Install the package that brings \`${program}\`, then run the same command again.`,
            })
          : failed("could not be started", cause),
      );
    });
    child.once("close", (code, killedBy) => {
      over();
      if (signal?.aborted === true && code === null) reject(signal.reason as Error);
      else if (tooMuch) reject(failed(`printed more than ${command.maxOutputBytes} bytes`));
      else if (timedOut) reject(failed(`did not end within ${timeoutMs / 1000} s`));
      else if (code === null) reject(failed(`was ended by ${String(killedBy)}`));
      else
        resolve({ code, stdout: Buffer.concat(stdout).toString(), stderr: Buffer.concat(stderr).toString() });
    });
  });
}

function killGroup(leader: number): void {
  try {
    process.kill(-leader, "SIGKILL");
  } catch (thrown) {
    // It has ended just now.
    if ((thrown as NodeJS.ErrnoException).code !== "ESRCH") throw thrown;
  }
}

/** `undefined` instead of ENOENT; every other error goes on. */
async function ifPresent<T>(work: Promise<T>): Promise<T | undefined> {
  try {
    return await work;
  } catch (thrown) {
    const code = (thrown as NodeJS.ErrnoException).code;
    if (code === "ENOENT" || code === "ENOTDIR") return undefined;
    throw thrown;
  }
}

const files: Files = {
  read: (path) => ifPresent(fs.readFile(path)),
  readText: (path) => ifPresent(fs.readFile(path, "utf8")),
  async list(path) {
    return (await ifPresent(fs.readdir(path)))?.sort();
  },
  async stat(path) {
    const stat = await ifPresent(fs.lstat(path));
    if (stat === undefined) return undefined;
    const kind: FileInfo["kind"] = stat.isFile()
      ? "file"
      : stat.isDirectory()
        ? "directory"
        : stat.isSymbolicLink()
          ? "link"
          : stat.isSocket()
            ? "socket"
            : "other";
    return {
      mode: stat.mode & 0o7777,
      uid: stat.uid,
      gid: stat.gid,
      size: stat.size,
      modifiedMs: stat.mtimeMs,
      kind,
    };
  },
  async writeAtomic(path, data, { mode, owner }) {
    const temporary = join(dirname(path), `.${basename(path)}.${randomBytes(6).toString("hex")}`);
    const handle = await fs.open(temporary, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600);
    try {
      try {
        await handle.writeFile(data);
        if (owner !== undefined) await handle.chown(owner.uid, owner.gid);
        await handle.chmod(mode);
        await handle.sync();
      } finally {
        await handle.close();
      }
      await fs.rename(temporary, path);
    } catch (thrown) {
      await fs.rm(temporary, { force: true });
      throw thrown;
    }
    await using folder = await fs.open(dirname(path), "r");
    await folder.sync();
  },
  async swapLink(path, target) {
    const temporary = join(dirname(path), `.${basename(path)}.${randomBytes(6).toString("hex")}`);
    await fs.symlink(target, temporary);
    await fs.rename(temporary, path);
  },
  readLink: (path) => ifPresent(fs.readlink(path)),
  async makeDir(path, { mode, owner }) {
    // mkdir(2) would give missing parents this mode too, and a parent that is root's alone keeps the owner out.
    await fs.mkdir(dirname(path), { recursive: true, mode: 0o755 });
    await fs.mkdir(path, { recursive: true, mode });
    if (owner !== undefined) await fs.chown(path, owner.uid, owner.gid);
    await fs.chmod(path, mode);
  },
  remove: (path) => fs.rm(path, { recursive: true, force: true }),
  async touch(path) {
    const handle = await fs.open(path, "a", 0o660);
    try {
      await handle.utimes(new Date(), new Date());
    } finally {
      await handle.close();
    }
  },
  async *lines(path, signal) {
    // Not blocking, or a thread of the pool would wait for ever; for reading and writing, or the end of a writer would be the end.
    const fd = openSync(path, constants.O_RDWR | constants.O_NONBLOCK);
    const pipe = new Socket({ fd, readable: true, writable: false, signal });
    pipe.setEncoding("utf8");
    let rest = "";
    try {
      for await (const part of pipe as AsyncIterable<string>) {
        const pieces = `${rest}${part}`.split("\n");
        rest = pieces.pop() ?? "";
        yield* pieces;
      }
    } catch (thrown) {
      if (!signal.aborted) throw thrown;
    } finally {
      pipe.destroy();
    }
  },
  async lock(path) {
    // Node has no flock(2). A lock file that names its holder by pid and start time survives nothing: a dead holder is seen as such.
    const mine = `${process.pid} ${await startTime(process.pid)}`;
    const draft = `${path}.${randomBytes(6).toString("hex")}`;
    for (let attempt = 0; attempt < 3; attempt += 1) {
      try {
        // Whoever held it before may have taken the folder away with it.
        await fs.mkdir(dirname(path), { recursive: true, mode: 0o700 });
        // Linked into place when it is complete: one that is still empty would be taken for a dead holder's.
        await fs.writeFile(draft, mine, { mode: 0o600 });
        await fs.link(draft, path);
        return {
          async [Symbol.asyncDispose]() {
            if ((await files.readText(path)) === mine) await fs.rm(path, { force: true });
          },
        };
      } catch (thrown) {
        const { code } = thrown as NodeJS.ErrnoException;
        if (code === "ENOENT") continue;
        if (code !== "EEXIST") throw thrown;
      } finally {
        await fs.rm(draft, { force: true });
      }
      const found = await files.readText(path);
      if (found === undefined) continue;
      const [pid, since] = found.split(" ");
      if ((await startTime(Number(pid))) === since) return undefined;
      // Others may have found the same dead holder: what is taken away must still be its lock, not one that came after.
      const dead = `${draft}.dead`;
      await fs.rename(path, dead).catch(() => undefined);
      const taken = await files.readText(dead);
      if (taken !== undefined && taken !== found) await fs.link(dead, path).catch(() => undefined);
      await fs.rm(dead, { force: true });
    }
    return undefined;
  },
};

/** Field 22 of /proc/PID/stat: with the pid it names one process for ever (proc(5)). Empty if there is no such process. */
async function startTime(pid: number): Promise<string> {
  const stat = await files.readText(`/proc/${pid}/stat`);
  const fields = stat?.slice(stat.lastIndexOf(")") + 2).split(" ") ?? [];
  // A killed process that nobody has waited for yet holds nothing any more.
  return fields[0] === "Z" || fields[0] === "X" ? "" : (fields[19] ?? "");
}

const clock: Clock = {
  now: () => new Date(),
  monotonicMs: () => performance.now(),
  // A deadline that has passed meanwhile is a negative wait, of which Node warns.
  sleep: (ms, signal) => sleep(Math.max(0, ms), undefined, signal === undefined ? {} : { signal }),
};

function listen(
  bind: (server: ReturnType<typeof createServer>) => void,
  onConnection: (socket: Duplex) => void,
): Promise<ReturnType<typeof createServer>> {
  return new Promise((resolve, reject) => {
    const server = createServer({ pauseOnConnect: false }, onConnection);
    server.once("error", reject);
    server.once("listening", () => {
      server.off("error", reject);
      resolve(server);
    });
    bind(server);
  });
}

function listenerOf(server: ReturnType<typeof createServer>, cleanUp: () => Promise<void>): Listener {
  const address = server.address();
  return {
    port: typeof address === "object" && address !== null ? address.port : 0,
    async [Symbol.asyncDispose]() {
      server.close();
      await cleanUp();
    },
  };
}

function connected(socket: ReturnType<typeof createConnection>, timeoutMs: number): Promise<Duplex> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      socket.destroy(Object.assign(new Error(`no connection within ${timeoutMs} ms`), { code: "ETIMEDOUT" }));
    }, timeoutMs);
    socket.once("error", (error) => {
      clearTimeout(timer);
      reject(error);
    });
    socket.once("connect", () => {
      clearTimeout(timer);
      socket.removeAllListeners("error");
      resolve(socket);
    });
  });
}

async function setOwner(path: string, owner: Owner | undefined): Promise<void> {
  if (owner !== undefined) await fs.chown(path, owner.uid, owner.gid);
}

const net: Net = {
  async listenUnix(path, { mode, owner }, onConnection) {
    const temporary = join(dirname(path), `.${basename(path)}.${randomBytes(4).toString("hex")}`);
    const server = await listen((it) => it.listen(temporary), onConnection);
    await fs.chmod(temporary, mode);
    await setOwner(temporary, owner);
    await fs.rename(temporary, path);
    const inode = (await fs.stat(path)).ino;
    return listenerOf(server, async () => {
      // A successor may have put its own socket there already.
      if ((await ifPresent(fs.stat(path)))?.ino === inode) await fs.rm(path, { force: true });
    });
  },
  async listenTcp(address, port, onConnection) {
    return listenerOf(
      await listen((it) => it.listen({ host: address, port }), onConnection),
      async () => undefined,
    );
  },
  bindUdp(address, port) {
    return new Promise((resolve, reject) => {
      const socket = createSocket(
        address.includes(":") ? { type: "udp6", ipv6Only: true } : { type: "udp4" },
      );
      socket.once("error", reject);
      socket.bind({ address, port, exclusive: true }, () => {
        socket.off("error", reject);
        // A send to a closed port comes back as an error event later; datagrams may be lost, so it changes nothing.
        socket.on("error", () => undefined);
        resolve({
          send: (data, toPort, toAddress) => socket.send(data, toPort, toAddress, () => undefined),
          onMessage: (listener) => {
            socket.on("message", (data, from) => listener(data, { address: from.address, port: from.port }));
          },
          close: () => socket.close(),
          port: socket.address().port,
        });
      });
    });
  },
  connectUdp(address, port) {
    return new Promise((resolve, reject) => {
      const socket = createSocket(address.includes(":") ? "udp6" : "udp4");
      const refuse = (error: Error): void => {
        socket.close();
        reject(error);
      };
      socket.once("error", refuse);
      socket.connect(port, address, () => {
        socket.off("error", refuse).on("error", () => undefined);
        resolve({
          send: (data) => socket.send(data),
          onMessage: (listener) => void socket.on("message", listener),
          onError: (listener) => void socket.on("error", listener),
          close: () => void socket.close(),
        });
      });
    });
  },
  connectTcp: (address, port, { timeoutMs, localAddress }) =>
    connected(
      createConnection({ host: address, port, ...(localAddress === undefined ? {} : { localAddress }) }),
      timeoutMs,
    ),
  connectUnix: (path, { timeoutMs }) => connected(createConnection({ path }), timeoutMs),
  addresses() {
    return Object.entries(networkInterfaces()).flatMap(([name, list]) =>
      (list ?? []).map((entry) => ({
        interface: name,
        family: entry.family === "IPv6" ? (6 as const) : (4 as const),
        address: entry.address,
        bits: Number(entry.cidr?.split("/")[1] ?? (entry.family === "IPv6" ? 128 : 32)),
      })),
    );
  },
  hostname,
  async lookup(host) {
    try {
      return (await lookup(host, { all: true })).map((entry) => entry.address);
    } catch (thrown) {
      const code = (thrown as NodeJS.ErrnoException).code;
      // EAI_AGAIN: no resolver answers; whoever asked knows no address either.
      if (code === "ENOTFOUND" || code === "ENODATA" || code === "EAI_AGAIN") return [];
      throw thrown;
    }
  },
};
