import { connect as connectHttp2 } from "node:http2";
import type { Duplex } from "node:stream";
import { connect as connectTls } from "node:tls";
import { messageOf } from "../core/errors.ts";
import { bracketed, ipFamily, ipv4Bytes, ipv6Bytes } from "../core/net.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host } from "../platform/host.ts";
import type { Conditions } from "./conditions.ts";

// Not imported, for the reason in telemetry/http.ts: 17 MB.
const { request } = process.getBuiltinModule("node:http");

/** How to ask the application whether it is well (ch. 5.3 of the VM protocol); all times in seconds. */
export interface ProbeSpec {
  readonly initialDelaySeconds: number;
  readonly timeoutSeconds: number;
  readonly periodSeconds: number;
  readonly successThreshold: number;
  readonly failureThreshold: number;
  readonly check:
    | {
        readonly kind: "http";
        readonly scheme: "http" | "https";
        readonly host?: string;
        readonly port: number;
        readonly path: string;
        readonly headers: readonly { readonly name: string; readonly value: string }[];
      }
    | { readonly kind: "tcp"; readonly host?: string; readonly port: number }
    | { readonly kind: "exec"; readonly argv: readonly string[] }
    | { readonly kind: "grpc"; readonly port: number; readonly service: string };
}

/** What the mesh is told; the form of the xDS health message. */
export type Health = { readonly healthy: true } | { readonly healthy: false; readonly message: string };

export interface ProbeState {
  readonly last: "healthy" | "unhealthy" | undefined;
  /** Results of one kind in a row; at most one of the two is not 0. */
  readonly ok: number;
  readonly fail: number;
}

export const FIRST_STATE: ProbeState = { last: undefined, ok: 0, fail: 0 };

/**
 * One result of a check. Only transitions are reported, and the first report may be either: a machine whose
 * application never came up is reported unhealthy.
 *
 * The count has to meet the threshold exactly, as in Istio: it goes on growing while the state is unchanged.
 */
export function step(
  state: ProbeState,
  ok: boolean,
  thresholds: Pick<ProbeSpec, "successThreshold" | "failureThreshold">,
): { state: ProbeState; report?: "healthy" | "unhealthy" } {
  const verdict = ok ? "healthy" : "unhealthy";
  const inARow = (ok ? state.ok : state.fail) + 1;
  const enough = inARow === (ok ? thresholds.successThreshold : thresholds.failureThreshold);
  if (enough && state.last !== verdict) return { state: { last: verdict, ok: 0, fail: 0 }, report: verdict };
  return { state: { last: state.last, ok: ok ? inARow : 0, fail: ok ? 0 : inARow } };
}

export interface ProbeDeps {
  readonly host: Pick<Host, "net" | "clock">;
  /** Asked first in every round: why Envoy is not ready, or undefined if it is. */
  readonly envoyReady: () => Promise<string | undefined>;
  readonly conditions: Pick<Conditions, "raise" | "clear">;
  /**
   * Runs the program of an exec probe and gives its exit status. Only present if this machine's own configuration
   * allows it: whoever may edit the WorkloadGroup would otherwise run programs here.
   */
  readonly exec?: (argv: readonly string[], signal: AbortSignal) => Promise<number>;
}

/** The address traffic rules let through to the application's own port without Envoy. */
const PROBE_SOURCE = { 4: "127.0.0.6", 6: "::6" } as const;
const MAX_REDIRECTS = 10;
const REFUSED = "probe-refused";

/**
 * Checks Envoy and then the application every period until `signal` aborts, and reports transitions.
 *
 * A probe that may not be run (exec without consent, a host that is not this machine) is never run: it raises a
 * condition, and the machine is reported unhealthy at once.
 *
 * @param defaultHost for probes that name none: the machine's first address, or undefined; if it is not an address of
 *   this machine (a public one behind NAT) loopback is asked instead
 */
