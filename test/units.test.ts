import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { PORTS, paths, USERS } from "../agent/core/paths.ts";
import { envoyArgv } from "../agent/envoy/bootstrap.ts";
import { UNITS } from "../agent/platform/services.ts";

const unit = (name: string): string => readFileSync(`systemd/${name}`, "utf8");
const at = paths();

describe("the units say what the code says", () => {
  test("Envoy's command line is the one that the envoy room makes", () => {
    const [, line = ""] = /^ExecStart=(.*)$/m.exec(unit(UNITS.envoy)) ?? [];
    const words = (line.match(/"[^"]*"|\S+/g) ?? []).map((word) =>
      word.replaceAll('"', "").replaceAll("%%", "%"),
    );
    expect(words).toEqual(envoyArgv({ binary: `${at.etc}/envoy`, bootstrap: at.bootstrap }));
  });

  test("every unit that join turns on exists", () => {
    const there = readdirSync("systemd");
    expect(Object.values(UNITS).filter((name) => !there.includes(name))).toEqual([]);
  });

  test("the resident processes run as their own users and may nothing", () => {
    for (const [name, user] of [
      [UNITS.agent, USERS.agent],
      [UNITS.envoy, USERS.envoy],
    ] as const) {
      expect(unit(name)).toContain(`\nUser=${user}\n`);
      expect(unit(name)).toContain("\nCapabilityBoundingSet=\n");
      expect(unit(name)).toContain("\nNoNewPrivileges=yes\n");
    }
  });

  test("what holds keys leaves no core dump, and no signal opens a debugger in a Node of ours", () => {
    for (const name of [UNITS.agent, UNITS.envoy]) expect(unit(name)).toContain("\nLimitCORE=0\n");
    const starts = [unit(UNITS.agent), unit(UNITS.repairRun), readFileSync("packaging/vmmesh", "utf8")];
    for (const text of starts) expect(text).toMatch(/\/usr\/lib\/vmmesh\/node --disable-sigusr1 /);
  });

  test("no unit starts sudo or a shell, but for the text that root itself has rendered", () => {
    const [, mend = ""] = /^ExecStart=(.*)$/m.exec(unit(UNITS.mendRun)) ?? [];
    expect(mend).toBe(`-/bin/sh ${at.rules}/confirmed/mend.sh`);
    // The fence's only chooses between two files that root has rendered.
    const [, fence = ""] = /^ExecStart=(.*)$/m.exec(unit(UNITS.fence)) ?? [];
    expect(fence).toBe(
      "/bin/sh -c 'if [ -e scope.sh ]; then exec /bin/sh scope.sh load <boot.nft; fi; exec /usr/sbin/nft -f boot.nft'",
    );
    const shells: readonly string[] = [UNITS.mendRun, UNITS.fence];
    for (const name of readdirSync("systemd").filter((it) => !shells.includes(it)))
      expect(unit(name)).not.toMatch(/^Exec\w+=.*\b(sh|bash|sudo)\b/m);
  });

  test("ARCHITECTURE.md names every unit and every port", () => {
    const text = readFileSync("ARCHITECTURE.md", "utf8");
    for (const name of readdirSync("systemd").filter((it) => !it.endsWith(".sysusers")))
      expect(text).toContain(name.replace(/\.(service|socket|path|timer)$/, ""));
    for (const port of Object.values(PORTS).filter((it) => it !== PORTS.tunnel))
      expect(text).toContain(String(port));
  });
});
