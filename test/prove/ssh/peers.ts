import { type Lab, type Machine, sleep, waitFor } from "../../lab/lab.ts";
import { type ProofRow, row } from "../proof.ts";
import { CONFIRM_SECONDS, Operator, SLACK_SECONDS } from "./operator.ts";

/** Until a trial that was begun must be over, and a little. */
const OVER_MS = (CONFIRM_SECONDS + SLACK_SECONDS) * 1000;

/** The operator types it, and then nobody answers at the terminal. */
const typed = (lab: Lab, operator: Operator, command: string) =>
  lab.exec(["sh", "-c", 'sleep 20 | "$@"', "sh", ...operator.argv("-tt", command)], {
    allowFail: true,
    timeoutMs: 15_000,
  });

/** The same trial by Debian's own tool: rules from a file, a question on the terminal, the old ones back after a time. */
export async function byIptablesApply(
  lab: Lab,
  machine: Machine,
  operator: Operator,
  rounds: number,
): Promise<ProofRow[]> {
  const { stdout } = await machine.exec("vmmesh iptables plan --rules");
  const ipv4 = stdout.slice(0, stdout.indexOf("COMMIT", stdout.indexOf("*nat")) + "COMMIT\n".length);
  await machine.exec("vmmesh iptables clean");
  // A table that is not in the snapshot is not restored by the tool at all: be fair and have one rule in each.
  const tables = ["raw", "mangle", "nat", "filter"];
  await machine.exec(tables.map((table) => `iptables-nft -t ${table} -A OUTPUT -j RETURN`).join(";"));
  await machine.exec("iptables-nft-save > /root/before.rules");
  machine.putFile("/root/peer.rules", ipv4);
  let left = 0;
  let lost = 0;
  for (let number = 0; number < rounds; number += 1) {
    const apply = typed(lab, operator, `iptables-apply -t ${CONFIRM_SECONDS} /root/peer.rules`);
    await sleep(400);
    await machine.exec(`iptables-nft -w 10 -A INPUT -m comment --comment meanwhile-${number} -j RETURN`);
    const dies = number % 2 === 1;
    if (dies) await machine.exec("pkill -KILL -f iptables-apply; true", { allowFail: true });
    await apply;
    await sleep(OVER_MS);
    const rules = (await machine.exec("iptables-nft-save")).stdout;
    if (rules.includes("ISTIO_OUTPUT")) left += 1;
    if (!rules.includes(`meanwhile-${number}`)) lost += 1;
    await machine.exec("iptables-nft-restore /root/before.rules");
  }
  const of = `of ${rounds} trials by iptables-apply, every second killed`;
  return [
    row("ssh", `${of}: unconfirmed rules stayed in force for ever`, left, "trials", "", "peer"),
    row("ssh", `${of}: rules that others wrote meanwhile were lost`, lost, "trials", "", "peer"),
  ];
}

const ADDRESS = (address: string): string =>
  `network: {version: 2, renderer: networkd, ethernets: {eth0: {addresses: [${address}/24]}}}\n`;
/** Nobody has it: who takes it for the machine's own has cut the machine off. */
const WRONG = "10.99.0.213";

/** The same trial by netplan's tool; it knows addresses, not the firewall, so what locks out is a wrong address. */
export async function byNetplanTry(lab: Lab, rounds: number): Promise<ProofRow[]> {
  const name = "planned";
  await lab.removeVm(name);
  // The networkd of bookworm (252) gives the link up here: the kernel refuses an address that it sets again (ERANGE).
  const machine = await lab.vm(name, { packages: ["netplan.io", "udev"], release: "trixie" });
  try {
    await using operator = await Operator.make(lab, machine);
    // No udev runs in a container, and /sys is not to be written there: what netplan asks of it is answered with yes.
    await machine.exec("mount --bind /bin/true /usr/bin/udevadm");
    const right = async (): Promise<void> => {
      await machine.exec("rm -f /etc/netplan/*");
      machine.putFile("/etc/netplan/50-vm.yaml", ADDRESS(machine.ip), 0o600);
      await machine.exec("netplan apply");
      await waitFor("a login", async () => ((await operator.login()) ? true : undefined));
    };
    machine.putFile("/root/wrong.yaml", ADDRESS(WRONG), 0o600);
    let lockedOut = 0;
    let kept = 0;
    let longestMs = 0;
    for (let number = 0; number < rounds; number += 1) {
      await right();
      const watched = operator.watch();
      const trial = typed(
        lab,
        operator,
        `cd /etc/netplan && cp /root/wrong.yaml 50-vm.yaml && netplan try --timeout ${CONFIRM_SECONDS}`,
      );
      await waitFor("the address to change", async () =>
        (await machine.exec("ip -br address show eth0")).stdout.includes(WRONG) ? true : undefined,
      );
      const killed = number % 2 === 1;
      if (killed) await machine.exec("pkill -KILL -f 'netplan try'; true", { allowFail: true });
      await sleep(2 * OVER_MS);
      const back = await operator.login();
      if (!back) lockedOut += 1;
      const longest = await watched.stop();
      if (back) longestMs = Math.max(longestMs, longest);
      await machine.exec("pkill -KILL -f 'netplan try'; true", { allowFail: true });
      await trial;
      if (machine.getFile("/etc/netplan/50-vm.yaml").includes(WRONG)) kept += 1;
    }
    const of = `of ${rounds} trials by netplan try, every second killed`;
    return [
      row("ssh", `${of}: nobody can log in any more`, lockedOut, "trials", "", "peer"),
      row(
        "ssh",
        `${of}: longest time without a new login, of the others`,
        Math.round(longestMs / 10) / 100,
        "s",
        "",
        "peer",
      ),
      row("ssh", `${of}: what nobody confirmed is what the next boot applies`, kept, "trials", "", "peer"),
    ];
  } finally {
    await lab.removeVm(name);
  }
}
