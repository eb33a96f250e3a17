import { stripVTControlCharacters } from "node:util";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { renderStatus, type StatusSnapshot } from "./status.ts";

const NOW = new Date("2026-11-23T12:00:00Z");

const well: StatusSnapshot = {
  version: "0.1.0",
  startedAt: "2026-11-21T10:00:00Z",
  waitingFor: [],
  identity: {
    spiffe: "spiffe://cluster.local/ns/shop/sa/billing",
    notAfter: "2026-11-24T06:30:00Z",
    nextRenewal: "2026-11-23T18:31:00Z",
    nextCredential: "certificate",
  },
  controlPlane: {
    name: "istiod.istio-system.svc:15012",
    address: "192.0.2.10:15012",
    since: "2026-11-23T11:18:00Z",
    resources: { clusters: 42, listeners: 17, routes: 9, endpoints: 40 },
  },
  envoy: { version: "1.40.0", state: "live" },
  capture: {
    inForce: true,
    inbound: "ports 80, 8443",
    outbound: "10.0.0.0/8",
    repairs: 2,
    backend: "iptables-nft (Kubernetes keeps its rules there)",
    failurePolicy: ["outbound:10.0.0.0/8:443=closed", "inbound:80=open"],
    counts: { refused: { inbound: 1, outbound: 12 }, bypassed: { inbound: 3, outbound: 0 } },
  },
  dns: {
    captured: true,
    names: 57,
    upstreams: [{ address: "127.0.0.53", healthy: true }],
  },
  registration: { group: "shop/billing", address: "10.1.2.3", listed: true },
  health: { state: "healthy", since: "2026-11-23T11:59:00Z" },
  conditions: [],
};

const condition = (id: string, severity: "error" | "warning") => ({
  id,
  severity,
  message: `the sentence that says what ${id} is about and why it matters to whoever reads this line`,
  next: "Run `vmmesh audit` and do what it says.",
  since: "2026-11-23T11:58:30Z",
});

const ill: StatusSnapshot = {
  ...well,
  waitingFor: ["Envoy", "name table"],
  identity: {
    spiffe: "spiffe://cluster.local/ns/shop/sa/billing",
    notAfter: "2026-11-23T10:00:00Z",
    nextCredential: "none",
    lastError: "TOKEN_EXPIRED: the token ended 2026-11-22T10:00:00Z",
  },
  controlPlane: {
    name: "istiod.istio-system.svc:15012",
    since: "2026-11-23T10:00:00Z",
    lastRejection: "listener virtualOutbound: unknown extension",
    resources: {},
  },
  envoy: { state: "unreachable" },
  capture: { inForce: false, inbound: "", outbound: "", repairs: 0 },
  dns: {
    captured: true,
    names: 0,
    upstreams: [
      { address: "10.0.0.2", healthy: false, lastError: "silent" },
      { address: "10.0.0.3", healthy: true },
    ],
  },
  registration: { listed: false },
  health: { state: "unhealthy", message: "connect ECONNREFUSED", since: "2026-11-23T11:00:00Z" },
  conditions: [
    condition("dns-upstream-silent", "warning"),
    condition("certificate-ended", "error"),
    condition("capture-missing", "error"),
    condition("z", "warning"),
    condition("y", "warning"),
  ],
};

describe("renderStatus", () => {
  test.for([
    { name: "well", snapshot: well },
    { name: "ill", snapshot: ill },
    {
      name: "new",
      snapshot: {
        ...well,
        identity: undefined,
        health: undefined,
        dns: { ...well.dns, captured: false },
        waitingFor: ["identity"],
      },
    },
  ])("$name", async ({ name, snapshot }) => {
    await expect(renderStatus(snapshot, { color: false, now: NOW })).toMatchFileSnapshot(
      `./golden/status-${name}.txt`,
    );
  });
  test("colours change no word", () => {
    const colored = renderStatus(ill, { color: true, now: NOW });
    expect(colored).not.toBe(renderStatus(ill, { color: false, now: NOW }));
    expect(stripVTControlCharacters(colored)).toBe(renderStatus(ill, { color: false, now: NOW }));
  });
  test("fits one screen and drives no terminal, whatever it is told", () => {
    const text = fc.string({ unit: "binary", maxLength: 200 });
    fc.assert(
      fc.property(text, fc.array(text, { maxLength: 30 }), (message, ids) => {
        const conditions = ids.map((id) => ({ ...condition("x", "error"), id, message, next: message }));
        const lines = renderStatus(
          { ...ill, conditions, envoy: { state: message } },
          { color: false, now: NOW },
        )
          .trimEnd()
          .split("\n");
        expect(lines.length).toBeLessThanOrEqual(23);
        for (const line of lines) {
          expect(line.length).toBeLessThanOrEqual(80);
          expect(line).not.toMatch(/\p{Cc}/u);
        }
      }),
      { numRuns: 50 },
    );
  });
  test("survives JSON", () => {
    const again = JSON.parse(JSON.stringify(ill)) as StatusSnapshot;
    expect(renderStatus(again, { color: false, now: NOW })).toBe(
      renderStatus(ill, { color: false, now: NOW }),
    );
  });
});
