import { createInterface } from "node:readline";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { Latest } from "../../agent/core/signals.ts";
import { inSlices } from "../../agent/core/slices.ts";
import { serveDns } from "../../agent/dns/server.ts";
import { type DnsTable, tableInSteps } from "../../agent/dns/table.ts";
import { Upstreams } from "../../agent/dns/upstream.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { readNameTable } from "../../agent/proto/istio.ts";
import { BinaryWriter, put } from "../../agent/proto/wire.ts";

/** A table in use. */
export interface Taken {
  readonly names: number;
  /** From the message's bytes. */
  readonly tookMs: number;
}

/** At the beginning, when it serves without a table, and at the end, with one. */
export interface Weighed {
  /** V8's heap after a collection. */
  readonly heapBytes: number;
  /** Of one NDS message. */
  readonly messageBytes: number;
}

// `many-names.ts PORT SERVICES TABLES`: the agent's way from an NDS message to answers. Each line on stdin has it take the
// next table, in which every service has the address 10.TABLE.x.y.
const [port = 0, services = 0, tables = 0] = process.argv.slice(2).map(Number);
const messages = Array.from({ length: tables }, (_, at) => message(at));
setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;
const host = linuxHost();
const table = new Latest<DnsTable>();
const upstreams = new Upstreams({ host, resolvConf: "/etc/resolv.conf" });
const stop = new AbortController();
const { promise: listening, resolve: onListening } = Promise.withResolvers<void>();
const served = serveDns({ host, port, table, upstreams, onListening }, stop.signal);
await Promise.race([listening, served]);
weigh();
for await (const _ of createInterface({ input: process.stdin })) {
  const next = messages.shift();
  if (next === undefined) throw new Error(`there are only ${tables} tables`);
  const startedMs = host.clock.monotonicMs();
  const built = await inSlices(
    tableInSteps(readNameTable(next), { proxyDomain: "svc.cluster.local", namespace: "ns-0" }),
    host.clock,
  );
  table.set(built);
  say({ names: built.names.size, tookMs: host.clock.monotonicMs() - startedMs } satisfies Taken);
}
weigh();
stop.abort();
await served;

function weigh(): void {
  collect();
  const { heapUsed } = process.memoryUsage();
  say({ heapBytes: heapUsed, messageBytes: message(0).length } satisfies Weighed);
}

function say(what: Taken | Weighed): void {
  process.stdout.write(`${JSON.stringify(what)}\n`);
}

/** istio.networking.nds.v1.NameTable as istiod sends it for services of Kubernetes. */
function message(address: number): Uint8Array {
  const all = new BinaryWriter();
  for (let at = 0; at < services; at += 1) {
    const [shortname, namespace] = [`service-${at}`, `ns-${at % 100}`];
    const info = new BinaryWriter();
    put(info, 1, `10.${address}.${at >> 8}.${at & 255}`);
    put(info, 2, "Kubernetes");
    put(info, 3, shortname);
    put(info, 4, namespace);
    const entry = new BinaryWriter();
    put(entry, 1, `${shortname}.${namespace}.svc.cluster.local`);
    put(entry, 2, info.finish());
    put(all, 1, entry.finish());
  }
  return all.finish();
}
