import { cpSync } from "node:fs";
import { arrivesAs, defineWorkload, spiffe, startApp } from "../../lab/acceptance.ts";
import { CROSS_NETWORK_PORT, type EastWestGateway, startEastWestGateway } from "../../lab/gateway.ts";
import type { Machine } from "../../lab/lab.ts";
import { packageFile } from "../../vm/package.ts";
import type { Fault, Row } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { absenceInWords, watchAbsence } from "../processes.ts";
import { PORT, type Stage, type Target } from "../stage.ts";

const NETWORK = "far";

export const fault: Fault = {
  name: "gateway",
  about:
    "a machine in a second network, which sees the others and istiod through an east-west gateway alone: the gateway's Envoy is killed",
  async run(stage) {
    const gateway = await startEastWestGateway(stage.lab, "gateway", NETWORK);
    try {
      const target = await farMachine(stage, gateway);
      return [
        ...(await istiodRestarted(stage, target, gateway)),
        ...(await gatewayKilled(stage, target, gateway)),
      ];
    } finally {
      await stage.lab.removeVm(NETWORK);
      await stage.client.exec(`ip route flush proto ${ROUTE_MARK}`);
      await gateway.remove();
      for (const target of stage.targets) await stage.well(target);
    }
  },
};

/** Of the routes that keep the two networks apart; no routing daemon's number. */
const ROUTE_MARK = "250";

async function farMachine({ lab, client }: Stage, gateway: EastWestGateway): Promise<Target> {
  await lab.removeVm(NETWORK);
  const machine = await lab.vm(NETWORK, { deb: packageFile() });
  await defineWorkload(lab, NETWORK, PORT, { network: NETWORK });
  await startApp(machine, PORT);
  await cutOff(machine, client.ip);
  await cutOff(client, machine.ip);
  cpSync(await gateway.bundle(NETWORK), `${machine.root}/root/bundle`, { recursive: true });
  await machine.exec("vmmesh join --bundle /root/bundle --mesh-cidr 10.96.0.0/16");
  const url = `http://${NETWORK}/`;
  await arrivesAs(client, url, spiffe("client"), 40_000);
  return { side: "vmmesh", machine, url };
}

const cutOff = (machine: Machine, from: string): Promise<unknown> =>
  machine.exec(["ip", "route", "add", "unreachable", `${from}/32`, "proto", ROUTE_MARK]);

/** What shows that nothing goes any other way. */
async function throughGateway({ machine }: Target, gateway: EastWestGateway): Promise<string> {
  const { stdout } = await machine.exec("ss -Htn state established '( dport = :15012 )'");
  const peers = stdout
    .split("\n")
    .filter(Boolean)
    .map((line) => line.trim().split(/\s+/).at(-1) ?? "");
  const other = peers.find((peer) => !peer.startsWith(`${gateway.machine.ip}:`));
  if (peers.length === 0 || other !== undefined)
    throw new Error(`the machine's connections to istiod are to ${peers.join(", ") || "nobody"}`);
  return "its only way to istiod was the gateway";
}

function istiodRestarted(stage: Stage, target: Target, gateway: EastWestGateway): Promise<Row[]> {
  return underLoad(stage, "gateway: istiod restarted behind it", [target], async () => {
    const way = await throughGateway(target, gateway);
    await stage.lab.restartIstiod();
    return `istiod was restarted; ${way}`;
  });
}

async function gatewayKilled(stage: Stage, target: Target, gateway: EastWestGateway): Promise<Row[]> {
  const watch = watchAbsence(gateway.machine, CROSS_NETWORK_PORT);
  const faulty = async (): Promise<string> => {
    const { stdout } = await gateway.machine.exec("pgrep -u istio-proxy -x envoy");
    await gateway.machine.exec(["kill", "-9", stdout.trim()]);
    return `the gateway's Envoy ${stdout.trim()} was killed`;
  };
  try {
    return await underLoad(stage, "gateway: killed", [target], faulty, {
      allowance: (_, seen) => {
        const absences = watch.stop();
        return {
          allowed: seen.underWayDuring(absences),
          because: `those under way while, at the gateway, ${absenceInWords(absences)}`,
        };
      },
      after: async () => ({ end: await throughGateway(target, gateway) }),
    });
  } finally {
    watch.stop();
  }
}
