import { describe, expect, test } from "vitest";
import { VmmeshError } from "../core/errors.ts";
import type { CommandResult, FileInfo } from "../platform/host.ts";
import { checkEnvoy, parseEnvoyVersion } from "./version.ts";

const EXECUTABLE: FileInfo = { mode: 0o755, uid: 0, gid: 0, size: 1, modifiedMs: 0, kind: "file" };
const printed = (version: string): string =>
  `\n/usr/bin/envoy  version: 9e5580933739775e8bce696a57a2e1bc99368f23/${version}/Clean/RELEASE/BoringSSL\n\n`;

/** A machine with executables at these paths; each prints its text, or cannot be started. */
function machine(binaries: Record<string, string | Error>, info: Partial<FileInfo> = {}) {
  return {
    files: {
      stat: async (path: string) => (path in binaries ? { ...EXECUTABLE, ...info } : undefined),
    } as never,
    run: async ({ argv }: { argv: readonly [string, ...string[]] }): Promise<CommandResult> => {
      const output = binaries[argv[0]] ?? new Error("ENOENT");
      if (output instanceof Error) throw output;
      return { code: 0, stdout: output, stderr: "" };
    },
  };
}

describe("parseEnvoyVersion", () => {
  test.for([
    { name: "a release", output: printed("1.40.0"), want: "1.40.0" },
    { name: "a build from main", output: printed("1.41.0-dev"), want: "1.41.0-dev" },
    {
      name: "a distribution's build without a commit",
      output: "envoy  version: /1.36.2/Modified/RELEASE/OpenSSL",
      want: "1.36.2",
    },
    { name: "another program", output: "GNU coreutils 9.1", want: undefined },
    { name: "nothing", output: "", want: undefined },
  ])("$name", ({ output, want }) => {
    expect(parseEnvoyVersion(output)?.text).toBe(want);
  });
});

describe("checkEnvoy", () => {
  test.for([
    {
      name: "the given path wins over $PATH",
      binaries: { "/srv/envoy": printed("1.37.0"), "/usr/bin/envoy": printed("1.40.0") },
      given: "/srv/envoy",
      want: "/srv/envoy 1.37.0",
    },
    {
      name: "$PATH is searched in order",
      binaries: { "/b/envoy": printed("1.38.2"), "/c/envoy": printed("1.40.0") },
      want: "/b/envoy 1.38.2",
    },
    {
      name: "the package's own place is the last",
      binaries: { "/opt/vmmesh/envoy": printed("1.40.0") },
      want: "/opt/vmmesh/envoy 1.40.0",
    },
    {
      name: "the oldest that works",
      binaries: { "/usr/bin/envoy": printed("1.36.0") },
      want: "/usr/bin/envoy 1.36.0",
    },
    { name: "none at all", binaries: {}, want: "ENVOY_MISSING" },
    {
      name: "one in a relative entry of $PATH is not run",
      binaries: { "./envoy": printed("1.40.0") },
      want: "ENVOY_MISSING",
    },
    { name: "one version too old", binaries: { "/usr/bin/envoy": printed("1.35.7") }, want: "ENVOY_TOO_OLD" },
    {
      name: "the given one is for another processor",
      binaries: { "/srv/envoy": new Error("ENOEXEC") },
      given: "/srv/envoy",
      want: "ENVOY_MISSING",
    },
    {
      name: "the given one is no Envoy",
      binaries: { "/srv/envoy": "hello" },
      given: "/srv/envoy",
      want: "ENVOY_MISSING",
    },
  ])("$name", async ({ binaries, given, want }) => {
    const found = checkEnvoy(machine(binaries), given, ".:/a:/b:/c/").then(
      (it) => `${it.path} ${it.version.text}`,
      (thrown: unknown) =>
        thrown instanceof VmmeshError && thrown.next !== undefined ? thrown.code : thrown,
    );
    expect(await found).toBe(want);
  });

  test("a file that nobody may execute is passed over", async () => {
    const host = machine({ "/b/envoy": printed("1.40.0") }, { mode: 0o644 });
    await expect(checkEnvoy(host, undefined, "/b")).rejects.toMatchObject({ code: "ENVOY_MISSING" });
  });
});
