import { X509Certificate } from "node:crypto";
import type { Side } from "./fault.ts";
import type { Stage, Target } from "./stage.ts";

/** Where each agent keeps what proves who it is. */
const KEPT: Readonly<
  Record<Side, { unit: string; user: string; env: string; token: string; chain: string; forget: string }>
> = {
  vmmesh: {
    unit: "vmmesh-agent",
    user: "vmmesh",
    env: "/etc/vmmesh/cluster.env",
    token: "/var/lib/vmmesh/token",
    chain: "/var/lib/vmmesh/identity/current/chain.pem",
    forget: "rm -rf /var/lib/vmmesh/identity",
  },
  peer: {
    unit: "peer",
    user: "istio-proxy",
    env: "/var/lib/istio/envoy/cluster.env",
    token: "/run/secrets/tokens/istio-token",
    chain: "/etc/certs/cert-chain.pem",
    forget: "rm -f /etc/certs/cert-chain.pem /etc/certs/key.pem",
  },
};
const HOUR_SEC = 3600;

/** A token for this machine, of the lab's own signing. @param expiresInSec negative: it has ended already */
export const tokenFor = (stage: Stage, { machine }: Target, expiresInSec = 24 * HOUR_SEC): string =>
  stage.lab.signToken({ namespace: "default", serviceAccount: machine.name, expiresInSec });

/** Puts it where the agent looks for one. */
export async function putToken({ machine, side }: Target, token: string): Promise<void> {
  const { token: path, user } = KEPT[side];
  machine.putFile(path, token, 0o600);
  await machine.exec(["chown", `${user}:`, path]);
}

/** The certificate that the agent has stored. */
export async function certificateOf({ machine, side }: Target): Promise<X509Certificate> {
  return new X509Certificate((await machine.exec(["cat", KEPT[side].chain])).stdout);
}

/** Gives both agents certificates that live a minute, the least that ours takes; disposing of it ends that. */
export async function shortCertificates(stage: Stage, targets: readonly Target[]): Promise<AsyncDisposable> {
  const begin = async (target: Target, line: string): Promise<void> => {
    const { env, unit, forget } = KEPT[target.side];
    await putToken(target, tokenFor(stage, target));
    await target.machine.exec(
      `sed -i /SECRET_TTL/d ${env}; echo "${line}" >> ${env}; systemctl stop ${unit}; ${forget}; systemctl start ${unit}`,
    );
  };
  const all = async (line: string): Promise<void> => {
    for (const target of targets) await begin(target, line);
    for (const target of targets) await stage.well(target);
  };
  await all("SECRET_TTL='60s'");
  return { [Symbol.asyncDispose]: () => all("") };
}
