import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { expect, test } from "vitest";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { type Change, monitorReader } from "../../agent/iptables/watch.ts";
import { eventually, Lab, REMOTE, WISH } from "./lab.ts";

/** nft 1.0.6 and 1.1.3 crash at the notice that a `ct timeout` is gone, before the line that names who did it. */
test("nft monitor lives through apply, wipe, repair and removal, and names who wiped", async () => {
  await using lab = await Lab.make();
  await using stack = new AsyncDisposableStack();
  const monitor = spawn("ip", ["netns", "exec", lab.machine, "nft", "monitor"], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  stack.defer(async () => {
    monitor.kill();
  });
  const read = monitorReader();
  const changes: Change[] = [];
  let heard = 0;
  createInterface({ input: monitor.stdout }).on("line", (line) => {
    heard = Number(/^add table inet mark(\d+)$/.exec(line)?.[1] ?? heard);
    const change = read(line);
    if (change !== undefined) changes.push(change);
  });
  let marked = 0;
  /** It has told of all that was written until now. */
  const told = (): Promise<number> => {
    const before = marked;
    return eventually(async () => {
      marked += 1;
      await lab.insideShell(`nft add table inet mark${marked}`);
      return heard > before;
    }, 10_000);
  };
  const wish = { ...WISH, dns: { servers: [REMOTE.ip, REMOTE.ip6] } };

  await told();
  await lab.install(wish);
  await lab.install(wish);
  await told();
  expect(changes.map(({ kind }) => kind)).not.toContain("foreign");
  await lab.insideShell("nft flush ruleset");
  await told();
  expect(changes.filter(({ kind }) => kind === "foreign")).toMatchObject([
    { by: { program: "nft", pid: expect.any(Number) } },
  ]);
  expect(await loadConfirmed(lab.host, lab.rulesDir)).toMatchObject({ state: "repaired" });
  await removeCapture(lab.host, lab.rulesDir);
  await told();
}, 60_000);
