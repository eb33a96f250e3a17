import { copyFileSync, existsSync } from "node:fs";
import { envoy } from "../lab/build.ts";
import { waitFor } from "../lab/lab.ts";
import type { Side } from "./fault.ts";
import type { Target } from "./stage.ts";

/** Where each side finds its Envoy, the unit that starts it, and where that Envoy's administration answers. */
const USED: Readonly<Record<Side, { link: string; unit: string; admin: string }>> = {
  vmmesh: {
    link: "/etc/vmmesh/envoy",
    unit: "vmmesh-envoy",
    admin: "--unix-socket /run/vmmesh-envoy/admin.sock http://envoy",
  },
  peer: { link: "/usr/local/bin/envoy", unit: "peer", admin: "http://127.0.0.1:15000" },
};

const pathOf = (version: string): string => `/usr/local/lib/envoy-${version}`;

/** Puts a stock Envoy on the machine, for `useEnvoy`. */
export async function putEnvoy({ machine }: Target, version: string): Promise<void> {
  const to = `${machine.root}${pathOf(version)}`;
  if (!existsSync(to)) copyFileSync(await envoy(version), to);
}

/** Replaces the Envoy, as an operator does. Resolves when the new one answers, and says that it is of this version. */
export async function useEnvoy(target: Target, version: string): Promise<void> {
  const { link, unit } = USED[target.side];
  await target.machine.exec(`ln -sfn ${pathOf(version)} ${link} && systemctl restart ${unit}`);
  await waitFor(
    `Envoy ${version} on ${target.machine.name}`,
    async () => ((await runningEnvoy(target)) === version ? true : undefined),
    30_000,
    50,
  );
}

/** Version of the Envoy that runs, as it says itself. */
export async function runningEnvoy({ machine, side }: Target): Promise<string | undefined> {
  const { stdout } = await machine.exec(`curl -s -m 2 ${USED[side].admin}/server_info`, { allowFail: true });
  return /"version": "[^/]+\/(\d+\.\d+\.\d+)\//.exec(stdout)?.[1];
}
