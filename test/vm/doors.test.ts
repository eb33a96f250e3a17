import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { UNITS } from "../../agent/platform/services.ts";
import { Authority } from "../controlplane/authority.ts";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot, startApp } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { ATTEMPTS, asRoot, type Broken, inUnit, outside } from "./attempts.ts";
import { packageFile } from "./package.ts";
import { dnsQuestion, openPorts } from "./scan.ts";

let lab: Lab;
let details: Machine;
let operator: Authority;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("details");
  details = await lab.vm("details", { deb: packageFile(), packages: ["polkitd"] });
  await defineWorkload(lab, "details", 9080);
  await startApp(details, 9080);
  await details.exec(`systemctl start ssh && systemd-run -q python3 -c '${LISTEN6}'`);
  cpSync(await istioctlBundle(lab, "details"), `${details.root}/root/bundle`, { recursive: true });
  await installPair();
  await details.exec(`vmmesh join --bundle /root/bundle --metrics-tls ${PAIR}`);
  // What nobody may read must be there to be read: it is written some seconds after Envoy has accepted its configuration.
  await waitFor("last-good", async () =>
    (await details.exec("test -s /var/lib/vmmesh/last-good", { allowFail: true })).code === 0
      ? true
      : undefined,
  );
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("details");
});

/** The metrics port's own certificate, of a CA of the operator's. */
const PAIR = "/etc/ssl/vmmesh-metrics";

async function installPair(): Promise<void> {
  operator = await Authority.create("operator.example");
  const { key, cert } = await operator.server(["details.example"], []);
  details.putFile(`${PAIR}/tls.crt`, cert);
  details.putFile(`${PAIR}/tls.key`, key, 0o600);
  const join = `vmmesh join --bundle /root/bundle --metrics-tls ${PAIR}`;
  const closed = await details.exec(join, { allowFail: true });
  expect(closed.code).toBe(2);
  expect(closed.stderr).toContain(`user vmmesh cannot read ${PAIR}/tls.key`);
  await details.exec(`chown root:vmmesh ${PAIR}/tls.key && chmod 0640 ${PAIR}/tls.key`);
}

