import { cpSync, readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  request,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
  workloadEntries,
} from "../lab/acceptance.ts";
import { Lab, type Machine, sleep, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** The other ways in: bare `vmmesh join --namespace default`, and a bundle made by `vmmesh bundle create`. */
let lab: Lab;
let admin: Machine;
let member: Machine;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await Promise.all(["solo", "shop"].map((name) => lab.removeVm(name)));
  const deb = packageFile();
  admin = await lab.vm("solo", { deb });
  member = await lab.vm("shop", { deb });
  admin.putFile("/root/.kube/config", lab.kubeconfigText("admin"), 0o600);
  await strictMtls(lab);
  await startApp(admin, 9080);
  await startApp(member, 9080);
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(["solo", "shop"].map((name) => lab?.removeVm(name)));
});

describe("other ways into the mesh", () => {
  test("a dry run says every step, what would change for whom, makes nothing in the cluster and nothing on the machine", async () => {
    await admin.exec(
      `systemd-run -q --unit=holder bash -c 'exec 3<>/dev/tcp/${lab.address}/6443; exec sleep 60'`,
    );
    await waitFor("a connection that lives", async () =>
      (await admin.exec("ss -tnH state established '( dport = :6443 )'")).stdout === "" ? undefined : true,
    );
    const { stdout, stderr } = await admin.exec("vmmesh join --namespace default --dry-run");
    await admin.exec("systemctl stop holder");
    expect(stdout).toMatch(new RegExp(`changes ${lab.address}:6443, called by \\w+ \\(uid 0\\)`));
    expect(stdout).toContain(`to leave it out: --exclude-outbound-cidr ${lab.address}/32`);
    expect(stderr).toContain("would be made: WorkloadGroup default/solo");
    expect(stdout).toContain("would write /etc/vmmesh/cluster.env");
    expect((await lab.kubectl(["get", "workloadgroups", "-n", "default", "-o", "name"])).stdout).toBe("");
    expect((await admin.exec("ls -d /etc/vmmesh /var/lib/vmmesh*", { allowFail: true })).stdout).toBe("");
  });

  test("bare `vmmesh join --namespace default` prints what it chose, and why", async () => {
    const { stdout, stderr } = await admin.exec("vmmesh join --namespace default");
    expect(stderr).toContain("kubeconfig: /root/.kube/config");
    for (const words of ["workload group", "service account", "istiod address", "this machine's host name"])
      expect(stderr).toContain(words);
    expect(stdout).toContain(spiffe("solo"));
    await waitFor("its WorkloadEntry", async () =>
      (await workloadEntries(lab)).has(`solo-${admin.ip}`) ? true : undefined,
    );
    expect((await admin.exec("vmmesh iptables audit", { allowFail: true })).code).toBe(0);
  });

  test("`vmmesh bundle create` on one machine, `vmmesh join --bundle` on another", async () => {
    await defineWorkload(lab, "shop", 9080);
    await lab.kubectl([
      "patch",
      "workloadgroup",
      "shop",
      "-n",
      "default",
      "--type=merge",
      "-p",
      JSON.stringify({
        spec: { metadata: { annotations: { "prometheus.io/scrape": "true", "prometheus.io/port": "9100" } } },
      }),
    ]);
    // The VM that makes the bundle needs no Envoy and is not joined by it.
    await admin.exec("vmmesh bundle create --namespace default --workload-group shop -o /root/shop-bundle");
    expect((await admin.exec("stat -c '%a' /root/shop-bundle /root/shop-bundle/istio-token")).stdout).toBe(
      "700\n600",
    );
    cpSync(`${admin.root}/root/shop-bundle`, `${member.root}/root/bundle`, { recursive: true });
    // A short life, so that a renewal happens while we watch.
    member.putFile(
      "/root/bundle/cluster.env",
      `${readFileSync(`${member.root}/root/bundle/cluster.env`, "utf8")}SECRET_TTL='60s'\n`,
    );
    const { stdout } = await member.exec("vmmesh join --bundle /root/bundle --output json");
    expect(JSON.parse(stdout)).toMatchObject({ joined: true, spiffe: spiffe("shop"), address: member.ip });
    await arrivesAs(admin, "http://shop/", spiffe("solo"));
  });

  test("the application's own metrics are in the one scrape", async () => {
    member.putFile("/srv/metrics", "# TYPE shop_orders_total counter\nshop_orders_total 42\n");
    await member.exec(
      "systemd-run -q --unit=app-metrics --uid=65534 -p WorkingDirectory=/srv /usr/bin/python3 -m http.server 9100 --bind 127.0.0.1",
    );
    const { stdout } = await waitFor("the merged scrape", async () => {
      const answer = await lab.exec(
        ["curl", "-sf", "-m", "3", `http://${member.ip}:15020/stats/prometheus`],
        { allowFail: true },
      );
      return answer.stdout.includes("shop_orders_total 42") ? answer : undefined;
    });
    expect(stdout).toContain("vmmesh_build_info");
    expect(stdout).toContain("envoy_cluster_");
  });

  test("the certificate is renewed by itself, without a restart and without a failed request", async () => {
    const serial = async (): Promise<string> =>
      (await member.exec("readlink /var/lib/vmmesh/identity/current")).stdout.trim();
    const envoyHas = async (): Promise<string> =>
      (
        await member.exec("curl -s --unix-socket /run/vmmesh-envoy/admin.sock http://x/certs")
      ).stdout.toLowerCase();
    const envoyPid = async (): Promise<string> =>
      (await member.exec("systemctl show -p MainPID --value vmmesh-envoy")).stdout;
    const [first, pid] = [await serial(), await envoyPid()];
    let failed = 0;
    let sent = 0;
    const deadline = performance.now() + 50_000;
    while (performance.now() < deadline && (await serial()) === first) {
      sent += 1;
      if ((await request(admin, "http://shop/")).status !== 200) failed += 1;
      await sleep(100);
    }
    const second = await serial();
    expect(second).not.toBe(first);
    await waitFor(
      "Envoy to hold the new certificate",
      async () => ((await envoyHas()).includes(second.replace(/^0+/, "")) ? true : undefined),
      10_000,
    );
    for (let round = 0; round < 20; round += 1)
      if ((await request(admin, "http://shop/")).status !== 200) failed += 1;
    console.log(`renewed ${first} → ${second} under ${sent + 20} requests, ${failed} failed`);
    expect(failed).toBe(0);
    expect(await envoyPid()).toBe(pid);
  });

  test("istiod away for a while: requests go on, names resolve, and it comes back by itself", async () => {
    await lab.stopIstiod();
    try {
      for (let round = 0; round < 20; round += 1)
        expect((await request(admin, "http://shop/")).status).toBe(200);
      await admin.exec("systemctl restart vmmesh-agent");
      expect((await admin.exec("systemctl is-active vmmesh-agent vmmesh-envoy")).stdout).toBe(
        "active\nactive",
      );
      expect((await request(admin, "http://10.99.0.13/")).status).not.toBe(200);
    } finally {
      await lab.startIstiod();
    }
    await waitFor(
      "the agent to be connected again",
      async () =>
        (await admin.exec("vmmesh status", { allowFail: true })).stdout.includes(
          "connected to 10.99.0.2:15012",
        )
          ? true
          : undefined,
      60_000,
    );
    await arrivesAs(admin, "http://shop/", spiffe("solo"));
  });

  test("journal lines carry fields", async () => {
    const { stdout } = await admin.exec("journalctl -t vmmesh -o json --no-pager");
    expect(stdout).toContain('"VMMESH_SPIFFE":"spiffe://cluster.local/ns/default/sa/solo"');
  });
});
