import { describe, expect, test } from "vitest";
import type { Host } from "./host.ts";
import { serviceCgroup, slicePath } from "./units.ts";

const host = (
  stdout: string,
  unified = true,
): Pick<Host, "run"> & { files: Pick<Host["files"], "stat"> } => ({
  run: async () => ({ code: 0, stdout, stderr: "" }),
  files: {
    stat: async () =>
      unified ? { kind: "file", uid: 0, gid: 0, mode: 0o644, size: 0, modifiedMs: 0 } : undefined,
  },
});
const loaded = (slice: string) => `Id=app.service\nLoadState=loaded\nSlice=${slice}\n`;

describe("where a service's cgroup is", () => {
  test.for([
    ["-.slice", ""],
    ["system.slice", "system.slice/"],
    ["system-getty.slice", "system.slice/system-getty.slice/"],
    ["a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice/"],
  ] as const)("%s", ([slice, path]) => {
    expect(slicePath(slice)).toBe(path);
  });

  test("also while it does not run, under the name that systemd gives it", async () => {
    for (const slice of ["system.slice", ""])
      expect(await serviceCgroup(host(loaded(slice)), "app")).toEqual({
        unit: "app.service",
        path: "system.slice/app.service",
      });
  });

  test.for([
    ["nosuch", "Id=nosuch.service\nLoadState=not-found\nSlice=\n", "is not loaded by systemd"],
    ["masked", "Id=masked.service\nLoadState=masked\nSlice=\n", "is not loaded by systemd"],
    ["a.slice", loaded("-.slice"), "is a slice"],
    ["x'; reboot", loaded("-.slice"), "is not a name that can be matched"],
    ["-H", loaded("-.slice"), "is not a name that can be matched"],
  ] as const)("%s is refused", async ([name, stdout, said]) => {
    await expect(serviceCgroup(host(stdout), name)).rejects.toThrow(said);
  });

  test("without the unified hierarchy it is refused", async () => {
    await expect(serviceCgroup(host(loaded("system.slice"), false), "app")).rejects.toThrow(
      "no unified cgroup hierarchy",
    );
  });
});
