import { defineWorkload, istioctlBundle } from "./acceptance.ts";
import type { Lab } from "./lab.ts";
import type { Machine } from "./machine.ts";
import { installPeer } from "./peer.ts";
import { waitFor } from "./sh.ts";

/** For what other networks send to the machines behind it. */
export const CROSS_NETWORK_PORT = 15_443;
const ISTIOD_PORT = 15_012;

export interface EastWestGateway {
  readonly machine: Machine;
  /** A bundle by which a machine behind it knows istiod at the gateway's address alone; a folder on this machine. */
  bundle(group: string): Promise<string>;
  remove(): Promise<void>;
}

/**
 * The real pilot-agent as a router, with what Istio's samples/multicluster give an east-west gateway: the services of
 * `network` by SNI, without ending their TLS, and istiod for who reaches nothing else. Needs a Service of istiod to lead to.
 */
export async function startEastWestGateway(
  lab: Lab,
  name: string,
  network: string,
): Promise<EastWestGateway> {
  await lab.removeVm(name);
  const machine = await lab.vm(name);
  await defineWorkload(lab, name, CROSS_NETWORK_PORT, { probe: "", network });
  await lab.apply(objects(name, network, lab.address));
  await lab.kubectl([
    ...["patch", "service", name, "-n", "default", "--subresource=status", "--type=merge", "-p"],
    JSON.stringify({ status: { loadBalancer: { ingress: [{ ip: machine.ip }] } } }),
  ]);
  await installPeer(lab, machine, name);
  machine.putFile("/etc/systemd/system/peer.service.d/router.conf", ROUTER);
  await machine.exec("systemctl daemon-reload && systemctl start peer.service");
  for (const port of [CROSS_NETWORK_PORT, ISTIOD_PORT])
    await waitFor(
      `the gateway on port ${port}`,
      async () => {
        const { stdout } = await machine.exec(`ss -Hltn 'sport = :${port}'`);
        return stdout === "" ? undefined : true;
      },
      30_000,
    );
  return {
    machine,
    bundle: (group) => istioctlBundle(lab, group, machine.ip),
    remove: async () => {
      await lab.removeVm(name);
      await lab.kubectl([
        "delete",
        "--ignore-not-found",
        "-n",
        "default",
        `gateway/${name}`,
        `virtualservice/${name}`,
      ]);
      await lab.kubectl([
        ...["delete", "--ignore-not-found", "-n", "istio-system", "service/istiod", "endpointslice/istiod"],
      ]);
    },
  };
}

/** It captures nothing, and is back as soon as Kubernetes would have it back. */
const ROUTER = `[Service]
ExecStartPre=
ExecStopPost=
ExecStart=
ExecStart=/usr/local/bin/pilot-agent proxy router --concurrency 2
RestartSec=1
`;

const objects = (name: string, network: string, istiod: string): string => `
apiVersion: v1
kind: Service
metadata: {name: ${name}, namespace: default, labels: {topology.istio.io/network: ${network}}}
spec: {type: LoadBalancer, selector: {app: ${name}}, ports: [{name: tls, port: ${CROSS_NETWORK_PORT}}, {name: tls-istiod, port: ${ISTIOD_PORT}}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: ${name}, namespace: default}
spec:
  selector: {app: ${name}}
  servers:
  - port: {number: ${CROSS_NETWORK_PORT}, name: tls, protocol: TLS}
    tls: {mode: AUTO_PASSTHROUGH}
    hosts: ["*.local"]
  - port: {number: ${ISTIOD_PORT}, name: tls-istiod, protocol: TLS}
    tls: {mode: PASSTHROUGH}
    hosts: ["*"]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ${name}, namespace: default}
spec:
  hosts: ["*"]
  gateways: [${name}]
  tls:
  - match: [{port: ${ISTIOD_PORT}, sniHosts: [istiod.istio-system.svc, istiod.istio-system.svc.cluster.local]}]
    route: [{destination: {host: istiod.istio-system.svc.cluster.local, port: {number: ${ISTIOD_PORT}}}}]
---
apiVersion: v1
kind: Service
metadata: {name: istiod, namespace: istio-system}
spec: {ports: [{name: https-dns, port: ${ISTIOD_PORT}}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: istiod, namespace: istio-system, labels: {kubernetes.io/service-name: istiod}}
addressType: IPv4
ports: [{name: https-dns, port: ${ISTIOD_PORT}, protocol: TCP}]
endpoints: [{addresses: ["${istiod}"], conditions: {ready: true}}]
`;
