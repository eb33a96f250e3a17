import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** Capture by systemd unit, on a real machine: the sets follow a unit through its restarts, from before its first process on. */
let lab: Lab;
let machine: Machine;

/** Nothing answers there. */
const STRANGER = "198.51.100.77";
const RESTARTS = 10;

/** Connects as fast as it can, from its first line on, and tells its cgroup's name in the port that it dials. */
const DIALLER = `
import socket, sys
while True:
    with socket.socket() as s:
        s.settimeout(0.05)
        try:
            s.connect(("${STRANGER}", int(sys.argv[1])))
        except OSError:
            pass
`;
const PORT = { only: 7001, other: 7002, never: 7003 } as const;

/**
 * After every nat chain: the address is still the dialled one only where nobody redirected. Envoy, which passes on what it
 * was given, is another user. Refused at once: an unanswered attempt stays in conntrack for two minutes, and who gets its
 * port meanwhile is no new connection, which alone is redirected.
 */
const OBSERVER = `nft -f - <<'END'
table inet observer {
  counter only { }
  counter other { }
  counter never { }
  counter envoy { }
  chain output { type filter hook output priority 5; policy accept;
    meta skuid != nobody ip daddr ${STRANGER} meta l4proto tcp reject with tcp reset
    meta skuid != nobody return
    ip daddr ${STRANGER} tcp dport ${PORT.only} counter name "only"
    ip daddr ${STRANGER} tcp dport ${PORT.other} counter name "other"
    ip daddr ${STRANGER} tcp dport ${PORT.never} counter name "never"
    ip daddr 127.0.0.1 tcp dport 15001 ct original proto-dst ${PORT.only} counter name "envoy"
    ip daddr ${STRANGER} meta l4proto tcp reject with tcp reset
  }
}
END`;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("scope");
  machine = await lab.vm("scope", { deb: packageFile() });
  await defineWorkload(lab, "scope", 9080);
  cpSync(await istioctlBundle(lab, "scope"), `${machine.root}/root/bundle`, { recursive: true });
  machine.putFile("/opt/dialler.py", DIALLER);
  for (const [name, port] of Object.entries(PORT))
    machine.putFile(
      `/etc/systemd/system/${name}.service`,
      `[Unit]\nStartLimitIntervalSec=0\n[Service]\nUser=nobody\n${name === "only" ? "Slice=chosen-apps.slice\n" : ""}ExecStart=/usr/bin/python3 /opt/dialler.py ${port}\n`,
    );
  await machine.exec(OBSERVER);
  await machine.exec("systemctl daemon-reload && systemctl start only other never");
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("scope");
});

type Counts = Readonly<Record<keyof typeof PORT, number>>;

/** First segments that left for the stranger, since the last call. */
async function passed(): Promise<Counts> {
  const { stdout } = await machine.exec(
    "nft reset counter inet observer only; nft reset counter inet observer other; nft reset counter inet observer never",
  );
  const of = (name: string): number =>
    Number(new RegExp(`counter ${name} \\{\\s*packets (\\d+)`).exec(stdout)?.[1] ?? Number.NaN);
  return { only: of("only"), other: of("other"), never: of("never") };
}

const dropIn = async (unit: string): Promise<boolean> =>
  (await machine.exec(`systemctl cat ${unit}.service`)).stdout.includes("scope.sh");

/** Connections of the chosen unit that were redirected to Envoy, since the observer was made. */
async function captured(): Promise<number> {
  const { stdout } = await machine.exec("nft list counter inet observer envoy");
  return Number(/packets (\d+)/.exec(stdout)?.[1] ?? Number.NaN);
}

