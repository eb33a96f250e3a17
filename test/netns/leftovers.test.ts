import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { findLeftovers, removeLeftovers } from "../../agent/iptables/leftovers.ts";
import { Lab } from "./lab.ts";

let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

/** What is there before, and must be there afterwards, byte for byte. */
const foreign = (backend: string): string => `
for ip in iptables-${backend} ip6tables-${backend}; do
  for table in raw mangle nat filter; do
    $ip -t $table -N OTHERS
    $ip -t $table -A OTHERS -p tcp --dport 53 -m comment --comment "not -j ISTIO_OUTPUT" -j RETURN
    $ip -t $table -A OUTPUT -j OTHERS
  done
  $ip -A INPUT -p tcp --dport 22 -j ACCEPT
done`;

/** istio-iptables with DNS capture (1.8 and later wrote rules into the built-in chains), TPROXY, and the script of 1.1. */
const peer = (backend: string): string => `
for ip in iptables-${backend} ip6tables-${backend}; do
  for chain in ISTIO_OUTPUT ISTIO_REDIRECT ISTIO_IN_REDIRECT ISTIO_INBOUND; do $ip -t nat -N $chain; done
  $ip -t nat -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
  $ip -t nat -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
  $ip -t nat -A PREROUTING -p tcp -j ISTIO_INBOUND
  $ip -t nat -A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
  $ip -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT
  $ip -t nat -A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
  $ip -t nat -A ISTIO_OUTPUT -j ISTIO_REDIRECT
  $ip -t nat -A OUTPUT -p udp --dport 53 -m owner --uid-owner 1337 -j RETURN
  $ip -t nat -A OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 15053
  $ip -t raw -A OUTPUT -p udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1
  $ip -t raw -A OUTPUT -p udp --sport 15053 -m owner --uid-owner 1337 -j CT --zone 2
  $ip -t mangle -N ISTIO_DIVERT
  $ip -t mangle -N ISTIO_INBOUND
  $ip -t mangle -A ISTIO_DIVERT -j MARK --set-mark 1337
  $ip -t mangle -A ISTIO_INBOUND -p tcp -j ISTIO_DIVERT
  $ip -t mangle -A PREROUTING -p tcp -j ISTIO_INBOUND
  $ip -N ISTIO_REJECT
  $ip -A ISTIO_REJECT -j REJECT
done
ip6tables-${backend} -A INPUT -m state --state ESTABLISHED -j ACCEPT
ip6tables-${backend} -A INPUT -i lo -d ::1 -j ACCEPT
ip6tables-${backend} -A INPUT -j REJECT`;
const AROUND = `
for family in -4 -6; do
  ip $family rule add fwmark 1337 lookup 133
  ip $family route add local default dev lo table 133
done
nft 'add table inet istio-proxy-nat; add chain inet istio-proxy-nat istio-output; add table ip istio-proxy-raw; add chain ip istio-proxy-raw output { type filter hook output priority raw; }'`;

async function routing(): Promise<string> {
  return lab.insideShell(
    "for f in -4 -6; do ip $f rule; ip $f route show table 133 2>/dev/null || true; done",
  );
}

describe.each(["nft", "legacy"] as const)("leftovers in iptables-%s", (backend) => {
  test("all of Istio's goes, all of the others' stays byte for byte", async () => {
    await lab.insideShell(foreign(backend));
    const before = await lab.firewall(backend);
    const routes = await routing();
    await lab.insideShell(peer(backend) + AROUND);

    const leftovers = await findLeftovers(lab.host);
    // Each family: 8 of nat, 2 of raw, 3 of mangle, 1 of filter, rule and route; the three of 1.1; two tables.
    expect(leftovers.found).toHaveLength(37);
    expect(leftovers.found.filter((line) => line.includes("OTHERS"))).toEqual([]);
    expect(await removeLeftovers(lab.host, leftovers)).toEqual({ foreignUnchanged: true });

    expect(await lab.firewall(backend)).toEqual(before);
    expect(await routing()).toBe(routes);
    expect(await findLeftovers(lab.host)).toEqual({ found: [], steps: [] });
  }, 60_000);
});

describe("vmmesh iptables clean --leftovers", () => {
  const clean = async (...options: string[]): Promise<string> => {
    const { code, stdout, stderr } = await lab.inside([
      process.execPath,
      new URL("../../agent/main.ts", import.meta.url).pathname,
      ...["iptables", "clean", "--leftovers", "--root", `${lab.rulesDir}-root`, ...options],
    ]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    return stdout;
  };

  test("--dry-run names what would go and changes nothing; without it, the same goes", async () => {
    await lab.insideShell(foreign("nft"));
    const before = await lab.firewall();
    await lab.insideShell(peer("nft") + AROUND);
    const full = [await lab.firewall(), await routing()];

    const rehearsed = JSON.parse(await clean("--dry-run", "--output", "json")) as { found: string[] };
    expect(rehearsed).toEqual({ found: expect.any(Array), removed: false, foreignUnchanged: true });
    expect(rehearsed.found).toHaveLength(37);
    const lines = rehearsed.found.map((line) => `  ${line}`);
    expect(await clean("--dry-run")).toBe(["would be taken out:", ...lines, ""].join("\n"));
    expect([await lab.firewall(), await routing()]).toEqual(full);

    expect(await clean()).toBe(
      ["taken out:", ...lines, "other programs' rules are unchanged", ""].join("\n"),
    );
    expect(await lab.firewall()).toEqual(before);
    expect(await clean("--dry-run")).toBe("nothing of Istio's own tools is here\n");
    // Neither lock nor directory stays behind.
    expect(await lab.host.files.list(`${lab.rulesDir}-root/var/lib`)).toEqual([]);
  }, 60_000);
});

test("a joined machine keeps vmmesh's own rules in chains of the same names", async () => {
  await lab.install();
  const before = await lab.firewall();
  expect((await findLeftovers(lab.host)).found).toEqual([]);
  await lab.insideShell(
    "iptables-nft -t nat -A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN; iptables-nft -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT",
  );
  await removeLeftovers(lab.host, await findLeftovers(lab.host));
  expect(await lab.firewall()).toEqual(before);
}, 60_000);

test("while a pilot-agent runs here nothing is taken from it", async () => {
  await lab.insideShell(peer("nft"));
  const before = await lab.firewall();
  const running = {
    ...lab.host,
    run: (command: Parameters<typeof lab.host.run>[0]) =>
      command.argv[0] === "ps"
        ? Promise.resolve({ code: 0, stdout: `${process.pid} pilot-agent\n`, stderr: "" })
        : lab.host.run(command),
  };
  await expect(findLeftovers(running)).rejects.toMatchObject({ code: "BUSY" });
  expect(await lab.firewall()).toEqual(before);
}, 60_000);
