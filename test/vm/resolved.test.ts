import { cpSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** A machine whose resolv.conf points at systemd-resolved: it asks the agent for the mesh's names, nothing is captured. */
let lab: Lab;
let machine: Machine;

const MESH = "pair.default.svc.cluster.local";
const OUTSIDE = "api.example.com";
const OUTSIDE_ADDRESS = "240.240.7.7";
/** Only the machine's former resolver has it. */
const OTHER = "outside.lab";

/** As an ordinary user sees it. Empty if it has no address. */
async function lookUp(name: string): Promise<string> {
  const { stdout } = await machine.exec(
    `resolvectl flush-caches; setpriv --reuid=65534 --clear-groups timeout 8 getent ahostsv4 ${name} || true`,
  );
  return stdout.split(/\s/)[0] ?? "";
}

const comes = (name: string, address: string): Promise<unknown> =>
  waitFor(
    `${name} to be ${address === "" ? "nobody" : address}`,
    async () => ((await lookUp(name)) === address ? true : undefined),
    15_000,
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
  await defineWorkload(lab, "pair", 9080, "");
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

  await comes(OUTSIDE, OUTSIDE_ADDRESS);
  for (const name of [MESH, "pair", "pair.default"]) await comes(name, service);
  expect((await machine.exec(`resolvectl query -4 ${MESH}`)).stdout).toContain(service);
  expect(await lookUp(OTHER)).toBe(other);
  expect((await machine.exec("iptables-save -t nat")).stdout).not.toContain("--to-ports 15053");

  await machine.exec("systemctl restart systemd-resolved");
  await comes(MESH, service);
  // Whoever takes the route away: it comes back.
  await machine.exec("resolvectl revert vmmesh0");
  await comes(OUTSIDE, OUTSIDE_ADDRESS);
  expect(await lookUp(OTHER)).toBe(other);

  await machine.exec("systemctl kill -s KILL vmmesh-agent");
  expect(await lookUp(OTHER)).toBe(other);
  await comes(MESH, service);
  await machine.exec("systemctl stop vmmesh-agent");
  expect(await status()).toBe(before);
  expect(await lookUp(OTHER)).toBe(other);
  await machine.exec("systemctl start vmmesh-agent");
  await comes(MESH, service);

  await machine.exec("vmmesh leave --now");
  expect(await status()).toBe(before);
  expect(await lookUp(OTHER)).toBe(other);
  expect((await machine.exec("ls -d /run/vmmesh* || true")).stdout).toBe("");
  expect((await machine.exec("systemctl --failed --plain --no-legend")).stdout).toBe("");
}, 180_000);
