import { type ListeningSocket, parseListeners } from "../parse.ts";
import { type Reads, tryRun } from "../read.ts";
import type { Family } from "../rules.ts";
import { readIpSets } from "./ipset.ts";
import type { Route, RouteQuestion, Socket, World } from "./model.ts";
import { addressNumber, addressText } from "./packet.ts";

/** What the kernel was asked already, and what a walk asked in vain; a walk is repeated until it asks nothing new. */
export interface Machine {
  readonly world: World;
  /** Asks the kernel all that the walks since the last call wanted to know. @returns whether there was any */
  answer(): Promise<boolean>;
  readonly listeners: { readonly tcp: readonly ListeningSocket[]; readonly udp: readonly ListeningSocket[] };
}

/** Reads what does not depend on the packet, and remembers what does. */
export async function readWorld(
  host: Reads,
  { recentLists, ipSets }: { readonly recentLists: readonly string[]; readonly ipSets: boolean },
): Promise<Machine> {
  const routes = new Map<string, Route>();
  const asked = new Map<string, RouteQuestion>();
  const text = async (...argv: [string, ...string[]]): Promise<string> =>
    (await tryRun(host, { argv }))?.stdout ?? "";
  const [tcp, udp, addresses, sets] = await Promise.all([
    readSockets(host, "-ltnpH"),
    readSockets(host, "-lunpH"),
    text("ip", "-j", "addr"),
    ipSets ? readIpSets(host) : new Map(),
  ]);
  const listeners = { tcp, udp, icmp: [] };
  const firstAddress = firstAddresses(addresses);
  const visible = visibleAddresses(addresses);
  const recent = await readRecent(host, recentLists);
  const world: World = {
    route(question) {
      const key = routeCommand(question).join(" ");
      const known = routes.get(key);
      if (known === undefined) asked.set(key, question);
      return known;
    },
    addressOf: (device, family) => firstAddress.get(`${device} ${family}`),
    visibleAddress: (device, family) =>
      visible.find((it) => it.family === family && it.device === device)?.address ??
      visible.find((it) => it.family === family)?.address,
    socket: (protocol, family, address, port) => findSocket(listeners[protocol], family, address, port),
    recent,
    ipSets: sets,
  };
  return {
    world,
    listeners,
    async answer() {
      const questions = [...asked];
      asked.clear();
      await Promise.all(
        questions.map(async ([key, question]) => {
          const result = await tryRun(host, { argv: ["ip", ...routeCommand(question)] });
          routes.set(key, parseRoute(result?.code === 0 ? result.stdout : "", result?.stderr ?? ""));
        }),
      );
      return questions.length > 0;
    },
  };
}

const isWildcard = (address: string): boolean => address === "*" || address === "0.0.0.0" || address === "::";

/** Does a packet to this address reach this socket? `*` is a socket of both families. */
function listens(socket: ListeningSocket, family: Family, address: bigint, port: bigint): boolean {
  if (BigInt(socket.port) !== port) return false;
  if (socket.address === "*") return true;
  if (socket.address.includes(":") !== (family === 6)) return false;
  return isWildcard(socket.address) || addressNumber(socket.address) === address;
}

interface SeenSocket extends ListeningSocket {
  /** Missing or undefined: this machine's ss cannot say, or was not asked. */
  readonly transparent?: boolean | undefined;
}

/** Who gets a packet to this address; undefined: nobody does. */
export function findSocket(
  sockets: readonly SeenSocket[],
  family: Family,
  address: bigint,
  port: bigint,
): Socket | undefined {
  const found = sockets
    .filter((socket) => listens(socket, family, address, port))
    // One that is bound to the very address goes first.
    .sort((a, b) => Number(isWildcard(a.address)) - Number(isWildcard(b.address)))[0];
  return found === undefined
    ? undefined
    : {
        name: found.processes[0]?.name ?? "",
        wildcard: isWildcard(found.address),
        transparent: found.transparent,
      };
}

/** With the options of each socket where ss can tell them (iproute2 5.13). */
async function readSockets(host: Reads, which: string): Promise<SeenSocket[]> {
  const full = await tryRun(host, { argv: ["ss", `${which}O`, "--inet-sockopt"] });
  const told = full?.code === 0;
  const text = told ? full.stdout : ((await tryRun(host, { argv: ["ss", which] }))?.stdout ?? "");
  return text.split("\n").flatMap((line) =>
    parseListeners(line).map((socket) => ({
      ...socket,
      transparent: told ? /inet-sockopt: \([^)]*\btransparent\b/.test(line) : undefined,
    })),
  );
}

