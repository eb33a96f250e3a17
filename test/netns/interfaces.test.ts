import { execFileSync } from "node:child_process";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { auditCapture } from "../../agent/iptables/audit/audit.ts";
import type { CaptureWish } from "../../agent/iptables/plan/wish.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { eventually, Lab, LEGACY, MACHINE, REMOTE, SERVICE, UID, WISH } from "./lab.ts";

/** A container behind docker0, as Docker lays it: a bridge with the gateway's address, the machine forwards. */
const BRIDGE = { ip: "172.17.0.1", ip6: "fd17::1" } as const;
const CONTAINER = { ip: "172.17.0.2", ip6: "fd17::2" } as const;

let lab: Lab;
let container: string;
const ip = (text: string): void => void execFileSync("ip", text.split(" "));

beforeEach(async () => {
  lab = await Lab.make();
  container = `${lab.machine}c`;
  ip(`netns add ${container}`);
  ip(`-n ${container} link set lo up`);
  ip(`-n ${lab.machine} link add docker0 type bridge`);
  ip(`-n ${lab.machine} link add veth0 type veth peer name eth0 netns ${container}`);
  ip(`-n ${lab.machine} link set veth0 master docker0 up`);
  ip(`-n ${lab.machine} addr add ${BRIDGE.ip}/16 dev docker0`);
  ip(`-n ${lab.machine} addr add ${BRIDGE.ip6}/64 dev docker0 nodad`);
  ip(`-n ${lab.machine} link set docker0 up`);
  ip(`-n ${container} addr add ${CONTAINER.ip}/16 dev eth0`);
  ip(`-n ${container} addr add ${CONTAINER.ip6}/64 dev eth0 nodad`);
  ip(`-n ${container} link set eth0 up`);
  ip(`-n ${container} route add default via ${BRIDGE.ip}`);
  ip(`-n ${container} -6 route add default via ${BRIDGE.ip6}`);
  ip(`-n ${lab.world} route add 172.17.0.0/16 via ${MACHINE.ip}`);
  ip(`-n ${lab.world} -6 route add fd17::/64 via ${MACHINE.ip6}`);
  await lab.insideShell("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
  await lab.populate();
  await lab.serve(container, UID.app, {
    tcp: [
      ["0.0.0.0", 9000, "CONTAINER"],
      ["::", 9000, "CONTAINER"],
    ],
  });
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
  ip(`netns del ${container}`);
});

async function install(change: Partial<CaptureWish>, facts = {}) {
  await lab.install({ ...WISH, ...change }, facts);
  await eventually(async () => (await lab.dial(UID.app, REMOTE.ip, 80)) === "ENVOY-OUT", 5000);
  await eventually(async () => (await lab.dial(UID.app, REMOTE.ip6, 80)) === "ENVOY-OUT", 5000);
}

type Row = readonly [
  name: string,
  from: "container" | "world" | "machine",
  to: string,
  port: number,
  want: string,
];

async function expectRows(rows: readonly Row[]): Promise<void> {
  const places = { container, world: lab.world, machine: lab.machine };
  for (const [name, from, to, port, want] of rows)
    expect.soft(await lab.dial(UID.app, to, port, places[from]), name).toBe(want);
}

describe("a container behind a bridge", () => {
  test.for([
    { name: "REDIRECT", change: {} },
    { name: "every port", change: { inbound: { kind: "all", excludePorts: [] } } },
  ] as const)(
    "nobody has asked, by $name: forwarded traffic is not hijacked, either way",
    async ({ change }) => {
      await install(change);
      await expectRows([
        ["to the mesh", "container", SERVICE.ip, 80, "DIRECT"],
        ["to the mesh, IPv6", "container", SERVICE.ip6, 80, "DIRECT"],
        ["to a stranger", "container", REMOTE.ip, 80, "DIRECT"],
        [
          "from outside to its port, which has the number of a declared one",
          "world",
          CONTAINER.ip,
          9000,
          "CONTAINER",
        ],
        ["the same, IPv6", "world", CONTAINER.ip6, 9000, "CONTAINER"],
        [
          "to the machine's declared port: inbound, like anybody's",
          "container",
          MACHINE.ip,
          9000,
          "ENVOY-IN",
        ],
      ]);
    },
  );

  test.for([
    { name: "REDIRECT", change: {}, own: "ENVOY-IN" },
    // The Envoy of this cast has no transparent listener; tproxy.test.ts has one.
    { name: "TPROXY", change: { interception: { mode: "TPROXY", routeTable: 133 } }, own: "APP" },
  ] as const)(
    "every port captured by $name: a port that is published for it reaches it",
    async ({ change, own }) => {
      await lab.insideShell(`iptables-nft-restore --noflush <<'END'
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -p tcp -m tcp --dport 8088 -j DNAT --to-destination ${CONTAINER.ip}:9000
COMMIT
END
nft -f - <<'END'
table ip kube-proxy {
  chain nat-prerouting { type nat hook prerouting priority -100; policy accept;
    fib daddr type local tcp dport 30080 dnat to ${CONTAINER.ip}:9000
  }
}
END`);
      await install({ inbound: { kind: "all", excludePorts: [] }, ...change });
      await expectRows([
        ["a port published by Docker", "world", MACHINE.ip, 8088, "CONTAINER"],
        ["a NodePort", "world", MACHINE.ip, 30080, "CONTAINER"],
        ["a port of the machine", "world", MACHINE.ip, 9000, own],
      ]);
      expect((await auditCapture(lab.host, lab.rulesDir)).map(({ id }) => id)).not.toContain("FW023");
    },
  );

  test.for([
    { name: "guard and iptables-nft", facts: {} },
    { name: "iptables-legacy alone", facts: LEGACY },
  ])(
    "asked for, by $name: what it sends to elsewhere is captured, what it is sent is not",
    async ({ facts }) => {
      await install({ virtualInterfaces: ["docker+"], keep: ["203.0.113.0/24"] }, facts);
      ip(`-n ${lab.world} addr add 203.0.113.1/32 dev lo`);
      await expectRows([
        ["to the mesh", "container", SERVICE.ip, 80, "ENVOY-OUT"],
        ["to the mesh, IPv6", "container", SERVICE.ip6, 80, "ENVOY-OUT"],
        ["to a stranger", "container", REMOTE.ip, 80, "ENVOY-OUT"],
        ["to a network that is kept direct", "container", "203.0.113.1", 80, "DIRECT"],
        ["to sshd of the machine", "container", MACHINE.ip, 22, "SSHD"],
        ["from outside to its port", "world", CONTAINER.ip, 9000, "CONTAINER"],
      ]);
      await removeCapture(lab.host, lab.rulesDir);
      expect(
        (await lab.firewall(facts === LEGACY ? "legacy" : "nft")).filter((line) => /ISTIO|VMMESH/.test(line)),
      ).toEqual([]);
    },
  );

  test.for([
    { name: "REDIRECT", change: {} },
    { name: "TPROXY", change: { interception: { mode: "TPROXY", routeTable: 133 } } },
  ] as const)(
    "excluded, with $name: left alone in both directions, past the fence, too",
    async ({ change }) => {
      await install({
        ...change,
        excludeInterfaces: ["docker0"],
        meshCidrs: [...WISH.meshCidrs, "172.17.0.0/16"],
      });
      await expectRows([
        ["from it to a declared port", "container", MACHINE.ip, 9000, "APP"],
        ["from it to a declared port, IPv6", "container", MACHINE.ip6, 9000, "APP"],
        ["from the machine to what is behind it", "machine", CONTAINER.ip, 9000, "CONTAINER"],
        ["to the mesh through another interface", "machine", SERVICE.ip, 80, "ENVOY-OUT"],
      ]);
    },
  );
});

describe("segments that conntrack calls invalid", () => {
  /** An ACK of a connection that never was, which a strict conntrack takes for no part of anything. */
  const stray = (port: number): string =>
    execFileSync(
      "ip",
      [
        "netns",
        "exec",
        lab.world,
        "/usr/bin/python3",
        new URL("stray.py", import.meta.url).pathname,
        REMOTE.ip,
        MACHINE.ip,
        String(port),
      ],
      { encoding: "utf8" },
    ).trim();

  test("dropped on captured ports, answered as ever elsewhere", async () => {
    await lab.insideShell("sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0");
    await install({});
    expect([stray(9000), stray(9001)]).toEqual(["reset", "reset"]);
    await install({ dropInvalid: true });
    expect([stray(9000), stray(9001), stray(22)]).toEqual(["nothing", "reset", "reset"]);
    expect(await lab.dial(UID.app, MACHINE.ip, 9000, lab.world)).toBe("ENVOY-IN");
  });
});
