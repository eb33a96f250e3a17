import { VmmeshError } from "../core/errors.ts";

/** Protocols that Istio reads from a port's name or appProtocol; of each, the proxy makes other metrics and policies. */
export const PROTOCOLS = [
  "http",
  "http2",
  "https",
  "grpc",
  "grpc-web",
  "tcp",
  "tls",
  "mongo",
  "mysql",
  "redis",
] as const;

export type Protocol = (typeof PROTOCOLS)[number];

/** A port that the workload serves. */
export interface ServedPort {
  readonly protocol: Protocol;
  readonly port: number;
  /** In WorkloadGroup and Service: `http-9080`, which is how Istio learns the protocol. */
  readonly name: string;
}

/**
 * `http:9080` as a port.
 * @throws {VmmeshError} PORT_WITHOUT_PROTOCOL for a bare number, USAGE for everything else that is no port
 */
export function parsePort(text: string): ServedPort {
  const parts = text.split(":");
  const [protocol = "", number = ""] = parts.length === 1 ? ["", parts[0]] : parts;
  const port = /^\d{1,5}$/.test(number) ? Number(number) : 0;
  if (parts.length > 2 || port < 1 || port > 65_535)
    throw usage(text, "is not PROTOCOL:PORT with a port of 1 to 65535");
  if (protocol === "") {
    throw new VmmeshError(
      "PORT_WITHOUT_PROTOCOL",
      `--port ${text} has no protocol: the mesh would take it for plain tcp, and its requests would be missing from all metrics, routes and policies`,
      {
        next: `Say it: \`--port http:${port}\`, \`--port grpc:${port}\` or, if it is neither, \`--port tcp:${port}\`.`,
      },
    );
  }
  if (protocol === "udp")
    throw usage(text, "is udp, which a mesh does not carry: leave it out, it stays as it is");
  if (!isProtocol(protocol)) throw usage(text, `has the unknown protocol \`${protocol}\``);
  return { protocol, port, name: `${protocol}-${port}` };
}

/**
 * Several ports, each number once.
 * @throws {VmmeshError} as `parsePort`; USAGE if one number has two protocols
 */
export function parsePorts(texts: readonly string[]): ServedPort[] {
  const ports = new Map<number, ServedPort>();
  for (const port of texts.map(parsePort)) {
    const known = ports.get(port.port);
    if (known !== undefined && known.protocol !== port.protocol) {
      throw usage(
        `${known.protocol}:${port.port} and ${port.protocol}:${port.port}`,
        "contradict each other",
      );
    }
    ports.set(port.port, port);
  }
  return [...ports.values()];
}

/** What Istio takes a port of this name for: the part before the first `-`; undefined if that is no protocol. */
export function protocolOfName(name: string): Protocol | undefined {
  const lower = name.toLowerCase();
  if (lower === "grpc-web" || lower.startsWith("grpc-web-")) return "grpc-web";
  const head = lower.split("-", 1)[0] ?? "";
  return isProtocol(head) ? head : undefined;
}

function isProtocol(text: string): text is Protocol {
  return (PROTOCOLS as readonly string[]).includes(text);
}

function usage(text: string, what: string): VmmeshError {
  return new VmmeshError("USAGE", `--port ${text} ${what}`, {
    next: `Write it as PROTOCOL:PORT, e.g. http:9080; protocols are ${PROTOCOLS.join(", ")}.`,
  });
}
