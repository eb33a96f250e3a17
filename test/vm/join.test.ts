import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  proxyStatus,
  request,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
  workloadEntries,
} from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/**
 * The acceptance of the join: two systemd machines with the installed package, a real istiod, a stock Envoy. One machine
 * joins with a bundle of the real istioctl, the other with a kubeconfig; STRICT mutual TLS from the start.
 */
let lab: Lab;
let details: Machine;
let reviews: Machine;
let before: { details: string; reviews: string };

/** Rules and own chains of everybody, without counters and without empty built-in chains (their mere existence changes nothing). */
const rulesOf = async (machine: Machine): Promise<string> => {
  const { stdout } = await machine.exec(
    "iptables-save; echo ---; ip6tables-save; echo ---; nft list tables | grep -v ' \\(nat\\|mangle\\|raw\\|filter\\)$'",
    { allowFail: true },
  );
  return stdout
    .split("\n")
    .filter((line) => /^(-|:\S+ - |table )/.test(line))
    .map((line) => line.replace(/\[\d+:\d+\]/, ""))
    .join("\n");
};
const FOREIGN =
  "iptables -t nat -N OTHER; iptables -t nat -A OUTPUT -p tcp --dport 4444 -j OTHER; ip6tables -A INPUT -p tcp --dport 4445 -j DROP";

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await Promise.all(["details", "reviews"].map((name) => lab.removeVm(name)));
  const deb = packageFile();
  details = await lab.vm("details", { deb });
  reviews = await lab.vm("reviews", { deb });
  await defineWorkload(lab, "details", 9080);
  await strictMtls(lab);
  await startApp(details, 9080);
  await startApp(reviews, 9080);
  // Foreign rules that must be there, unchanged, at the end.
  for (const machine of [details, reviews]) {
    await machine.exec(FOREIGN);
  }
  before = { details: await rulesOf(details), reviews: await rulesOf(reviews) };
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(["details", "reviews"].map((name) => lab?.removeVm(name)));
});

