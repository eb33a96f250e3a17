import { VmmeshError } from "../core/errors.ts";
import { ipFamily, parseHostPort } from "../core/net.ts";
import type { Paths } from "../core/paths.ts";
import { formatSpiffe } from "../core/spiffe.ts";
import type { CaTarget } from "../identity/enroll.ts";
import { parseMeshConfig } from "../mesh/bundle.ts";
import { parseEnv } from "../mesh/env.ts";
import type { Workload } from "../mesh/types.ts";
import { workloadOf } from "../mesh/workload.ts";
import type { Host, Net } from "../platform/host.ts";

const DISCOVERY_PORT = 15012;

/**
 * The workload of this machine, out of the files that `join` rendered and the operator may have changed since.
 * @throws {VmmeshError} NOT_JOINED, ENV_FILE_MALFORMED, CONFIG_MALFORMED, NO_ADDRESS
 */
export async function readWorkload(host: Pick<Host, "files" | "net">, paths: Paths): Promise<Workload> {
  const [clusterEnv, sidecarEnv, meshConfig] = await Promise.all(
    [paths.clusterEnv, paths.sidecarEnv, paths.meshConfig].map((path) => host.files.readText(path)),
  );
  if (clusterEnv === undefined || meshConfig === undefined) {
    throw new VmmeshError("NOT_JOINED", "this machine is not joined to a mesh", {
      next: "Run `vmmesh join --namespace N` or `vmmesh join --bundle DIR`.",
    });
  }
  return workloadOf({
    clusterEnv: parseEnv(clusterEnv, paths.clusterEnv),
    sidecarEnv: parseEnv(sidecarEnv ?? "", paths.sidecarEnv),
    proxyConfig: parseMeshConfig(meshConfig, paths.meshConfig),
    machine: { hostname: host.net.hostname(), addresses: host.net.addresses() },
  });
}

export function spiffeOf(workload: Workload): string {
  return formatSpiffe(workload);
}

/**
 * Where istiod's CA and xDS are dialled now: names are resolved anew each time, by the machine's own resolver.
 * The name in the certificate is that of the discovery address, whatever address is dialled.
 *
 * @throws {VmmeshError} ISTIOD_UNREACHABLE if no address is known
 */
export async function istiodTarget(
  host: { readonly net: Pick<Net, "lookup"> },
  workload: Pick<Workload, "discoveryAddress" | "istiodAddresses" | "clusterId">,
  rootCert: string,
): Promise<CaTarget> {
  const { host: serverName, port } = parseHostPort(workload.discoveryAddress) ?? {
    host: workload.discoveryAddress,
    port: DISCOVERY_PORT,
  };
  const named = workload.istiodAddresses.length > 0 ? workload.istiodAddresses : [serverName];
  const addresses: string[] = [];
  for (const name of named)
    addresses.push(...(ipFamily(name) === undefined ? await host.net.lookup(name) : [name]));
  if (addresses.length === 0) {
    throw new VmmeshError("ISTIOD_UNREACHABLE", `nobody knows the address of ${named.join(", ")}`, {
      next: "Join with --istiod-address IP: the address of the east-west gateway, or of istiod itself.",
    });
  }
  return { addresses: [...new Set(addresses)], port, serverName, rootCert, clusterId: workload.clusterId };
}