export async function runProbe(
  deps: ProbeDeps,
  probe: ProbeSpec,
  defaultHost: string | undefined,
  report: (health: Health) => void,
  signal: AbortSignal,
): Promise<void> {
  const { clock } = deps.host;
  let state = FIRST_STATE;
  await pause(clock, probe.initialDelaySeconds * SECOND_MS, signal);
  for (let dueMs = clock.monotonicMs(); !signal.aborted; ) {
    const refused = refusal(deps, probe.check);
    let failure = refused;
    if (refused === undefined) {
      deps.conditions.clear(REFUSED);
      failure = (await deps.envoyReady()) ?? (await runCheck(deps, probe, defaultHost, signal));
    } else {
      deps.conditions.raise(
        REFUSED,
        "error",
        `the health probe of this workload is not run: ${refused}`,
        "Change spec.probe of the WorkloadGroup, or allow it in this machine's own configuration.",
      );
    }
    if (signal.aborted) return;
    const thresholds = refused === undefined ? probe : { ...probe, failureThreshold: 1 };
    const next = step(state, failure === undefined, thresholds);
    state = next.state;
    if (next.report === "healthy") report({ healthy: true });
    else if (next.report === "unhealthy") report({ healthy: false, message: failure ?? "unhealthy" });
    // From due time to due time, so that slow checks do not stretch the period; missed rounds are not made up for.
    dueMs = Math.max(dueMs + probe.periodSeconds * SECOND_MS, clock.monotonicMs());
    await pause(clock, dueMs - clock.monotonicMs(), signal);
  }
}

async function pause(clock: Host["clock"], ms: number, signal: AbortSignal): Promise<void> {
  await clock.sleep(ms, signal).catch(() => undefined);
}

/** Why this check must not be run on this machine at all. */
function refusal(deps: ProbeDeps, check: ProbeSpec["check"]): string | undefined {
  if (check.kind === "exec") {
    return deps.exec === undefined ? "exec probes are not allowed on this machine" : undefined;
  }
  if (check.kind === "grpc" || check.host === undefined || check.host === "") return undefined;
  return localAddress(deps.host.net, check.host) === undefined
    ? `its host ${check.host} is not an address of this machine`
    : undefined;
}

/** The address to dial for `host` if that is this machine. Names other than localhost are nobody's proof. */
export function localAddress(net: Pick<Host["net"], "addresses">, host: string): string | undefined {
  if (host.toLowerCase() === "localhost") return "127.0.0.1";
  const bare = host.replace(/^\[(.*)\]$/, "$1");
  if (ipFamily(bare) === undefined) return undefined;
  const bytes = (text: string): string => (ipv4Bytes(text) ?? ipv6Bytes(text) ?? []).join(".");
  const own = net.addresses().some((entry) => bytes(entry.address) === bytes(bare));
  return own || ipv4Bytes(bare)?.[0] === 127 ? bare : undefined;
}

/** One check of the application: undefined if it is well, else the reason. */
async function runCheck(
  deps: ProbeDeps,
  probe: ProbeSpec,
  defaultHost: string | undefined,
  signal: AbortSignal,
): Promise<string | undefined> {
  const { net, clock } = deps.host;
  const { check } = probe;
  const timeoutMs = probe.timeoutSeconds * SECOND_MS;
  const wanted = "host" in check && check.host !== undefined && check.host !== "" ? check.host : defaultHost;
  const address = (wanted === undefined ? undefined : localAddress(net, wanted)) ?? "127.0.0.1";
  const scope = new AbortController();
  const stop = (): void => scope.abort();
  signal.addEventListener("abort", stop, { once: true });
  const dial = async (port: number): Promise<Duplex> => {
    const socket = await dialLocal(net, address, port, timeoutMs);
    socket.on("error", () => undefined);
    if (scope.signal.aborted) socket.destroy();
    scope.signal.addEventListener("abort", () => socket.destroy(), { once: true });
    return socket;
  };
  const run = async (): Promise<string | undefined> => {
    switch (check.kind) {
      case "http":
        return checkHttp(dial, check, address);
      case "tcp":
        await dial(check.port);
        return undefined;
      case "grpc":
        return checkGrpc(dial, check, address);
      case "exec": {
        const code = await deps.exec?.(check.argv, scope.signal);
        return code === 0 ? undefined : `the probe command ended with exit status ${code}`;
      }
    }
  };
  try {
    return await Promise.race([
      run(),
      clock.sleep(timeoutMs, scope.signal).then(() => `no answer within ${probe.timeoutSeconds} s`),
    ]);
  } catch (thrown) {
    return messageOf(thrown);
  } finally {
    signal.removeEventListener("abort", stop);
    scope.abort();
  }
}

async function dialLocal(
  net: Host["net"],
  address: string,
  port: number,
  timeoutMs: number,
): Promise<Duplex> {
  const localSource = PROBE_SOURCE[ipFamily(address) ?? 4];
  try {
    return await net.connectTcp(address, port, { timeoutMs, localAddress: localSource });
  } catch (thrown) {
    // ::6 is an address of the machine only if somebody gave it to lo; the firewall exempts our user anyway.
    if (!["EADDRNOTAVAIL", "EINVAL"].includes((thrown as NodeJS.ErrnoException).code ?? "")) throw thrown;
    return net.connectTcp(address, port, { timeoutMs });
  }
}

