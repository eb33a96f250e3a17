import { afterEach, beforeEach, expect, test } from "vitest";
import { auditCapture } from "../../agent/iptables/audit/audit.ts";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { Lab, SERVICE, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

async function install(ruleComments: boolean): Promise<void> {
  await lab.install({ ...WISH, ruleComments });
}

const reasons = async () => (await lab.firewall()).filter((line) => line.includes("vmmesh: "));

test("without comments the rules are ours all the same: applied again, mended, audited, removed, and foreign ones stay", async () => {
  await lab.populate();
  const foreign = "-t nat -A OUTPUT -p tcp -m tcp --dport 81 -m comment --comment foreign -j RETURN";
  await lab.insideShell(`iptables-nft ${foreign}`);
  const before = await lab.firewall();
  await install(true);
  expect((await reasons()).length).toBeGreaterThan(0);
  await install(false);
  expect(await reasons()).toEqual([]);
  await install(false);
  expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
  const audited = (await auditCapture(lab.host, lab.rulesDir)).filter(({ severity }) => severity !== "info");
  expect(audited.map(({ id, evidence }) => [id, ...evidence])).toEqual([]);

  await lab.insideShell(
    "iptables-nft -t nat -I OUTPUT 1 -p tcp --dport 80 -j ACCEPT; nft delete table ip vmmesh",
  );
  const { repaired } = await loadConfirmed(lab.host, lab.rulesDir);
  expect(repaired.length).toBeGreaterThan(0);
  expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
  expect(await reasons()).toEqual([]);
  await lab.insideShell("iptables-nft -t nat -D OUTPUT -p tcp --dport 80 -j ACCEPT");

  await removeCapture(lab.host, lab.rulesDir);
  expect(await lab.firewall()).toEqual(before);
});

test("the record is lost, too: clean takes out what stands beside our own tables", async () => {
  await install(false);
  await linuxHost().files.remove(lab.rulesDir);
  expect((await removeCapture(lab.host, lab.rulesDir)).removed).toEqual(["rules without a record"]);
  expect((await lab.firewall()).filter((line) => /ISTIO|VMMESH|vmmesh/.test(line))).toEqual([]);
});

test("rules that are not in our record are somebody else's", async () => {
  await install(false);
  await lab.insideShell("iptables-nft -t nat -A ISTIO_OUTPUT -d 192.0.2.9/32 -j RETURN");
  await expect(install(false)).rejects.toThrow("192.0.2.9");
});
