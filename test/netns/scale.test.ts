import { createHash } from "node:crypto";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { withoutCounters } from "../../agent/iptables/parse.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { kubeProxyRules } from "./kubeProxy.ts";
import { Lab, SERVICE, UID } from "./lab.ts";

/** On two busy cores; a machine at rest needs a tenth. */
const WITHIN_MS = 20_000;

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

/** Of every rule that is not ours, in order. */
async function foreignHash(): Promise<string> {
  const { stdout } = await lab.inside(["iptables-nft-save"]);
  const rules = withoutCounters(stdout).filter(
    (line) => line.startsWith("-A") && !line.includes('"vmmesh: '),
  );
  return createHash("sha256").update(rules.join("\n")).digest("hex");
}

async function timed<T>(work: () => Promise<T>): Promise<{ result: T; tookMs: number }> {
  const { clock } = lab.host;
  const started = clock.monotonicMs();
  const result = await work();
  return { result, tookMs: clock.monotonicMs() - started };
}

describe.for([20_000, 50_000])("beside %i rules of kube-proxy", (count) => {
  test("apply, look, repair and removal are right and quick, and leave every foreign rule as it was", {
    timeout: 180_000,
  }, async () => {
    await lab.populate();
    const loaded = await lab.inside(["iptables-nft-restore", "--noflush"], kubeProxyRules(count));
    expect(loaded).toMatchObject({ code: 0 });
    const before = await foreignHash();
    const applied = await timed(async () => lab.apply());
    expect(await foreignHash()).toBe(before);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    await applied.result.confirm();

    const looked = await timed(() => loadConfirmed(lab.host, lab.rulesDir));
    expect(looked.result).toMatchObject({ state: "in place" });

    // As kube-proxy does when its jump is not where it wants it.
    await lab.insideShell(
      'iptables-nft -t nat -D OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES; iptables-nft -t nat -I OUTPUT 1 -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    );
    const repaired = await timed(() => loadConfirmed(lab.host, lab.rulesDir));
    expect(repaired.result).toMatchObject({ state: "repaired" });
    expect(repaired.result.repaired).toHaveLength(1);
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");

    const saved = await timed(() => lab.inside(["iptables-nft-save"]));
    const removed = await timed(() => removeCapture(lab.host, lab.rulesDir));
    expect(removed.result).toMatchObject({ residue: [], foreignUnchanged: true });
    expect(await foreignHash()).toBe(before);
    // It reads every rule of everybody before and after, to say that it changed none.
    const removal = removed.tookMs - 2 * saved.tookMs;
    const took = { apply: applied.tookMs, look: looked.tookMs, repair: repaired.tookMs, removal };
    for (const [name, tookMs] of Object.entries(took)) expect(tookMs, name).toBeLessThan(WITHIN_MS);
  });
});