async function checkHttp(
  dial: (port: number) => Promise<Duplex>,
  check: Extract<ProbeSpec["check"], { kind: "http" }>,
  address: string,
): Promise<string | undefined> {
  const path = check.path.startsWith("/") ? check.path : `/${check.path}`;
  let url = new URL(`${check.scheme}://${bracketed(address)}:${check.port}${path}`);
  for (let hop = 0; ; hop += 1) {
    const { status, location } = await getOnce(dial, url, check.headers);
    const target = location === undefined ? undefined : URL.parse(location, url);
    const followed =
      status >= 300 && status < 400 && target?.hostname === url.hostname && /^https?:$/.test(target.protocol);
    if (!followed) {
      return status >= 200 && status < 400
        ? undefined
        : `status code was not from [200,400), bad code ${status}`;
    }
    if (hop === MAX_REDIRECTS) return `stopped after ${MAX_REDIRECTS} redirects`;
    url = target;
  }
}

async function getOnce(
  dial: (port: number) => Promise<Duplex>,
  url: URL,
  extra: readonly { readonly name: string; readonly value: string }[],
): Promise<{ status: number; location: string | undefined }> {
  const secure = url.protocol === "https:";
  const raw = await dial(Number(url.port === "" ? (secure ? 443 : 80) : url.port));
  // Not verified, as Kubernetes does not: the address is local, and the certificate is made for other names.
  const socket = secure ? connectTls({ socket: raw, rejectUnauthorized: false }) : raw;
  socket.on("error", () => undefined);
  const headers: Record<string, string> = {
    host: url.host,
    "user-agent": "istio-probe/1.0",
    connection: "close",
  };
  for (const { name, value } of extra) headers[name.toLowerCase()] = value;
  return new Promise((resolve, reject) => {
    const outgoing = request(
      { createConnection: () => socket, method: "GET", path: url.pathname + url.search, headers },
      (response) => {
        resolve({ status: response.statusCode ?? 0, location: response.headers.location });
        // The body is not wanted, however long it is.
        socket.destroy();
        raw.destroy();
      },
    );
    outgoing.on("error", reject);
    outgoing.end();
  });
}

const SERVING = 1;

/** `grpc.health.v1.Health/Check` in plaintext: one request and one reply of a few bytes, so the framing is written out. */
async function checkGrpc(
  dial: (port: number) => Promise<Duplex>,
  check: Extract<ProbeSpec["check"], { kind: "grpc" }>,
  address: string,
): Promise<string | undefined> {
  const socket = await dial(check.port);
  const session = connectHttp2(`http://${bracketed(address)}:${check.port}`, {
    createConnection: () => socket,
  });
  return new Promise((resolve, reject) => {
    session.on("error", reject);
    const stream = session.request({
      ":method": "POST",
      ":path": "/grpc.health.v1.Health/Check",
      "content-type": "application/grpc",
      te: "trailers",
    });
    let body = Buffer.alloc(0);
    let status: string | undefined;
    let message: string | undefined;
    const note = (headers: Record<string, unknown>): void => {
      if (headers["grpc-status"] !== undefined) status = String(headers["grpc-status"]);
      if (headers["grpc-message"] !== undefined) message = String(headers["grpc-message"]);
    };
    stream.on("response", note);
    stream.on("trailers", note);
    stream.on("data", (chunk: Buffer) => {
      if (body.length < 1024) body = Buffer.concat([body, chunk]);
    });
    stream.on("error", reject);
    stream.on("close", () => {
      session.destroy();
      if (status !== "0")
        resolve(
          `the gRPC health service answered with status ${status ?? "missing"}${message === undefined ? "" : `: ${message}`}`,
        );
      // HealthCheckResponse { ServingStatus status = 1 }: after the 5 bytes of framing a tag and one varint byte.
      else if (body[5] === 0x08 && body[6] === SERVING) resolve(undefined);
      else resolve("service not serving");
    });
    stream.end(healthRequest(check.service));
  });
}

/** HealthCheckRequest { string service = 1 } behind gRPC's prefix: not compressed, length in four bytes. */
function healthRequest(service: string): Buffer {
  const name = Buffer.from(service);
  const varint: number[] = [];
  for (let rest = name.length; ; rest >>>= 7) {
    if (rest < 0x80) {
      varint.push(rest);
      break;
    }
    varint.push((rest & 0x7f) | 0x80);
  }
  const message = name.length === 0 ? Buffer.alloc(0) : Buffer.concat([Buffer.from([0x0a, ...varint]), name]);
  const prefix = Buffer.alloc(5);
  prefix.writeUInt32BE(message.length, 1);
  return Buffer.concat([prefix, message]);
}
