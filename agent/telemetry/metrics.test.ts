import { describe, expect, test } from "vitest";
import { createMetrics, METRICS } from "./metrics.ts";

const metrics = () => createMetrics({ files: { list: async () => ["0", "1", "2"] } }, { version: "0.1.0" });

describe("the table", () => {
  const rows = Object.values(METRICS);
  test("names are unique and ours or Istio's", () => {
    expect(new Set(rows.map((row) => row.name)).size).toBe(rows.length);
    for (const row of rows) expect(row.name).toMatch(/^(istio_agent|vmmesh)_[a-z_]+$/);
  });
  test("our own counters end in _total", () => {
    const ours = rows.filter((row) => row.type === "counter" && row.name.startsWith("vmmesh_"));
    for (const row of ours) expect(row.name).toMatch(/_total$/);
  });
  test("every help is a sentence", () => {
    for (const row of rows) expect(row.help).toMatch(/^[A-Za-z0-9].*[a-z0-9]\.$/);
  });
});

describe("createMetrics", () => {
  test("renders values, labels and the process at the moment of asking", async () => {
    const it = metrics();
    it.dnsRequests.inc();
    it.conditions.set({ id: "probe-refused", severity: "error" }, 1);
    it.dnsUpstreamDuration.observe(0.004);
    const text = await it.render();
    expect(text).toContain("istio_agent_dns_requests_total 1\n");
    expect(text).toContain('vmmesh_conditions{id="probe-refused",severity="error"} 1\n');
    expect(text).toContain('istio_agent_dns_upstream_request_duration_seconds_bucket{le="0.005"} 1\n');
    expect(text).toContain("istio_agent_process_open_fds 3\n");
    expect(text).toMatch(/vmmesh_build_info\{version="0\.1\.0",node="[\d.]+"\} 1\n/);
  });
  test("processor time only grows, and two registries do not meet", async () => {
    const [a, b] = [metrics(), metrics()];
    const cpu = async (it: typeof a): Promise<number> =>
      Number(/cpu_seconds_total ([\d.]+)\n/.exec(await it.render())?.[1]);
    const first = await cpu(a);
    expect(await cpu(a)).toBeGreaterThanOrEqual(first);
    expect(await cpu(b)).toBeGreaterThan(0);
  });
});
