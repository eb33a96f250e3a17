import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { UNITS } from "../../agent/platform/services.ts";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot, startApp } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { ATTEMPTS, asRoot, type Broken, inUnit, outside } from "./attempts.ts";
import { packageFile } from "./package.ts";
import { dnsQuestion, openPorts } from "./scan.ts";

let lab: Lab;
let details: Machine;

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
  await details.exec("vmmesh join --bundle /root/bundle");
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

/** A second application at the captured port, for IPv6. */
const LISTEN6 =
  'import socket, time; s = socket.create_server(("::", 9080), family=socket.AF_INET6); time.sleep(9999)';

const attemptsOf = (who: Broken) => ATTEMPTS.filter(({ by }) => by === undefined || by === who);

/** `systemd-analyze security`, 0 to 10: as measured with systemd 252, and a tenth more. */
const EXPOSURE: Readonly<Record<string, number>> = {
  "vmmesh-agent": 1.7,
  "vmmesh-envoy": 1.4,
  "vmmesh-envoy-log": 0.5,
  "vmmesh-fence": 9.6,
  "vmmesh-hold": 2.1,
  "vmmesh-nftmon": 1.6,
  "vmmesh-order": 5.9,
  "vmmesh-rules": 5.6,
};

test("no unit is more exposed than it was when its sandbox was made", async () => {
  const units = (await details.exec("cd /usr/lib/systemd/system && ls vmmesh-*.service")).stdout.trim();
  const names = units.split("\n").map((name) => name.replace(".service", ""));
  expect(names.sort()).toEqual(Object.keys(EXPOSURE).sort());
  const numbers = await Promise.all(
    names.map(async (name) => {
      const { stdout } = await details.exec(["systemd-analyze", "security", "--no-pager", `${name}.service`]);
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
    { port: 15020, paths: { "/metrics": 200, "/stats/prometheus": 200, "/healthz/ready": 200 } },
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
