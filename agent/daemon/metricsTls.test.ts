import { expect, test } from "vitest";
import type { Svid } from "../identity/svid.ts";
import { metricsPair } from "./metricsTls.ts";

const files = (there: Readonly<Record<string, string>>) => ({
  readText: async (path: string) => {
    if (path.includes("closed")) throw new Error("EACCES: permission denied");
    return there[path];
  },
});

test("the workload's own, as it is at the moment", async () => {
  const svid = { key: "k", chain: "c" } as Svid;
  expect(await metricsPair(files({}), "workload", svid)).toEqual({ key: "k", chain: "c" });
  await expect(metricsPair(files({}), "workload", undefined)).rejects.toMatchObject({
    code: "NOT_READY",
    message: "there is no workload certificate yet",
  });
});

test("a folder's tls.crt and tls.key; one that is missing or closed is named", async () => {
  const there = { "/p/tls.crt": "c", "/p/tls.key": "k" };
  expect(await metricsPair(files(there), "/p", undefined)).toEqual({ key: "k", chain: "c" });
  await expect(metricsPair(files({ "/p/tls.crt": "c" }), "/p", undefined)).rejects.toMatchObject({
    code: "CONFIG_MALFORMED",
    message: "/p/tls.key does not exist",
  });
  await expect(metricsPair(files({}), "/closed", undefined)).rejects.toMatchObject({
    message: "/closed/tls.crt cannot be read by the agent",
  });
});
