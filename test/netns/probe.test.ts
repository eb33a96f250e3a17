import { afterEach, beforeEach, expect, test } from "vitest";
import { PORTS, PROBE_ADDRESS, PROBE_ANSWER } from "../../agent/core/paths.ts";
import { probeCapture } from "../../agent/iptables/probe.ts";
import { both, Lab, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

async function install(): Promise<void> {
  const wish = { ...WISH, meshCidrs: [...WISH.meshCidrs, ...Object.values(PROBE_ADDRESS)] };
  await lab.install(wish);
}

const met = async () => [(await probeCapture(lab.host, 4)).met, (await probeCapture(lab.host, 6)).met];

test("the probe meets Envoy through the rules, and says what it meets without Envoy or without the rules", async () => {
  await install();
  expect(await met(), "no Envoy").toEqual(["no listener", "no listener"]);
  await lab.serve(lab.machine, UID.envoy, { comm: "envoy", tcp: both(PORTS.outbound, PROBE_ANSWER) });
  expect(await met(), "all in order").toEqual(["envoy", "envoy"]);

  await lab.insideShell("iptables-nft -t nat -I OUTPUT 1 -j ACCEPT; nft delete table ip vmmesh");
  expect(await met(), "a foreign rule is ahead: the fence holds").toEqual(["refused", "envoy"]);
  await lab.insideShell("nft delete table inet vmmesh-fence");
  expect(await met(), "nothing holds: nobody answers out there").toEqual(["past", "envoy"]);
  await lab.insideShell("ip route del default");
  expect(await met(), "no route").toEqual(["no route", "envoy"]);
});

test("somebody else's answer is no proof", async () => {
  await install();
  await lab.serve(lab.machine, UID.envoy, { tcp: [["0.0.0.0", PORTS.outbound, "SOMEBODY"]] });
  expect(await probeCapture(lab.host, 4)).toMatchObject({
    met: "past",
    seen: expect.stringContaining("SOMEBODY"),
  });
});
