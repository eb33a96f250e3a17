import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  request,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** Inbound capture by TPROXY under a real istiod and a stock Envoy, STRICT mutual TLS from the start. */
let lab: Lab;
let details: Machine;
let reviews: Machine;
let before: string;

/** What TPROXY changes beside the rules: the kernel's routing, what is at Envoy's unit. */
const surroundings = async (machine: Machine): Promise<string> =>
  (
    await machine.exec(
      `for f in -4 -6; do ip $f rule; ip $f route show table 133 2>/dev/null; done
       ls -A /etc/systemd/system/vmmesh-envoy.service.d 2>&1
       systemctl show -p AmbientCapabilities,CapabilityBoundingSet,NeedDaemonReload vmmesh-envoy.service`,
      { allowFail: true },
    )
  ).stdout;

/** uid and effective capabilities of the running Envoy. */
const envoyOf = async (machine: Machine): Promise<{ user: string; capabilities: string }> => {
  const { stdout } = await machine.exec(
    `pid=$(systemctl show -p MainPID --value vmmesh-envoy.service); ps -o user= -p $pid; sed -n 's/^CapEff:\\t//p' /proc/$pid/status`,
  );
  const [user = "", capabilities = ""] = stdout.trim().split("\n");
  return { user: user.trim(), capabilities };
};
const NET_RAW = "0000000000002000";

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await Promise.all(["details", "reviews"].map((name) => lab.removeVm(name)));
  const deb = packageFile();
  details = await lab.vm("details", { deb });
  reviews = await lab.vm("reviews", { deb });
  for (const machine of [details, reviews]) {
    await defineWorkload(lab, machine.name, 9080);
    await startApp(machine, 9080);
    cpSync(await istioctlBundle(lab, machine.name), `${machine.root}/root/bundle`, { recursive: true });
  }
  await strictMtls(lab);
  before = await surroundings(details);
}, 300_000);

afterAll(async () => {
  await Promise.all(["details", "reviews"].map((name) => lab?.removeVm(name)));
});

describe("inbound by TPROXY", () => {
  test("one machine joins with it, the other without", async () => {
    await details.exec(
      "vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16 --interception-mode tproxy",
    );
    await reviews.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
  });

  test("an mTLS request arrives, and the application sees the client's address", async () => {
    const seen = await arrivesAs(reviews, "http://details.default.svc.cluster.local/", spiffe("reviews"));
    expect(seen).toMatchObject({ server: "details", client: reviews.ip });
    expect((await arrivesAs(details, "http://reviews/", spiffe("details"))).client).toBe("127.0.0.6");
  });

  test("a call of the machine to its own service arrives, too", async () => {
    // In full: the short name is 127.0.1.1 on the machine of that name.
    const url = "http://details.default.svc.cluster.local/";
    expect((await arrivesAs(details, url, spiffe("details"))).server).toBe("details");
  });

  test("Envoy is not root and has one capability; the other machine's has none", async () => {
    expect(await envoyOf(details)).toEqual({ user: "vmmesh-envoy", capabilities: NET_RAW });
    expect((await envoyOf(reviews)).capabilities).toBe("0000000000000000");
  });

  test("plain text from outside the mesh is refused, the audit finds nothing", async () => {
    expect(
      (await lab.exec(["curl", "-s", "-m", "3", `http://${details.ip}:9080/`], { allowFail: true })).code,
    ).not.toBe(0);
    const audit = await details.exec("vmmesh iptables audit", { allowFail: true });
    expect(audit.code, audit.stdout).toBe(0);
  });

  test("a port that the machine's firewall closes is closed for the mesh, too", async () => {
    await details.exec("iptables -I INPUT 1 -p tcp --dport 9080 -i eth0 -j DROP");
    expect((await request(reviews, "http://details/")).status).not.toBe(200);
    await details.exec("iptables -D INPUT -p tcp --dport 9080 -i eth0 -j DROP");
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
  });

  test("after a reboot all of it is there again", async () => {
    await details.reboot();
    const seen = await arrivesAs(reviews, "http://details/", spiffe("reviews"), 60_000);
    expect(seen.client).toBe(reviews.ip);
  });

  test("REDIRECT and back, by Istio's variable and `iptables apply`", async () => {
    const mode = (word: string): string =>
      `sed -i "s/^#*ISTIO_INBOUND_INTERCEPTION_MODE=.*/ISTIO_INBOUND_INTERCEPTION_MODE='${word}'/" /etc/vmmesh/sidecar.env && vmmesh iptables apply`;
    await details.exec(mode("REDIRECT"));
    expect(await surroundings(details)).toBe(before);
    const client = async (address: string): Promise<true | undefined> =>
      (await arrivesAs(reviews, "http://details/", spiffe("reviews"))).client === address ? true : undefined;
    await waitFor("the inbound listener of REDIRECT", () => client("127.0.0.6"));
    expect((await envoyOf(details)).capabilities).toBe("0000000000000000");
    await details.exec(mode("TPROXY"));
    await waitFor("the inbound listener of TPROXY", () => client(reviews.ip));
    const wrong = await details.exec(mode("TRPOXY"), { allowFail: true });
    expect(wrong.code).not.toBe(0);
    expect(wrong.stderr).toContain("is `TRPOXY`, which is neither REDIRECT nor TPROXY");
    await details.exec(mode("TPROXY"));
  });

  test("leave gives routing and unit back", async () => {
    expect(await surroundings(details)).toContain("0x539/0xfff lookup 133");
    await details.exec("vmmesh leave --now");
    expect(await surroundings(details)).toBe(before);
  });
});
