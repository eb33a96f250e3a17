import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { auditCapture } from "../../agent/iptables/audit/audit.ts";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import type { CaptureWish } from "../../agent/iptables/plan/wish.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { both, eventually, Lab, LEGACY, MACHINE, REMOTE, SERVICE, UID, WISH } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const TPROXY: CaptureWish = { ...WISH, interception: { mode: "TPROXY", routeTable: 133 } };

/** An application, one that was there before, sshd; a pod out there; Envoy with CAP_NET_RAW and no other capability. */
async function populate() {
  await lab.serve(lab.machine, UID.app, {
    tell: [...both(9000, "APP"), ...both(9001, "OTHER")],
    tcp: [...both(22, "SSHD"), ...both(9002, "HOLDS")],
  });
  await lab.serve(lab.world, UID.app, { tcp: [...both(80, "DIRECT")] });
  return lab.serve(lab.machine, UID.envoy, {
    comm: "envoy",
    tcp: both(15001, "ENVOY-OUT"),
    relay: both(15006, "ENVOY-IN"),
    beat: [
      ["127.77.0.1", 15001],
      ["::6", 15001],
    ],
  });
}

async function install(wish = TPROXY, facts = {}) {
  await lab.install(wish, facts);
}

const fromWorld = (address: string, port: number) => lab.dial(UID.app, address, port, lab.world);

/** Rules and tables of the kernel's routing, both families. */
const routing = () =>
  lab.insideShell(
    "for f in -4 -6; do ip $f rule; ip $f route show table 133 2>/dev/null || true; ip $f route show table 134 2>/dev/null || true; done",
  );

