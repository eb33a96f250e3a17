import { expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { paths } from "../core/paths.ts";
import { envoyCapabilities, grantEnvoy } from "./envoyCapability.ts";

const PATHS = paths();

test.for([
  { mode: "REDIRECT", release: "6.18.0", want: [] },
  { mode: "TPROXY", release: "6.1.0-13-amd64", want: ["CAP_NET_RAW"] },
  { mode: "TPROXY", release: "5.17.0", want: ["CAP_NET_RAW"] },
  { mode: "TPROXY", release: "5.15.0-91-generic", want: ["CAP_NET_RAW", "CAP_NET_ADMIN"] },
  { mode: "TPROXY", release: "", want: ["CAP_NET_RAW", "CAP_NET_ADMIN"] },
] as const)("for $mode on $release Envoy gets $want", ({ mode, release, want }) => {
  expect(envoyCapabilities(mode, release)).toEqual(want);
});

function machine(kind: "systemd" | "foreground", start: Record<string, string> = {}) {
  const files = new MemoryFiles({ "/proc/sys/kernel/osrelease": "6.18.0\n", ...start });
  const reloads: string[] = [];
  const services = { kind, reload: async () => void reloads.push("reload") };
  return { files, host: { files }, paths: PATHS, services, reloads };
}

test("the drop-in is written once, and its folder goes with it", async () => {
  const vm = machine("systemd");
  expect(await grantEnvoy(vm, "TPROXY")).toBe(true);
  expect(await vm.files.readText(PATHS.envoyDropIn)).toContain("\nAmbientCapabilities=CAP_NET_RAW\n");
  expect(await grantEnvoy(vm, "TPROXY")).toBe(false);
  expect(await grantEnvoy(vm, "REDIRECT")).toBe(true);
  expect(await vm.files.list("/etc/systemd/system/vmmesh-envoy.service.d")).toBeUndefined();
  expect(vm.reloads).toHaveLength(2);
});

test("an operator's own drop-in stays", async () => {
  const own = "/etc/systemd/system/vmmesh-envoy.service.d/override.conf";
  const vm = machine("systemd", { [own]: "[Service]\nNice=5\n" });
  await grantEnvoy(vm, "TPROXY");
  await grantEnvoy(vm, "REDIRECT");
  expect(await vm.files.list("/etc/systemd/system/vmmesh-envoy.service.d")).toEqual(["override.conf"]);
});

test("without systemd there is no unit to change", async () => {
  const vm = machine("foreground");
  expect(await grantEnvoy(vm, "TPROXY")).toBe(false);
});