/** As Prometheus with `scheme: https` and `ca_file`: chain and name are verified. */
async function scrape(ca: string, name: string) {
  const folder = mkdtempSync(`${tmpdir()}/vmmesh-`);
  try {
    writeFileSync(`${folder}/ca.pem`, ca);
    const argv = ["curl", "-sS", "-m", "10", "--cacert", `${folder}/ca.pem`];
    const at = ["--connect-to", `::${details.ip}:15020`, `https://${name}:15020/stats/prometheus`];
    return await lab.exec([...argv, ...at], { allowFail: true });
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** A second application at the captured port, for IPv6. */
const LISTEN6 =
  'import socket, time; s = socket.create_server(("::", 9080), family=socket.AF_INET6); time.sleep(9999)';

const attemptsOf = (who: Broken) => ATTEMPTS.filter(({ by }) => by === undefined || by === who);

/** `systemd-analyze security`, 0 to 10: as measured with systemd 252, and a tenth more. */
const EXPOSURE: Readonly<Record<string, number>> = {
  "vmmesh-agent": 1.7,
  "vmmesh-envoy": 1.4,
  "vmmesh-envoy-log": 0.5,
  "vmmesh-fence": 3.5,
  "vmmesh-hold": 1.7,
  "vmmesh-nftmon": 1.4,
  "vmmesh-order": 5.9,
  "vmmesh-resolved@": 2.2,
  "vmmesh-resolvers": 7.9,
  "vmmesh-rules": 4.1,
};

test("no unit is more exposed than it was when its sandbox was made", async () => {
  const units = (await details.exec("cd /usr/lib/systemd/system && ls vmmesh-*.service")).stdout.trim();
  const names = units.split("\n").map((name) => name.replace(".service", ""));
  expect(names.sort()).toEqual(Object.keys(EXPOSURE).sort());
  const numbers = await Promise.all(
    names.map(async (name) => {
      const { stdout } = await details.exec([
        "systemd-analyze",
        "security",
        "--no-pager",
        `${name.replace(/@$/, "@1")}.service`,
      ]);
      return [name, Number(/exposure level for \S+: ([\d.]+)/.exec(stdout)?.[1])] as const;
    }),
  );
  console.log(numbers.map(([name, exposure]) => `${name.padEnd(20)}${exposure}`).join("\n"));
  expect(numbers.filter(([name, exposure]) => !(exposure <= (EXPOSURE[name] ?? 0)))).toEqual([]);
});

/** What the network may reach of a joined machine: ARCHITECTURE.md's table of ports, sshd, and what is captured. */
const OPEN = [22, 15020, 15021, 15090];
/** istiod gives this workload, which it knows by its IPv4 address, no IPv6 listener: what is captured is refused there. */
const CAPTURED = { 4: [9080], 6: [] } as const;

describe.for([4, 6] as const)("from another machine, over IPv%i", (family) => {
  const address = () => (family === 4 ? details.ip : details.ip6);
  const at = (port: number, path: string) =>
    `http://${family === 4 ? details.ip : `[${details.ip6}]`}:${port}${path}`;

  test("of all TCP ports only those of the table accept a connection", { timeout: 90_000 }, async () => {
    const found = await openPorts(lab, address());
    console.log(`open over IPv${family}: ${found.join(" ")}`);
    expect(found).toEqual([...OPEN, ...CAPTURED[family]].sort((a, b) => a - b));
  });

  test.for([
    { port: 15020, paths: { "/metrics": 403, "/stats/prometheus": 403, "/healthz/ready": 200 } },
    { port: 15021, paths: { "/healthz/ready": 200 } },
    { port: 15090, paths: { "/stats/prometheus": 200 } },
  ])("$port serves its paths and nothing else", async ({ port, paths }) => {
    const others = [
      "/",
      "/status",
      "/drain",
      "/config_dump",
      "/quitquitquit",
      "/certs",
      "/stats",
      "/logging",
    ];
    const want = { ...Object.fromEntries(others.map((path) => [path, 404])), ...paths };
    const got = await Promise.all(
      Object.keys(want).map(async (path) => {
        const argv = ["curl", "-gs", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", at(port, path)];
        return [path, Number((await lab.exec(argv, { allowFail: true })).stdout)] as const;
      }),
    );
    expect(Object.fromEntries(got)).toEqual(want);
  });

  test("no DNS is answered, which the machine's own processes get", async () => {
    const own = family === 4 ? "127.0.0.1" : "::1";
    expect(Number((await details.exec(dnsQuestion(own, 15053))).stdout)).toBeGreaterThan(0);
    const answers = await Promise.all([15053, 53].map((port) => lab.exec(dnsQuestion(address(), port))));
    expect(answers.map(({ stdout }) => stdout.trim())).toEqual(["0", "0"]);
  });
});

test("on loopback only DNS listens: every HTTP door is the network's or a unix socket", async () => {
  const { stdout } = await details.exec("ss -Hlntp");
  const pids = await Promise.all(
    [UNITS.agent, UNITS.envoy].map(async (unit) =>
      (await details.exec(["systemctl", "show", "-P", "MainPID", unit])).stdout.trim(),
    ),
  );
  const ours = stdout.split("\n").filter((line) => pids.some((pid) => line.includes(`pid=${pid},`)));
  const doors = [...new Set(ours.map((line) => line.split(/\s+/)[3] ?? ""))];
  expect(doors.filter((door) => /^(127\.|\[::1\])/.test(door)).sort()).toEqual([
    "127.0.0.1:15053",
    "[::1]:15053",
  ]);
  expect(doors).toContain("0.0.0.0:15006");
});

test("a page that had its name resolve to this machine is refused at a forwarded admin socket", async () => {
  const status = async (host: string) =>
    (
      await details.exec([
        ...["curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "-H", `Host: ${host}`],
        ...["--unix-socket", "/run/vmmesh/admin.sock", "http://localhost/status"],
      ])
    ).stdout;
  expect([await status("localhost:8080"), await status("rebind.example:8080")]).toEqual(["200", "421"]);
});

test("metrics come by TLS to who verifies chain and name, and the pair is read anew", async () => {
  expect((await scrape(operator.rootPem, "details.example")).stdout).toMatch(/^vmmesh_build_info\{/m);
  expect((await scrape(operator.rootPem, "other.example")).stderr).toContain("subject name");
  const other = await Authority.create("operator.example");
  expect((await scrape(other.rootPem, "details.example")).stderr).toContain("certificate");
  const { key, cert } = await other.server(["details.example"], []);
  // In place: owner and mode stay. Between the two writes the pair does not fit, and the former one is served.
  writeFileSync(`${details.root}${PAIR}/tls.crt`, cert);
  expect((await scrape(operator.rootPem, "details.example")).stdout).toContain(
    'id="metrics-certificate",severity="warning"} 1',
  );
  writeFileSync(`${details.root}${PAIR}/tls.key`, key);
  expect((await scrape(other.rootPem, "details.example")).stdout).toMatch(/^vmmesh_build_info\{/m);
});

test("the mesh's own certificate leads to the mesh's root", async () => {
  await details.exec(
    `sed -i "s|^VMMESH_METRICS_TLS=.*|VMMESH_METRICS_TLS='workload'|" /etc/vmmesh/sidecar.env && systemctl restart vmmesh-agent`,
  );
  const { stdout } = await details.exec(
    "openssl s_client -connect localhost:15020 -CAfile /etc/vmmesh/root-cert.pem -verify_return_error </dev/null",
  );
  expect(stdout).toContain("Verify return code: 0 (ok)");
});

test("a captured port is answered by Envoy", async () => {
  const argv = ["curl", "-s", "-m", "10", "-o", "/dev/null", "-D", "-", `http://${details.ip}:9080/`];
  expect((await lab.exec(argv)).stdout).toMatch(/^server: istio-envoy\r?$/m);
});

describe("a shell as the user of a broken part", () => {
  test("root succeeds at each attempt: what is refused below is refused for who asks", async () => {
    const tried = await asRoot(details, ATTEMPTS);
    expect(ATTEMPTS.filter((_, index) => tried[index] !== 0).map(({ what }) => what)).toEqual([]);
  });

  test.for(["agent", "envoy"] as const)("the %s's gets nowhere, in its unit or outside", async (who) => {
    const attempts = attemptsOf(who);
    const unit = await inUnit(details, who, attempts);
    const free = await outside(details, who, attempts);
    const word = (status: number | undefined) => (status === 0 ? "DONE" : "refused");
    const rows = attempts.map(({ what, harmlessOutside = false }, index) => ({
      what,
      inUnit: word(unit[index]),
      outside: harmlessOutside ? "(harmless)" : word(free[index]),
    }));
    console.log(
      [
        `${`as the ${who}'s user`.padEnd(56)}in its unit  outside`,
        ...rows.map((row) => `${row.what.padEnd(56)}${row.inUnit.padEnd(13)}${row.outside}`),
      ].join("\n"),
    );
    expect(rows.filter((row) => row.inUnit === "DONE" || row.outside === "DONE")).toEqual([]);
  });
});
