import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { VmmeshError } from "../core/errors.ts";
import { PROTOCOLS, parsePort, parsePorts, protocolOfName } from "./ports.ts";

function failure(work: () => unknown): VmmeshError {
  try {
    work();
  } catch (thrown) {
    if (thrown instanceof VmmeshError) return thrown;
  }
  throw new Error("no VmmeshError");
}

describe("--port", () => {
  test("a protocol of Istio and a number, and Istio reads the protocol back from the name", () => {
    fc.assert(
      fc.property(fc.constantFrom(...PROTOCOLS), fc.integer({ min: 1, max: 65_535 }), (protocol, port) => {
        const parsed = parsePort(`${protocol}:${port}`);
        expect(parsed).toEqual({ protocol, port, name: `${protocol}-${port}` });
        expect(protocolOfName(parsed.name)).toBe(protocol);
        expect(parsed.name).toMatch(/^[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?$/);
      }),
    );
  });

  test("a bare number is refused because it would cost the metrics", () => {
    const error = failure(() => parsePort("9080"));
    expect(error.code).toBe("PORT_WITHOUT_PROTOCOL");
    expect(error.message).toContain("its requests would be missing from all metrics");
    expect(error.next).toContain("--port http:9080");
    expect(error.exitCode).toBe(2);
  });

  test.for([
    "udp:53",
    "ftp:21",
    "http:0",
    "http:65536",
    "http:",
    ":80",
    "http:80:80",
    "http:http",
    "",
    "HTTP:80",
    "http: 80",
  ])("refuses `%s`", (text) => {
    expect(failure(() => parsePort(text)).exitCode).toBe(2);
  });

  test("one number cannot be two protocols; twice the same is once", () => {
    expect(failure(() => parsePorts(["http:80", "tcp:80"])).message).toContain("contradict each other");
    expect(parsePorts(["http:80", "http:80"])).toHaveLength(1);
  });
});
