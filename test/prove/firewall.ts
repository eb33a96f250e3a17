import { cpSync } from "node:fs";
import { cleanNamespace, defineWorkload, istioctlBundle, type Seen, startApp } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import type { Scale } from "../suite.ts";
import { packageFile } from "../vm/package.ts";
import { type Proof, type ProofRow, row } from "./proof.ts";

const DECLARED = 9080;
const CLOSED = 9001;

/** A host firewall that lets sshd and the declared port in, and nothing else. */
interface Firewall {
  readonly name: string;
  readonly start: string;
  readonly stop: string;
}

const FIREWALLS: readonly Firewall[] = [
  {
    name: "firewalld",
    start: `systemctl start firewalld && firewall-cmd -q --add-port=${DECLARED}/tcp`,
    stop: "systemctl stop firewalld",
  },
  {
    name: "iptables, default deny",
    start: [
      "iptables -A INPUT -i lo -j ACCEPT",
      "iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
      `iptables -A INPUT -p tcp -m multiport --dports 22,${DECLARED} -j ACCEPT`,
      "iptables -P INPUT DROP",
    ].join(" && "),
    stop: "iptables -P INPUT ACCEPT && iptables -F INPUT",
  },
];
const WISHES = [
  { name: "declared ports captured", options: "" },
  { name: "all ports captured", options: "--include-inbound-port '*'" },
];

/** A request from outside the machine and the mesh; status 0: nobody answered. */
async function ask(lab: Lab, machine: Machine, port: number): Promise<Seen> {
  const { stdout } = await lab.exec(
    ["curl", "-s", "-m", "2", "-w", "\n%{http_code}", `http://${machine.ip}:${port}/`],
    { allowFail: true },
  );
  const cut = stdout.lastIndexOf("\n");
  const status = Number(stdout.slice(cut + 1));
  const headers = status === 200 ? (JSON.parse(stdout.slice(0, cut)) as Seen).headers : {};
  return { status, headers };
}

async function trial(
  lab: Lab,
  machine: Machine,
  firewall: Firewall,
  wish: (typeof WISHES)[number],
): Promise<ProofRow[]> {
  await machine.exec(firewall.start);
  try {
    const before = await ask(lab, machine, CLOSED);
    if (before.status !== 0) throw new Error(`${firewall.name} does not close ${CLOSED}`);
    await machine.exec(`vmmesh join --bundle /root/b ${wish.options}`);
    try {
      // Envoy's first listeners may be a moment away from their routes.
      const declared = await waitFor(
        "the declared port through Envoy",
        async () => {
          const seen = await ask(lab, machine, DECLARED);
          return seen.headers["x-request-id"] === undefined ? undefined : seen;
        },
        10_000,
      ).catch(() => ({ status: 0 }));
      const closed = await ask(lab, machine, CLOSED);
      const on = `behind ${firewall.name}, ${wish.name}`;
      return [
        row(
          "firewall",
          `${on}: the declared port answers through Envoy`,
          Number(declared.status === 200),
          "of 1",
          "= 1",
        ),
        row(
          "firewall",
          `${on}: a port that the firewall closes answers`,
          Number(closed.status !== 0),
          "of 1",
          "= 0",
        ),
      ];
    } finally {
      await machine.exec("vmmesh leave --now");
    }
  } finally {
    await machine.exec(firewall.stop);
  }
}

export const proof: Proof = {
  name: "firewall",
  about:
    "inbound capture behind the machine's own firewall: what it closes stays closed, what it opens stays open",
  async run(_scale: Scale) {
    const lab = await Lab.open();
    await cleanNamespace(lab);
    await lab.removeVm("walled");
    const machine = await lab.vm("walled", { deb: packageFile(), packages: ["firewalld"] });
    try {
      await defineWorkload(lab, "walled", DECLARED);
      await startApp(machine, DECLARED);
      await machine.exec(`systemd-run -q --unit=other python3 /opt/app.py ${CLOSED} other`);
      cpSync(await istioctlBundle(lab, "walled"), `${machine.root}/root/b`, { recursive: true });
      const rows: ProofRow[] = [];
      for (const firewall of FIREWALLS)
        for (const wish of WISHES) rows.push(...(await trial(lab, machine, firewall, wish)));
      return rows;
    } finally {
      await lab.removeVm("walled");
    }
  },
};
