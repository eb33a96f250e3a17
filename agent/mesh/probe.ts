import { VmmeshError } from "../core/errors.ts";
import type { ReadinessProbe } from "./types.ts";
import { type Fields, fieldsOf, isFields, textOf } from "./yaml.ts";

/**
 * `readinessProbe` of a ProxyConfig (WorkloadGroup.spec.probe) with Istio's defaults: a zero time or threshold means
 * "not given" in protobuf; only the initial delay may be zero.
 *
 * @returns undefined if there is no probe
 * @throws {VmmeshError} CONFIG_MALFORMED naming the member that makes no sense
 * @see chapter 5.3 of Istio's VM protocol
 */
export function parseProbe(value: unknown): ReadinessProbe | undefined {
  if (value === undefined || value === null) return undefined;
  if (!isFields(value)) throw malformed("is not a map");
  return {
    initialDelaySeconds: whole(value, "initialDelaySeconds", 0),
    timeoutSeconds: whole(value, "timeoutSeconds", 1) || 1,
    periodSeconds: whole(value, "periodSeconds", 10) || 10,
    successThreshold: whole(value, "successThreshold", 1) || 1,
    failureThreshold: whole(value, "failureThreshold", 1) || 1,
    check: parseCheck(value),
  };
}

function parseCheck(probe: Fields): ReadinessProbe["check"] {
  const { httpGet, tcpSocket, exec, grpc } = probe;
  if (isFields(httpGet)) {
    const scheme = (textOf(httpGet["scheme"]) ?? "http").toLowerCase() || "http";
    if (scheme !== "http" && scheme !== "https") throw malformed(`has the unknown scheme \`${scheme}\``);
    return {
      kind: "http",
      scheme,
      ...hostOf(httpGet),
      port: port(httpGet),
      path: textOf(httpGet["path"]) || "/",
      headers: Array.isArray(httpGet["httpHeaders"])
        ? httpGet["httpHeaders"].map(fieldsOf).map((header) => ({
            name: textOf(header["name"]) ?? "",
            value: textOf(header["value"]) ?? "",
          }))
        : [],
    };
  }
  if (isFields(tcpSocket)) return { kind: "tcp", ...hostOf(tcpSocket), port: port(tcpSocket) };
  if (isFields(exec)) {
    const argv: unknown = exec["command"];
    if (!Array.isArray(argv) || argv.length === 0 || !argv.every((word) => typeof word === "string")) {
      throw malformed("has an exec.command that is not a list of words");
    }
    return { kind: "exec", argv };
  }
  if (isFields(grpc)) return { kind: "grpc", port: port(grpc), service: textOf(grpc["service"]) ?? "" };
  throw malformed("has none of httpGet, tcpSocket, exec and grpc");
}

function hostOf(check: Fields): { host?: string } {
  const host = textOf(check["host"]) ?? "";
  return host === "" ? {} : { host };
}

function port(check: Fields): number {
  const number = whole(check, "port", 0);
  if (number < 1 || number > 65_535) throw malformed(`has port ${number}, which is not 1 to 65535`);
  return number;
}

/** Protobuf-JSON writes whole numbers as numbers or as texts. */
function whole(fields: Fields, name: string, absent: number): number {
  const value = fields[name] ?? absent;
  const number = typeof value === "string" && value !== "" ? Number(value) : value;
  if (typeof number !== "number" || !Number.isInteger(number) || number < 0) {
    throw malformed(`has \`${name}: ${JSON.stringify(value)}\`, which is no whole number`);
  }
  return number;
}

function malformed(what: string): VmmeshError {
  return new VmmeshError("CONFIG_MALFORMED", `the readiness probe of the WorkloadGroup ${what}`, {
    next: "Correct spec.probe of the WorkloadGroup, then make a new bundle or join again.",
  });
}