describe("capture by systemd unit", () => {
  test("unknown units and contradictions are refused, and nothing is changed", async () => {
    for (const [options, said] of [
      ["--include-outbound-unit nosuch", "unit `nosuch` is not loaded by systemd"],
      ["--include-outbound-unit nosuch.slice", "has no service in it"],
      ["--include-outbound-unit dbus.socket", "is a socket"],
      ["--include-outbound-unit only --exclude-outbound-unit only.service", "both included and excluded"],
      ["--exclude-outbound-user nosuch", "there is no user `nosuch`"],
    ] as const) {
      const { code, stderr } = await machine.exec(`vmmesh join --bundle /root/bundle ${options}`, {
        allowFail: true,
      });
      expect.soft(code, options).not.toBe(0);
      expect.soft(stderr, options).toContain(said);
    }
    expect((await machine.exec("nft list tables")).stdout).not.toContain("vmmesh");
  });

  test("one unit only: it is captured, another is not, and no restart lets one connection past", async () => {
    await machine.exec(
      `vmmesh join --bundle /root/bundle --mesh-cidr ${STRANGER}/32 --include-outbound-unit only`,
    );
    await passed();
    const before = await captured();
    for (let restart = 0; restart < RESTARTS; restart += 1) {
      const had = await captured();
      await machine.exec("systemctl restart only");
      await waitFor(
        "the unit to dial again",
        async () => ((await captured()) > had + 20 ? true : undefined),
        10_000,
      );
    }
    const counts = await passed();
    console.log(
      `${RESTARTS} restarts: ${(await captured()) - before} connections captured, past Envoy ${JSON.stringify(counts)}`,
    );
    expect(counts.only).toBe(0);
    expect(counts.other).toBeGreaterThan(0);
    expect((await machine.exec("vmmesh status")).stdout).toContain("only of unit only");
    expect((await machine.exec("vmmesh iptables plan")).stdout).toContain("Unit only.service: captured");
    expect(await dropIn("only")).toBe(true);
  });

  test("a reboot: captured from its first connection on", async () => {
    await machine.reboot();
    await machine.exec(OBSERVER);
    await machine.exec("systemctl start only other");
    await waitFor("others to dial", async () => ((await passed()).other > 0 ? true : undefined), 5000);
    expect((await passed()).only).toBe(0);
  });

  test("leave gives the unit back as it was", async () => {
    await machine.exec("vmmesh leave --now");
    expect(await dropIn("only")).toBe(false);
    expect((await machine.exec("ls /etc/systemd/system", {})).stdout).not.toContain("only.service.d");
    await machine.exec("systemctl restart only");
    await passed();
    await waitFor("it to dial", async () => ((await passed()).only > 0 ? true : undefined), 5000);
  });

  test("a unit never: it stays direct through a restart, the others are captured", async () => {
    await machine.exec("systemctl start never");
    await machine.exec(
      `vmmesh join --bundle /root/bundle --mesh-cidr ${STRANGER}/32 --exclude-outbound-unit never`,
    );
    await passed();
    await machine.exec("systemctl restart never");
    await waitFor("it to dial", async () => ((await passed()).never > 0 ? true : undefined), 5000);
    expect((await passed()).only).toBe(0);
    expect((await passed()).other).toBe(0);
    await machine.exec("vmmesh leave --now");
    expect(await dropIn("never")).toBe(false);
  });

  test("a slice only: what runs in it is captured from its first connection on, also when the slice itself was stopped", async () => {
    await machine.exec(
      `vmmesh join --bundle /root/bundle --mesh-cidr ${STRANGER}/32 --include-outbound-unit chosen.slice`,
    );
    await passed();
    for (const command of ["restart only", "stop chosen.slice && systemctl start only"]) {
      const had = await captured();
      await machine.exec(`systemctl ${command}`);
      await waitFor("it to dial", async () => ((await captured()) > had + 20 ? true : undefined), 10_000);
    }
    const counts = await passed();
    expect(counts.only).toBe(0);
    expect(counts.other).toBeGreaterThan(0);
    await machine.exec("vmmesh leave --now");
    expect(await dropIn("only")).toBe(false);
  });
});
