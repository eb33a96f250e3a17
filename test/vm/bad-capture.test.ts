import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/**
 * Bad input and lacking rights of the capture, on a machine that is joined: one clear error, and every rule, record and
 * unit as it was.
 */
let lab: Lab;
let machine: Machine;

const STATE = "/var/lib/vmmesh-host";
const READ_ONLY = `mount --bind ${STATE} ${STATE} && mount -o remount,ro,bind ${STATE}`;
const WITHOUT_NET_ADMIN = "setpriv --bounding-set=-net_admin --inh-caps=-net_admin";

/** All rules, the record, and what runs; counters and times aside. */
async function state(): Promise<string> {
  const { stdout } = await machine.exec(
    `iptables-nft-save | sed 's/\\[.*\\]//; /^#/d'; ip6tables-nft-save | sed 's/\\[.*\\]//; /^#/d'; nft -s -t list ruleset | grep -v 'counter packets'
     find ${STATE}/rules -type f -exec sha256sum {} + | sort; readlink ${STATE}/rules/confirmed; ls ${STATE}/rules
     systemctl list-units 'vmmesh*' --state=failed --no-legend; cat /etc/vmmesh/cluster.env`,
  );
  return stdout;
}

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("careful");
  machine = await lab.vm("careful", { deb: packageFile() });
  await defineWorkload(lab, "careful", 9080);
  cpSync(await istioctlBundle(lab, "careful"), `${machine.root}/root/b`, { recursive: true });
  await machine.exec("vmmesh join --bundle /root/b && cp /etc/vmmesh/sidecar.env /root/sidecar.env");
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("careful");
});

interface Case {
  readonly name: string;
  readonly command: string;
  readonly code: string;
  readonly exit: number;
  /** Words that the error must say. */
  readonly says: string;
  readonly env?: string;
}

const APPLY = "vmmesh iptables apply --confirm-within 10";

const CASES: readonly Case[] = [
  ...[APPLY, "vmmesh iptables clean", "vmmesh leave --now"].map((command) => ({
    name: `${command}, the state directory read-only`,
    command: `${READ_ONLY}; ${command}; code=$?; umount ${STATE}; exit $code`,
    code: "STATE_UNWRITABLE",
    exit: 3,
    says: STATE,
  })),
  ...[
    ...[APPLY, "vmmesh iptables clean", "vmmesh leave --now", "vmmesh iptables plan"],
    ...["vmmesh iptables repair", "vmmesh iptables clean --leftovers"],
  ].map((command) => ({
    name: `${command}, root without CAP_NET_ADMIN`,
    command: `${WITHOUT_NET_ADMIN} ${command}`,
    code: "RULES_PRIVILEGE",
    exit: 7,
    says: "CAP_NET_ADMIN",
  })),
  ...(
    [
      ["a CIDR that is none", "ISTIO_SERVICE_CIDR=10.96.0.0/33", "CONFIG_MALFORMED", "10.96.0.0/33"],
      ["a port that is none", "ISTIO_INBOUND_PORTS=70000", "CONFIG_MALFORMED", "70000"],
      ["an unknown user", "VMMESH_OUTBOUND_OWNER_USERS_EXCLUDE=stranger", "USAGE", "stranger"],
      ["an unknown group", "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE=strangers", "USAGE", "strangers"],
      [
        "an IPv4 network in IPv6's notation",
        "ISTIO_SERVICE_EXCLUDE_CIDR=::ffff:10.96.0.0/108",
        "CONFIG_MALFORMED",
        "10.96.0.0/12",
      ],
      [
        "one network in and out, with other host bits",
        "ISTIO_SERVICE_CIDR=10.96.0.0/12 ISTIO_SERVICE_EXCLUDE_CIDR=10.99.1.1/12",
        "USAGE",
        "10.96.0.0/12",
      ],
    ] as const
  ).map(([name, env, code, says]) => ({ name, env, command: APPLY, code, exit: 2, says })),
];

describe("one clear error, and the machine as it was", () => {
  test.for(CASES)("$name", async ({ env, command, code, exit, says }) => {
    await machine.exec("cp /root/sidecar.env /etc/vmmesh/sidecar.env");
    if (env !== undefined) await machine.exec(`printf '%s\\n' ${env} >> /etc/vmmesh/sidecar.env`);
    const before = await state();
    const result = await machine.exec(command, { allowFail: true });
    expect(await state()).toBe(before);
    const complaint = result.stderr.slice(Math.max(0, result.stderr.indexOf("vmmesh: ")));
    expect(complaint).toContain(`vmmesh: ${code}: `);
    expect(result.code).toBe(exit);
    expect(complaint).toContain(says);
    expect(complaint).toContain("  next: ");
  });
});

test("rules are put right where the record can be read only, and the record is not", async () => {
  const rules = "iptables-nft-save -t nat | grep -c ISTIO_OUTPUT";
  const before = (await machine.exec(rules)).stdout;
  // Both repairs: the one by the kernel's event would be first.
  await machine.exec(
    `systemctl stop vmmesh-nftmon.service; ${READ_ONLY}; iptables-nft -t nat -F ISTIO_OUTPUT`,
  );
  try {
    await machine.exec("vmmesh iptables repair", { allowFail: true });
    expect((await machine.exec(rules)).stdout).toBe(before);
  } finally {
    await machine.exec(`umount ${STATE}; systemctl start vmmesh-nftmon.service`);
  }
});
