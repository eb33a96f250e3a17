import { waitFor } from "../../lab/lab.ts";
import type { Machine } from "../../lab/machine.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { type Stage, statusOf } from "../stage.ts";

const OTHER = "10.99.0.3";
const TABLE = "inet drill-replaced";

export const fault: Fault = {
  name: "istiod-replaced",
  about: "another istiod at another address takes over",
  async run(stage) {
    const { lab, vmmesh, peer } = stage;
    await using end = new AsyncDisposableStack();
    await lab.exec(["ip", "address", "add", `${OTHER}/24`, "dev", "br0"]);
    end.defer(async () => void (await lab.exec(["ip", "address", "del", `${OTHER}/24`, "dev", "br0"])));
    // An operator names both beforehand; the peer knows one name, which has to be given the other address.
    await pinned(stage, `${lab.address},${OTHER}`);
    end.defer(() => pinned(stage, lab.address));
    return await underLoad(stage, "istiod-replaced", stage.targets, async () => {
      const old = lab.pidOf("istiod");
      await lab.stopIstiod();
      await lab.exec(["nft", "-f", "-"], { input: closed(lab.address, [vmmesh.machine, peer.machine]) });
      end.defer(async () => void (await lab.exec(["nft", "delete", "table", ...TABLE.split(" ")])));
      await lab.startIstiod();
      moveName(peer.machine, lab.address, OTHER);
      end.defer(() => moveName(peer.machine, OTHER, lab.address));
      const address = await waitFor(
        "vmmesh to be connected to the other address",
        async () => {
          const { controlPlane } = await statusOf(vmmesh.machine);
          return controlPlane?.address?.startsWith(`${OTHER}:`) === true ? controlPlane.address : undefined;
        },
        60_000,
        100,
      );
      return `istiod's pid went from ${old} to ${lab.pidOf("istiod")}; vmmesh is connected to ${address}, the old address refuses`;
    });
  },
};

const closed = (address: string, machines: readonly Machine[]): string => `table ${TABLE} {
  chain in {
    type filter hook input priority -300
    ip saddr { ${machines.map(({ ip }) => ip).join(", ")} } ip daddr ${address} tcp dport 15012 reject with tcp reset
  }
}
`;

async function pinned(stage: Stage, addresses: string): Promise<void> {
  const { machine } = stage.vmmesh;
  const env = "/etc/vmmesh/sidecar.env";
  await machine.exec(
    `sed -i "/^VMMESH_ISTIOD_ADDRESSES/d" ${env}; echo "VMMESH_ISTIOD_ADDRESSES='${addresses}'" >> ${env}; systemctl restart vmmesh-agent`,
  );
  await stage.well(stage.vmmesh);
}

/** In place: the file may be mounted. */
function moveName(machine: Machine, from: string, to: string): void {
  const hosts = machine.getFile("/etc/hosts");
  machine.putFile("/etc/hosts", hosts.replaceAll(`${from} `, `${to} `));
}