describe("two machines join a real mesh", () => {
  test("with a bundle of istioctl, and no credential of the cluster on the machine", async () => {
    cpSync(await istioctlBundle(lab, "details"), `${details.root}/root/bundle`, { recursive: true });
    const { stdout } = await details.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
    expect(stdout).toContain(`joined: this machine is ${spiffe("details")}`);
  });

  test("with a kubeconfig of narrow rights, which makes what is missing", async () => {
    reviews.putFile("/root/kubeconfig", lab.kubeconfigText("joiner"), 0o600);
    const { stdout, stderr } = await reviews.exec(
      "vmmesh join --namespace default --service reviews --port http:9080 --kubeconfig /root/kubeconfig",
    );
    expect(stdout).toContain(`joined: this machine is ${spiffe("reviews")}`);
    expect(stderr).toContain("made: WorkloadGroup default/reviews");
    // The credential is used, not kept.
    const kept = await reviews.exec(
      "grep -rl joiner-token /etc/vmmesh /var/lib/vmmesh /var/lib/vmmesh-host /run/vmmesh",
      { allowFail: true },
    );
    expect(kept.stdout).toBe("");
  });

  test("the token is 0600 and nothing else in /etc/vmmesh is secret", async () => {
    expect((await details.exec("stat -c '%a %U' /var/lib/vmmesh/token")).stdout.trim()).toBe("600 vmmesh");
    expect((await details.exec("grep -rl 'PRIVATE KEY\\|eyJ' /etc/vmmesh", { allowFail: true })).stdout).toBe(
      "",
    );
  });

  test("both are in sync in the real istioctl proxy-status", async () => {
    await waitFor("proxy-status", async () => {
      const lines = await proxyStatus(lab);
      const both = ["details.default", "reviews.default"].map((name) => lines.get(name) ?? "");
      return both.every((line) => line !== "" && !/STALE|NOT SENT.*NOT SENT.*NOT SENT/.test(line))
        ? true
        : undefined;
    });
  });

  test("a WorkloadEntry for each; the one with a probe turns Healthy", async () => {
    await waitFor("WorkloadEntries", async () => {
      const entries = await workloadEntries(lab);
      const [one, other] = [entries.get(`details-${details.ip}`), entries.get(`reviews-${reviews.ip}`)];
      return one?.healthy === true && other?.address === reviews.ip ? true : undefined;
    });
  });

  test("DHCP writes resolv.conf anew: the rules follow, also behind a link; a lease that ends changes nothing", async () => {
    const captured = async (): Promise<string> => (await details.exec("iptables-save -t nat")).stdout;
    const follow = async (server: string, write: string): Promise<void> => {
      await details.exec(`(cat /root/resolv.conf; echo nameserver ${server}) > /run/new.conf; ${write}`);
      await waitFor(
        `rules for ${server}`,
        async () => ((await captured()).includes(`-d ${server}/32`) ? true : undefined),
        10_000,
      );
    };
    await details.exec("cp -L /etc/resolv.conf /root/resolv.conf; mkdir /run/dhcp");
    await follow("198.51.100.51", "cp /run/new.conf /etc/new.conf; mv /etc/new.conf /etc/resolv.conf");
    await follow("198.51.100.52", "cat /run/new.conf > /etc/resolv.conf");
    await follow(
      "198.51.100.53",
      "mv /run/new.conf /run/dhcp/resolv.conf; ln -s /run/dhcp/resolv.conf /etc/new.conf; mv -T /etc/new.conf /etc/resolv.conf",
    );
    await follow("198.51.100.54", "mv /run/new.conf /run/dhcp/resolv.conf");
    await details.exec("echo search lab.test > /run/dhcp/resolv.conf; systemctl start vmmesh-resolvers");
    expect(await captured()).toContain("-d 198.51.100.54/32");
    await details.exec("cp /root/resolv.conf /etc/new.conf; mv -T /etc/new.conf /etc/resolv.conf");
    // A file in the place of a link is seen by the timer only.
    await waitFor(
      "the former rules",
      async () => ((await captured()).includes("198.51.100.") ? undefined : true),
      40_000,
    );
    const { stdout } = await details.exec("vmmesh iptables audit --output json", { allowFail: true });
    expect(stdout).toContain('"findings"');
    expect(stdout).not.toContain("FW047");
  });

  test("a request by name arrives with the client's identity, in both directions", async () => {
    const there = await arrivesAs(reviews, "http://details.default.svc.cluster.local/", spiffe("reviews"));
    expect(there.server).toBe("details");
    expect((await arrivesAs(reviews, "http://details/", spiffe("reviews"))).server).toBe("details");
    expect((await arrivesAs(details, "http://reviews:9080/", spiffe("details"))).server).toBe("reviews");
  });

  test("plain text from outside the mesh is refused on the declared port", async () => {
    const { code } = await lab.exec(["curl", "-s", "-m", "3", `http://${details.ip}:9080/`], {
      allowFail: true,
    });
    expect(code).not.toBe(0);
  });

  test("other names go to the machine's resolver untouched, by UDP and TCP", async () => {
    const dig = async (args: string): Promise<string> =>
      (await details.exec(`dig +short ${args}`)).stdout.trim();
    expect(await dig("outside.lab A")).toBe("10.99.0.2");
    expect(await dig("+tcp outside.lab AAAA")).toBe("fd00:99::2");
    expect(await dig("outside.lab TXT")).toBe('"plain text"');
    expect(await dig("details.default.svc.cluster.local AAAA")).toBe("");
    expect(await dig("+tcp details A")).toMatch(/^10\.96\./);
  });

  test("the audit finds nothing, status says so in one screen", async () => {
    const audit = await details.exec("vmmesh iptables audit", { allowFail: true });
    expect({ code: audit.code, said: audit.stdout }).toEqual({
      code: 0,
      said: expect.stringMatching(/^nothing wrong found: capture is complete and in order/),
    });
    const { stdout } = await details.exec("vmmesh status");
    expect(stdout).toContain(spiffe("details"));
    expect(stdout.split("\n").length).toBeLessThanOrEqual(24);
    expect(stdout.split("\n").every((line) => [...line].length <= 80)).toBe(true);
  });

  test("a second join says that the machine is joined, and changes nothing", async () => {
    const again = await details.exec("vmmesh join --bundle /root/bundle", { allowFail: true });
    expect(again.code).toBe(6);
    expect(again.stderr).toContain("ALREADY_JOINED");
  });

  test("the access log is in the journal although the mesh says /dev/stdout", async () => {
    await waitFor("the access log", async () =>
      (await details.exec("journalctl -t vmmesh-envoy-access -o cat --no-pager")).stdout.includes(
        '"GET / HTTP/1.1" 200',
      )
        ? true
        : undefined,
    );
  });

  test("with the probe failing the endpoint goes away, and comes back with it", async () => {
    await details.exec("touch /tmp/unhealthy; chmod 644 /tmp/unhealthy");
    await waitFor("the entry to turn unhealthy", async () =>
      (await workloadEntries(lab)).get(`details-${details.ip}`)?.healthy === false ? true : undefined,
    );
    await waitFor("no endpoint", async () =>
      (await request(reviews, "http://details/")).status === 503 ? true : undefined,
    );
    await details.exec("rm /tmp/unhealthy");
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
  });

  test("a path unit that failed is started again by the timer's repair; one that the operator stopped is not", async () => {
    const stateOf = async (): Promise<string> =>
      (await reviews.exec("systemctl is-active vmmesh-rules.path", { allowFail: true })).stdout.trim();
    // A limit on its service is how a path unit is made to fail without taking inotify away from the whole kernel.
    const limit = "/run/systemd/system/vmmesh-order.service.d/test.conf";
    reviews.putFile("/run/limit.conf", "[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=1\n");
    await reviews.exec(`install -D -m 0644 /run/limit.conf ${limit} && systemctl daemon-reload`);
    try {
      await waitFor("the path unit to fail", async () => {
        await reviews.exec("touch /run/vmmesh/repair-request");
        return (await stateOf()) === "failed" ? true : undefined;
      });
    } finally {
      await reviews.exec(
        `rm -f ${limit}; systemctl daemon-reload; systemctl reset-failed vmmesh-order.service || true`,
      );
    }
    // The request that is still there starts the quick repair, which ends this one: what the timer does, too.
    await reviews.exec("systemctl start vmmesh-rules.service", { allowFail: true });
    await waitFor("the path unit to be active", async () =>
      (await stateOf()) === "active" ? true : undefined,
    );
    await waitFor("the request to be answered", async () =>
      (
        await reviews.exec(
          'test ! -e /run/vmmesh/repair-request && test "$(systemctl is-active vmmesh-order.service vmmesh-rules.service | sort -u)" = inactive',
          { allowFail: true },
        )
      ).code === 0
        ? true
        : undefined,
    );
    expect((await reviews.exec("journalctl -u vmmesh-rules.service -o cat")).stdout).toContain(
      "repaired: vmmesh-rules.path had failed",
    );
    await reviews.exec("systemctl stop vmmesh-rules.path && systemctl start vmmesh-rules.service");
    expect(await stateOf()).toBe("inactive");
    await reviews.exec("systemctl start vmmesh-rules.path");
  });

  test("kube-proxy in iptables mode, started after the join and restarted: the request still goes through Envoy", async () => {
    reviews.putFile("/etc/kube-proxy.conf", lab.kubeconfigText("admin"), 0o600);
    reviews.putFile(
      "/etc/systemd/system/kube-proxy.service",
      "[Service]\nExecStart=/usr/local/bin/kube-proxy --kubeconfig=/etc/kube-proxy.conf --proxy-mode=iptables --cluster-cidr=10.244.0.0/16 --conntrack-max-per-core=0 --hostname-override=reviews\n",
    );
    await reviews.exec("systemctl daemon-reload && systemctl start kube-proxy");
    await waitFor("kube-proxy's rules", async () =>
      (await reviews.exec("iptables -t nat -S OUTPUT")).stdout.includes("KUBE-SERVICES") ? true : undefined,
    );
    expect((await arrivesAs(reviews, "http://details/", spiffe("reviews"))).server).toBe("details");
    await reviews.exec(
      "systemctl stop kube-proxy; /usr/local/bin/kube-proxy --cleanup; systemctl start kube-proxy",
      { allowFail: true },
    );
    await waitFor("kube-proxy's rules again", async () =>
      (await reviews.exec("iptables -t nat -S OUTPUT")).stdout.includes("KUBE-SERVICES") ? true : undefined,
    );
    // Whatever the order in iptables is at this moment, no request slips past Envoy.
    for (let round = 0; round < 10; round += 1) {
      const seen = await request(reviews, "http://details/");
      expect(seen.status).toBe(200);
      expect(seen.headers["x-forwarded-client-cert"]).toContain(spiffe("reviews"));
    }
    await waitFor(
      "our jump to be first again",
      async () => {
        const { stdout } = await reviews.exec("iptables -t nat -S OUTPUT");
        return /^-P OUTPUT ACCEPT\n-A OUTPUT .*-j ISTIO_OUTPUT\n/.test(stdout) ? true : undefined;
      },
      60_000,
    );
    await reviews.exec(
      "systemctl stop kube-proxy; /usr/local/bin/kube-proxy --cleanup; iptables -t mangle -X KUBE-PROXY-CANARY; ip6tables -t mangle -X KUBE-PROXY-CANARY",
      { allowFail: true },
    );
  });

  test("a real Prometheus that scrapes the machine sees a rise of exactly N after N requests", async () => {
    const prometheus = await lab.prometheus([`${details.ip}:15020`]);
    try {
      // 2xx at the inbound listener of the declared port, as Envoy counts it; probes of the agent do not pass there.
      const query = `sum(envoy_cluster_upstream_rq_xx{cluster_name=~"inbound\\\\|9080.*",response_code_class="2xx"})`;
      const alternative = `sum(envoy_cluster_upstream_rq_total{cluster_name=~"inbound\\\\|9080.*"})`;
      const value = async (): Promise<number> =>
        (await prometheus.query(query)) ?? (await prometheus.query(alternative)) ?? 0;
      await waitFor("the first scrape", async () =>
        (await prometheus.query("up")) === 1 ? true : undefined,
      );
      await new Promise((resolve) => setTimeout(resolve, 7000));
      const start = await value();
      const count = 17;
      for (let round = 0; round < count; round += 1)
        expect((await request(reviews, "http://details/")).status).toBe(200);
      await waitFor(
        `a rise of ${count} over ${start}`,
        async () => ((await value()) === start + count ? true : undefined),
        20_000,
        500,
      );
      await new Promise((resolve) => setTimeout(resolve, 3000));
      expect(await value()).toBe(start + count);
      expect(await prometheus.query("vmmesh_build_info")).toBe(1);
      expect(await prometheus.query("istio_agent_cert_expiry_seconds")).toBeGreaterThan(3600);
    } finally {
      await prometheus.stop();
    }
  });

  test("after a reboot the machine is back in the mesh by itself", async () => {
    await details.reboot();
    await arrivesAs(reviews, "http://details/", spiffe("reviews"), 60_000);
    await arrivesAs(details, "http://reviews:9080/", spiffe("details"), 60_000);
    await waitFor(
      "the audit to find nothing",
      async () =>
        (await details.exec("vmmesh iptables audit", { allowFail: true })).code === 0 ? true : undefined,
      60_000,
    );
  });

  test.for(["details", "reviews"] as const)("leave: nothing of vmmesh is left on %s", async (name) => {
    const machine = name === "details" ? details : reviews;
    // The reboot took the foreign rules with it; somebody puts them back while the machine is joined.
    if (name === "details") await machine.exec(FOREIGN);
    const { stdout } = await machine.exec("vmmesh leave");
    expect(stdout).toContain("left:");
    expect(await rulesOf(machine)).toBe(before[name]);
    const residue = await machine.exec(
      "ls -d /etc/vmmesh /var/lib/vmmesh /var/lib/vmmesh-host /run/vmmesh* 2>/dev/null; systemctl list-units 'vmmesh*' --state=active --no-legend; ip -6 addr show dev lo | grep '::6/'",
      { allowFail: true },
    );
    expect(residue.stdout).toBe("");
    await waitFor(
      "the WorkloadEntry to go",
      async () => ((await workloadEntries(lab)).has(`${name}-${machine.ip}`) ? undefined : true),
      30_000,
    );
  });
});
