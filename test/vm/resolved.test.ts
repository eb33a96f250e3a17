import { cpSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** A machine whose resolv.conf points at systemd-resolved: it asks the agent for the mesh's names, and its stub is captured. */
let lab: Lab;
let machine: Machine;

const MESH = "pair.default.svc.cluster.local";
const OUTSIDE = "api.example.com";
const OUTSIDE_ADDRESS = "240.240.7.7";
/** Only the machine's former resolver has it. */
const OTHER = "outside.lab";

/** By resolv.conf, as an ordinary user. Empty if it has no address. */
async function lookUp(name: string): Promise<string> {
  const { stdout } = await machine.exec(
    `resolvectl flush-caches 2>&-; setpriv --reuid=65534 --clear-groups timeout 8 getent ahostsv4 ${name} || true`,
  );
  return stdout.split(/\s/)[0] ?? "";
}

/** By D-Bus, which nothing captures. Empty if it has no address. */
async function askResolved(name: string): Promise<string> {
  const { stdout } = await machine.exec(
    `resolvectl flush-caches; timeout 8 resolvectl query -4 --legend=no ${name} || true`,
  );
  return /: (\S+)/.exec(stdout)?.[1] ?? "";
}

const comes = (ask: (name: string) => Promise<string>, name: string, address: string): Promise<unknown> =>
  waitFor(
    `${name} to be ${address === "" ? "nobody" : address}`,
    async () => ((await ask(name)) === address ? true : undefined),
    30_000,
  );

const status = async (): Promise<string> =>
  (await machine.exec("resolvectl status eth0; resolvectl domain; resolvectl dns; cat /etc/resolv.conf"))
    .stdout;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("names");
  machine = await lab.vm("names", { deb: packageFile(), packages: ["systemd-resolved"] });
  await machine.exec(`set -e
mkdir -p /etc/systemd/resolved.conf.d
printf '[Resolve]\\nDNS=%s\\n' "$(sed -n 's/^nameserver //p' /etc/resolv.conf)" >/etc/systemd/resolved.conf.d/lab.conf
systemctl start systemd-resolved
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf`);
  await defineWorkload(lab, "pair", 9080);
  await lab.apply(`
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: outside, namespace: default }
spec:
  hosts: [${OUTSIDE}]
  addresses: [${OUTSIDE_ADDRESS}]
  ports: [{ number: 80, name: http, protocol: HTTP }]
  resolution: STATIC
  endpoints: [{ address: 203.0.113.7 }]
`);
  cpSync(await istioctlBundle(lab, "pair"), `${machine.root}/root/bundle`, { recursive: true });
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("names");
});

test("systemd-resolved asks the agent for the mesh's names, whatever happens to either, and for nothing more when it is gone", async () => {
  const other = await lookUp(OTHER);
  expect(other).toBe("10.99.0.2");
  const before = await status();
  await machine.exec("vmmesh join --bundle /root/bundle");
  const service = (
    await lab.kubectl(["get", "service", "pair", "-o", "jsonpath={.spec.clusterIP}"])
  ).stdout.trim();

  await comes(askResolved, OUTSIDE, OUTSIDE_ADDRESS);
  for (const name of [MESH, "pair", "pair.default"]) await comes(askResolved, name, service);
  for (const ask of [lookUp, askResolved]) {
    expect(await ask(MESH)).toBe(service);
    expect(await ask(OTHER)).toBe(other);
    // Below a domain of ours, and nobody's: it goes round in no circle.
    expect(await ask("nobody.default.svc.cluster.local")).toBe("");
  }

  await machine.exec("systemctl restart systemd-resolved");
  await comes(askResolved, MESH, service);
  // Whoever takes the route away: it comes back.
  await machine.exec("resolvectl revert vmmesh0");
  await comes(askResolved, OUTSIDE, OUTSIDE_ADDRESS);

  await machine.exec("systemctl kill -s KILL vmmesh-agent");
  expect(await askResolved(OTHER)).toBe(other);
  await comes(lookUp, OTHER, other);
  await comes(askResolved, MESH, service);
  await machine.exec("systemctl stop vmmesh-agent");
  expect(await status()).toBe(before);
  await comes(lookUp, OTHER, other);
  await machine.exec("systemctl start vmmesh-agent");
  await comes(askResolved, MESH, service);
}, 180_000);

test("without systemd-resolved, or with one that takes no routes, names come by capture; leave leaves nothing of it", async () => {
  const before = await status();
  const service = (
    await lab.kubectl(["get", "service", "pair", "-o", "jsonpath={.spec.clusterIP}"])
  ).stdout.trim();
  await machine.exec("systemctl stop systemd-resolved");
  await comes(lookUp, MESH, service);
  await comes(lookUp, OTHER, "10.99.0.2");
  expect((await machine.exec("systemctl is-active systemd-resolved || true")).stdout.trim()).toBe("inactive");

  // As where `resolvectl` knows no such verb, or D-Bus refuses.
  await machine.exec(`mv /usr/bin/resolvectl /usr/bin/resolvectl.gone
systemctl start systemd-resolved
ip link delete vmmesh0
systemctl restart vmmesh-agent`);
  await comes(lookUp, MESH, service);
  await waitFor(
    "the failure to be said",
    async () => (await machine.exec("vmmesh status || true")).stdout.includes("resolvectl") || undefined,
    30_000,
  );
  expect(await lookUp(MESH)).toBe(service);
  expect(await lookUp(OTHER)).toBe("10.99.0.2");
  await machine.exec(`mv /usr/bin/resolvectl.gone /usr/bin/resolvectl
systemctl restart vmmesh-agent`);
  await comes(askResolved, MESH, service);

  await machine.exec("systemctl stop systemd-resolved; vmmesh leave --now");
  await machine.exec("systemctl start systemd-resolved");
  expect(await status()).not.toContain("vmmesh0");
  expect(before).toContain("vmmesh0");
  expect((await machine.exec("ls -d /run/vmmesh* /sys/class/net/vmmesh* || true")).stdout).toBe("");
  expect(await lookUp(OTHER)).toBe("10.99.0.2");
  expect((await machine.exec("systemctl --failed --plain --no-legend")).stdout).toBe("");
}, 180_000);
