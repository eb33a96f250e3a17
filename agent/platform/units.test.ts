import { describe, expect, test } from "vitest";
import type { Host } from "./host.ts";
import { slicePath, unitPlace } from "./units.ts";

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
      expect(await unitPlace(host(loaded(slice)), "app")).toEqual({
        unit: "app.service",
        path: "system.slice/app.service",
      });
  });

  test.for([
    ["nosuch", "Id=nosuch.service\nLoadState=not-found\nSlice=\n", "is not loaded by systemd"],
    ["masked", "Id=masked.service\nLoadState=masked\nSlice=\n", "is not loaded by systemd"],
    ["a.socket", loaded("-.slice"), "is a socket"],
    ["a.slice", "Id=a.slice\nLoadState=loaded\nSlice=\n", "has no service in it"],
    ["x'; reboot", loaded("-.slice"), "is not a name that can be matched"],
    ["-H", loaded("-.slice"), "is not a name that can be matched"],
  ] as const)("%s is refused", async ([name, stdout, said]) => {
    await expect(unitPlace(host(stdout), name)).rejects.toThrow(said);
  });

  test("a slice is a place of its own, with the services that are started in it or below it", async () => {
    const answers: Readonly<Record<string, string>> = {
      "list-units": "one.service loaded active running One\nelse.service loaded active running Else\n",
      "list-unit-files": "one.service static -\ndeep.service disabled enabled\nt@.service static -\n",
      "show a-b.slice": "Id=a-b.slice\nLoadState=loaded\nSlice=a.slice\n",
      "show one.service else.service deep.service": [
        "Id=one.service\nLoadState=loaded\nSlice=a-b.slice\n",
        "Id=else.service\nLoadState=loaded\nSlice=a.slice\n",
        "Id=deep.service\nLoadState=loaded\nSlice=a-b-c.slice\n",
      ].join("\n"),
    };
    const machine = {
      ...host(""),
      run: async ({ argv }: { argv: readonly string[] }) => {
        const words = argv[1] === "show" ? ["show", ...argv.slice(argv.indexOf("--") + 1)] : [argv[1]];
        return { code: 0, stdout: answers[words.join(" ")] ?? "", stderr: "" };
      },
    };
    expect(await unitPlace(machine, "a-b.slice")).toEqual({
      unit: "a-b.slice",
      path: "a.slice/a-b.slice",
      services: ["deep.service", "one.service"],
    });
  });

  test("without the unified hierarchy it is refused", async () => {
    await expect(unitPlace(host(loaded("system.slice"), false), "app")).rejects.toThrow(
      "no unified cgroup hierarchy",
    );
  });
});