describe("TPROXY", () => {
  test.for([
    { name: "guard and iptables-nft", facts: {} },
    { name: "iptables-legacy alone", facts: LEGACY },
  ])("by $name: the application sees the client, Envoy is not root, all goes again", async ({ facts }) => {
    await populate();
    for (const table of ["raw", "mangle", "nat"])
      await lab.insideShell(`iptables-legacy -t ${table} -S; ip6tables-legacy -t ${table} -S`);
    const before = [await lab.firewall("legacy"), await lab.firewall(), await routing()];
    await install(TPROXY, facts);
    const rows = [
      ["a declared port", MACHINE.ip, 9000, `ENVOY-IN APP sees ${REMOTE.ip}`],
      ["a declared port, IPv6", MACHINE.ip6, 9000, `ENVOY-IN APP sees ${REMOTE.ip6}`],
      ["a port that is not declared", MACHINE.ip, 9001, `OTHER sees ${REMOTE.ip}`],
      ["sshd", MACHINE.ip, 22, "SSHD"],
    ] as const;
    for (const [name, address, port, want] of rows) {
      expect.soft(await fromWorld(address, port), name).toBe(want);
      expect.soft(await fromWorld(address, port), `${name}, again`).toBe(want);
    }
    const self = `ENVOY-IN APP sees ${MACHINE.ip}`;
    expect.soft(await lab.dial(UID.envoy, MACHINE.ip, 9000), "Envoy to its own machine").toBe(self);
    expect.soft((await auditCapture(lab.host, lab.rulesDir)).map(({ id }) => id)).not.toContain("FW004");
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.app, MACHINE.ip, 9000)).toBe(`APP sees ${MACHINE.ip}`);
    await removeCapture(lab.host, lab.rulesDir);
    expect([await lab.firewall("legacy"), await lab.firewall(), await routing()]).toEqual(before);
  });

  test("every port captured: also one that nobody has declared, and sshd never", async () => {
    await populate();
    await install({ ...TPROXY, inbound: { kind: "all", excludePorts: [] } });
    await eventually(
      async () => (await fromWorld(MACHINE.ip, 9001)) === `ENVOY-IN OTHER sees ${REMOTE.ip}`,
      5000,
    );
    expect(await fromWorld(MACHINE.ip, 9000)).toBe(`ENVOY-IN APP sees ${REMOTE.ip}`);
    expect(await fromWorld(MACHINE.ip, 22)).toBe("SSHD");
  });

  test("the strictest reverse-path filter, with marks counted, does not stop it", async () => {
    await populate();
    await lab.insideShell(
      "for i in all default lo eth0; do sysctl -qw net.ipv4.conf.$i.rp_filter=1 net.ipv4.conf.$i.src_valid_mark=1; done",
    );
    await install();
    expect(await fromWorld(MACHINE.ip, 9000)).toBe(`ENVOY-IN APP sees ${REMOTE.ip}`);
  });

  test("a port that the machine's firewall closes stays closed, one that it opens is open under default-deny", async () => {
    await populate();
    await lab.insideShell(`iptables-nft-restore --noflush <<'END'
*filter
:INPUT DROP [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 9000 -j ACCEPT
COMMIT
END`);
    await install({ ...TPROXY, inbound: { kind: "ports", ports: [9000, 9001] } });
    expect(await fromWorld(MACHINE.ip, 9000)).toBe(`ENVOY-IN APP sees ${REMOTE.ip}`);
    expect(await fromWorld(MACHINE.ip, 9001)).toBe("timeout");
    expect((await auditCapture(lab.host, lab.rulesDir)).map(({ id }) => id)).not.toContain("FW019");
  });

  test("without Envoy a declared port is refused at once, and so it is without our rules", async () => {
    const envoy = await populate();
    await install();
    envoy.kill("SIGKILL");
    await new Promise((resolve) => envoy.once("exit", resolve));
    expect(await fromWorld(MACHINE.ip, 9000)).toBe("refused");
    expect(await fromWorld(MACHINE.ip6, 9000)).toBe("refused");
    await lab.insideShell("nft delete table ip vmmesh; nft delete table ip6 vmmesh");
    expect(await fromWorld(MACHINE.ip, 9000)).toBe("refused");
  });

  test.for([
    { name: "guard and iptables-nft", facts: {} },
    { name: "iptables-legacy alone", facts: LEGACY },
  ])("by $name: a connection from before the join lives on", async ({ facts }) => {
    await populate();
    const held = await lab.hold(lab.world, UID.app, MACHINE.ip, 9002);
    await install({ ...TPROXY, inbound: { kind: "ports", ports: [9002] } }, facts);
    expect(await held.alive()).toBe("still there");
    await removeCapture(lab.host, lab.rulesDir);
    expect(await held.alive()).toBe("still there");
  });

  test("a rule or a route that is gone is found, and laid again by the repair", async () => {
    await populate();
    await install();
    const whole = await routing();
    await lab.insideShell("ip rule del priority 133; ip -6 route flush table 133");
    expect((await auditCapture(lab.host, lab.rulesDir)).map(({ id }) => id)).toContain("FW037");
    expect((await loadConfirmed(lab.host, lab.rulesDir)).repaired).toEqual([
      "the IPv4 rule for Istio's mark was missing",
      "the IPv6 route in table 133 was missing",
    ]);
    expect(await routing()).toBe(whole);
    expect(await loadConfirmed(lab.host, lab.rulesDir)).toMatchObject({ state: "in place" });
  });

  test("a routing rule of ours that somebody has made anew without our mask is named, and the record stays for it", async () => {
    const before = await routing();
    await install();
    await lab.insideShell(
      "ip rule del priority 133 && ip rule add priority 133 fwmark 0x539 lookup 133 protocol 133",
    );
    const report = await removeCapture(lab.host, lab.rulesDir);
    expect(report.residue).toEqual(["ip -4 rule: priority 133 fwmark 0x539 lookup 133"]);
    await lab.insideShell("ip rule del priority 133");
    expect(await removeCapture(lab.host, lab.rulesDir)).toMatchObject({ residue: [] });
    expect(await routing()).toBe(before);
  });

  test("back to REDIRECT takes the way back away, a trial that is taken back restores it", async () => {
    await populate();
    const before = await routing();
    await install();
    const whole = await routing();
    const trial = await lab.apply();
    expect(await routing()).toBe(before);
    await trial.rollBack();
    expect(await routing()).toBe(whole);
    expect(await fromWorld(MACHINE.ip, 9000)).toBe(`ENVOY-IN APP sees ${REMOTE.ip}`);
  });

  test.for([
    ["the mark", "ip rule add fwmark 0x539 lookup 77", /takes Istio's mark elsewhere/],
    ["the table", "ip route add 198.51.100.0/24 dev lo table 133", /table 133 has a route/],
    ["the table by a rule", "ip rule add from 198.51.100.0/24 lookup 133", /another rule uses/],
  ] as const)("%s is another owner's: refused, and nothing is changed", async ([, theirs, sentence]) => {
    await lab.insideShell(theirs);
    const before = [await lab.firewall(), await routing()];
    await expect(lab.apply(TPROXY)).rejects.toThrow(sentence);
    expect([await lab.firewall(), await routing()]).toEqual(before);
  });

  test("what others do with other bits of the mark is none of our business", async () => {
    await populate();
    await lab.insideShell(
      "ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main; ip rule add fwmark 0x200/0xf00 lookup 204",
    );
    // Another owner's bits on every packet and connection, as Calico and Tailscale set them.
    await lab.insideShell(
      "iptables-nft -t mangle -A OUTPUT -j MARK --set-xmark 0x20000/0xff0000; iptables-nft -t mangle -A OUTPUT -j CONNMARK --set-xmark 0x40000/0xff0000",
    );
    await install();
    expect(await fromWorld(MACHINE.ip, 9000)).toBe(`ENVOY-IN APP sees ${REMOTE.ip}`);
  });
});
