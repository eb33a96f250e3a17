import { type ChildProcess, execFile, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import { afterAll, beforeAll, expect, test } from "vitest";
import { Latest } from "../../agent/core/signals.ts";
import { serveDns } from "../../agent/dns/server.ts";
import { buildTable, type NameEntry } from "../../agent/dns/table.ts";
import { Upstreams } from "../../agent/dns/upstream.ts";
import { linuxHost } from "../../agent/platform/linux.ts";

/** Our server asked by `dig`, with dnsmasq as the machine's resolver: two others that read and write the same bytes. */
const PORT = 19_053;
const RESOLVER = { address: "127.0.9.1", port: 19_054 } as const;
const host = linuxHost();
const stop = new AbortController();
let resolver: ChildProcess;
let served: Promise<void>;

const many = Array.from({ length: 100 }, (_, at) => `10.1.0.${at}`);
const service = (shortname: string, ips: readonly string[]): [string, NameEntry] => [
  `${shortname}.ns.svc.cluster.local`,
  { ips, registry: "Kubernetes", shortname, namespace: "ns", altHosts: [] },
];
const NAMES = new Map([
  service("four", ["10.0.0.4"]),
  service("six", ["fd00::6"]),
  service("mixed", ["10.0.0.10", "fd00::10"]),
  service("many", many),
]);

beforeAll(async () => {
  resolver = spawn(
    "dnsmasq",
    [
      ...["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file="],
      ...[
        "--user=root",
        "--log-facility=-",
        `--port=${RESOLVER.port}`,
        `--listen-address=${RESOLVER.address}`,
      ],
      ...["--bind-interfaces", "--local=/test/", "--local=/local/", "--host-record=outside.test,192.0.2.1"],
      ...["--txt-record=outside.test,hello", "--edns-packet-max=4096"],
      ...Array.from({ length: 60 }, (_, at) => `--host-record=big.test,192.0.2.${at}`),
    ],
    { stdio: ["ignore", "ignore", "pipe"] },
  );
  if (resolver.stderr === null) throw new Error("dnsmasq has no stderr");
  for await (const line of createInterface({ input: resolver.stderr })) if (line.includes("started")) break;
  const table = new Latest<ReturnType<typeof buildTable>>();
  table.set(buildTable(NAMES, { proxyDomain: "svc.cluster.local", namespace: "ns" }));
  const files = {
    ...host.files,
    readText: async () => `nameserver ${RESOLVER.address}\nsearch corp.test\n`,
  };
  const upstreams = new Upstreams({
    host: { ...host, files },
    resolvConf: "/etc/resolv.conf",
    port: RESOLVER.port,
  });
  await new Promise<void>((resolve, reject) => {
    served = serveDns({ host, port: PORT, table, upstreams, onListening: resolve }, stop.signal);
    served.catch(reject);
  });
});
afterAll(async () => {
  stop.abort();
  await served;
  resolver.kill();
});

/** What `dig` prints. */
async function dig(words: string): Promise<string> {
  const argv = ["@127.0.0.1", "-p", String(PORT), "+tries=1", "+time=3", ...words.split(" ")];
  return (await promisify(execFile)("dig", argv)).stdout;
}

const count = (text: string, pattern: RegExp): number => text.match(pattern)?.length ?? 0;

test.for([
  { ask: "four", says: [/status: NOERROR/, /flags: qr aa rd ra;/, /^four\.\s+30\s+IN\s+A\s+10\.0\.0\.4$/m] },
  { ask: "four.ns", says: [/IN\s+A\s+10\.0\.0\.4$/m] },
  { ask: "four.ns.svc", says: [/IN\s+A\s+10\.0\.0\.4$/m] },
  { ask: "four.ns.svc.cluster.local", says: [/IN\s+A\s+10\.0\.0\.4$/m] },
  {
    ask: "four.ns.corp.test",
    says: [/IN\s+CNAME\s+four\.ns\.$/m, /^four\.ns\.\s+30\s+IN\s+A\s+10\.0\.0\.4$/m],
  },
  // A client that checks its own random spelling (0x20) gets it back.
  { ask: "FoUr.Ns +noedns", says: [/^;FoUr\.Ns\./m, /^FoUr\.Ns\.\s+30\s+IN\s+A/m, /ADDITIONAL: 0/] },
  { ask: "four AAAA", says: [/status: NOERROR/, /ANSWER: 0, AUTHORITY: 1/, /IN\s+SOA\s+vmmesh\.invalid\./] },
  { ask: "six A", says: [/status: NOERROR/, /ANSWER: 0, AUTHORITY: 1/] },
  { ask: "six AAAA", says: [/IN\s+AAAA\s+fd00::6$/m] },
  { ask: "mixed A", says: [/IN\s+A\s+10\.0\.0\.10$/m] },
  { ask: "mixed AAAA", says: [/IN\s+AAAA\s+fd00::10$/m] },
  { ask: "four +edns=1 +noednsnegotiation", says: [/status: BADVERS/, /EDNS: version: 0/] },
  { ask: "four +bufsize=4096", says: [/udp: 1232/] },
  { ask: "outside.test", says: [/status: NOERROR/, /IN\s+A\s+192\.0\.2\.1$/m] },
  { ask: "outside.test +tcp", says: [/IN\s+A\s+192\.0\.2\.1$/m, /\(TCP\)/] },
  { ask: "outside.test TXT", says: [/IN\s+TXT\s+"hello"$/m] },
  { ask: "nobody.test", says: [/status: NXDOMAIN/] },
  { ask: "outside.test TYPE65500", says: [/status: NOERROR/, /ANSWER: 0/] },
  // The resolver denies this name; that must not make a cache deny the addresses that the mesh has for it.
  { ask: "four.ns.svc.cluster.local HTTPS", says: [/status: NOERROR/, /ANSWER: 0, AUTHORITY: 1/] },
])("dig $ask", async ({ ask, says }) => {
  const said = await dig(ask);
  for (const pattern of says) expect(said).toMatch(pattern);
});

test.for([
  { name: "without EDNS 512 bytes, and TC", ask: "many +noedns +ignore", records: [1, 30], tc: true },
  { name: "as many as the asker takes", ask: "many +bufsize=1232 +ignore", records: [60, 76], tc: true },
  { name: "all that fit", ask: "many +bufsize=4096 +ignore", records: [100, 100], tc: false },
  { name: "cut and asked again by TCP", ask: "many +noedns", records: [100, 100], tc: false },
  { name: "by TCP at once", ask: "many +tcp", records: [100, 100], tc: false },
  {
    name: "a resolver's big reply to who takes it",
    ask: "big.test +bufsize=4096",
    records: [60, 60],
    tc: false,
  },
  { name: "cut by the resolver, asked again by TCP", ask: "big.test +noedns", records: [60, 60], tc: false },
] as const)("truncation: $name", async ({ ask, records: [least, most], tc }) => {
  const said = await dig(ask);
  const records = count(said, /^\S+\s+\d+\s+IN\s+A\s/gm);
  expect(records).toBeGreaterThanOrEqual(least);
  expect(records).toBeLessThanOrEqual(most);
  expect(/flags: [a-z ]*\btc\b/.test(said)).toBe(tc);
});

test("one connection, several questions", async () => {
  const said = await dig("+tcp +keepopen four outside.test +tcp +keepopen six AAAA +tcp +keepopen");
  expect(count(said, /status: NOERROR/g)).toBe(3);
});