/** @see ip-route(8) */
function routeCommand({ family, to, from, mark, uid, in: device }: RouteQuestion): string[] {
  return [
    `-${family}`,
    "-j",
    "route",
    "get",
    addressText(to, family),
    ...(from === undefined ? [] : ["from", addressText(from, family)]),
    ...(device === undefined ? [] : ["iif", device]),
    ...(mark === undefined || mark === 0n ? [] : ["mark", String(mark)]),
    ...(uid === undefined || device !== undefined ? [] : ["uid", String(uid)]),
  ];
}

/** One line of `ip -j route get`. */
function parseRoute(json: string, stderr: string): Route {
  const [found] = json.trim() === "" ? [] : (JSON.parse(json) as Record<string, unknown>[]);
  if (found === undefined) {
    const refused = stderr.trim().split("\n")[0] ?? "";
    return {
      type: "unreachable",
      device: "",
      source: undefined,
      refused: refused.replace(/^RTNETLINK answers: /, "") || "no route",
    };
  }
  const cache = Array.isArray(found["cache"]) ? found["cache"] : [];
  const type =
    typeof found["type"] === "string" ? found["type"] : cache.includes("local") ? "local" : "unicast";
  return {
    type,
    device: String(found["dev"]),
    source: typeof found["prefsrc"] === "string" ? addressNumber(found["prefsrc"]) : undefined,
  };
}

/** By `device family`, as `ip addr` lists them. IPv6: one of global scope, if there is any. */
function firstAddresses(json: string): Map<string, bigint> {
  const found = new Map<string, bigint>();
  const links = json.trim() === "" ? [] : (JSON.parse(json) as Record<string, unknown>[]);
  for (const { ifname, addr_info: infos } of links) {
    const all = (Array.isArray(infos) ? infos : []) as Record<string, unknown>[];
    for (const family of [4, 6] as const) {
      const own = all.filter((info) => info["family"] === (family === 4 ? "inet" : "inet6"));
      const [first] = [...own.filter(({ scope }) => scope === "global"), ...own];
      const address = addressNumber(String((family === 4 ? own[0] : first)?.["local"] ?? ""));
      if (address !== undefined) found.set(`${String(ifname)} ${family}`, address);
    }
  }
  return found;
}

/** Of global scope, in the kernel's order of interfaces. */
function visibleAddresses(json: string): { device: string; family: Family; address: bigint }[] {
  const links = json.trim() === "" ? [] : (JSON.parse(json) as Record<string, unknown>[]);
  return links.flatMap(({ ifname, addr_info: infos }) =>
    ((Array.isArray(infos) ? infos : []) as Record<string, unknown>[]).flatMap((info) => {
      const address = addressNumber(String(info["local"] ?? ""));
      if (info["scope"] !== "global" || address === undefined) return [];
      return [{ device: String(ifname), family: info["family"] === "inet" ? 4 : 6, address } as const];
    }),
  );
}

/** The kernel's tick rates. @see kernel/Kconfig.hz */
const RATES = [100, 250, 300, 1000] as const;

/**
 * /proc/net/xt_recent dates its entries in jiffies; /proc/timer_list says which jiffy it is now. On 64 bits they began at
 * 2^32 - 300 s (jiffies.h), which gives the rate.
 */
async function readRecent(host: Pick<Reads, "files">, names: readonly string[]): Promise<World["recent"]> {
  if (names.length === 0) return () => undefined;
  const lists = new Map<string, string>();
  for (const name of names) {
    const text = await host.files.readText(`/proc/net/xt_recent/${name}`);
    if (text !== undefined) lists.set(name, text);
  }
  const timers = (await host.files.readText("/proc/timer_list")) ?? "";
  const uptime = Number(/^now at (\d+) nsecs/m.exec(timers)?.[1] ?? Number.NaN) / 1e9;
  const now = Math.max(
    ...[...timers.matchAll(/\.last_jiffies\s*: (\d+)/g)].map(([, jiffies]) => Number(jiffies)),
  );
  const measured = (now - 2 ** 32) / (uptime - 300);
  const rate = RATES.find((hz) => Math.abs(measured / hz - 1) < 0.05);
  return (list, address) => {
    const text = lists.get(list);
    if (text === undefined || rate === undefined) return undefined;
    for (const [, from = "", seen] of text.matchAll(/^src=(\S+) .*last_seen: (\d+)/gm)) {
      if (addressNumber(from) === address) return Math.max(0, now - Number(seen)) / rate;
    }
    return "never";
  };
}
