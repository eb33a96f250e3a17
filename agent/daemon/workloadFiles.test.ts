import { describe, expect, test } from "vitest";
import { istiodTarget } from "./workloadFiles.ts";

const WORKLOAD = { discoveryAddress: "istiod.istio-system.svc:15012", clusterId: "Kubernetes" };

/** A resolver with one answer per name and question; the last one stays. */
function resolver(answers: Readonly<Record<string, readonly (readonly string[])[]>>) {
  const left = new Map(Object.entries(answers).map(([name, them]) => [name, [...them]]));
  const asked: string[] = [];
  const lookup = async (name: string): Promise<string[]> => {
    asked.push(name);
    const them = left.get(name) ?? [];
    return [...((them.length > 1 ? them.shift() : them[0]) ?? [])];
  };
  return { asked, net: { lookup } };
}

describe("where istiod is dialled", () => {
  test("the name of a load balancer is resolved anew each time", async () => {
    const host = resolver({ "lb.example": [["192.0.2.1"], ["192.0.2.2", "2001:db8::2"]] });
    const target = () => istiodTarget(host, { ...WORKLOAD, istiodAddresses: ["lb.example"] }, "PEM");
    expect(await target()).toEqual({
      addresses: ["192.0.2.1"],
      port: 15012,
      serverName: "istiod.istio-system.svc",
      rootCert: "PEM",
      clusterId: "Kubernetes",
    });
    expect((await target()).addresses).toEqual(["192.0.2.2", "2001:db8::2"]);
    expect(host.asked).toEqual(["lb.example", "lb.example"]);
  });

  test("addresses and names are tried in the order given, each once; an address is not asked for", async () => {
    const host = resolver({ "a.example": [["192.0.2.1", "192.0.2.9"]], "b.example": [["192.0.2.1"]] });
    const istiodAddresses = ["192.0.2.9", "a.example", "b.example", "2001:db8::1"];
    const { addresses } = await istiodTarget(host, { ...WORKLOAD, istiodAddresses }, "PEM");
    expect(addresses).toEqual(["192.0.2.9", "192.0.2.1", "2001:db8::1"]);
    expect(host.asked).toEqual(["a.example", "b.example"]);
  });

  test("a name without an address leaves the others; when no one has any, the names are named", async () => {
    const host = resolver({ "a.example": [["192.0.2.1"]] });
    const target = (istiodAddresses: readonly string[]) =>
      istiodTarget(host, { ...WORKLOAD, istiodAddresses: [...istiodAddresses] }, "PEM");
    expect((await target(["gone.example", "a.example"])).addresses).toEqual(["192.0.2.1"]);
    await expect(target(["gone.example", "away.example"])).rejects.toMatchObject({
      code: "ISTIOD_UNREACHABLE",
      message: expect.stringContaining("gone.example, away.example"),
    });
  });

  test("without addresses the discovery address itself is asked for", async () => {
    const host = resolver({ "istiod.istio-system.svc": [["10.0.0.1"]] });
    expect((await istiodTarget(host, { ...WORKLOAD, istiodAddresses: [] }, "PEM")).addresses).toEqual([
      "10.0.0.1",
    ]);
  });
});
