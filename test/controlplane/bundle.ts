import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { stringify } from "yaml";

/** A machine's group as its bundle tells it. */
export interface BundleWish {
  readonly group: string;
  readonly namespace: string;
  readonly serviceAccount: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly ports: readonly { readonly name: string; readonly port: number }[];
  readonly clusterId: string;
  readonly trustDomain: string;
  readonly rootCert: string;
  readonly token: string;
  /** Host and port of the control plane as its certificate names it, and the address to dial. */
  readonly discovery: { readonly host: string; readonly port: number; readonly address: string };
}

/**
 * The five files that `istioctl x workload entry configure --autoregister` writes (ch. 1 of the VM protocol): name → text.
 */
export function bundleFiles(wish: BundleWish): Map<string, string> {
  const { group, namespace, discovery } = wish;
  const labels = {
    ...wish.labels,
    "service.istio.io/canonical-name": group,
    "service.istio.io/canonical-revision": "latest",
  };
  const proxyMetadata: Record<string, string> = {
    CANONICAL_REVISION: "latest",
    CANONICAL_SERVICE: group,
    ISTIO_METAJSON_LABELS: JSON.stringify(labels, Object.keys(labels).sort()),
    ISTIO_META_AUTO_REGISTER_GROUP: group,
    ISTIO_META_CLUSTER_ID: wish.clusterId,
    ISTIO_META_DNS_CAPTURE: "true",
    ISTIO_META_MESH_ID: "",
    ISTIO_META_NETWORK: "",
    ISTIO_META_POD_PORTS: JSON.stringify(
      wish.ports.map(({ name, port }) => ({ name, containerPort: port, protocol: "" })),
    ),
    ISTIO_META_WORKLOAD_NAME: group,
    POD_NAMESPACE: namespace,
    SERVICE_ACCOUNT: wish.serviceAccount,
    TRUST_DOMAIN: wish.trustDomain,
  };
  const environment: Record<string, string> = {
    ...proxyMetadata,
    ISTIO_INBOUND_PORTS: wish.ports.map(({ port }) => port).join(","),
    ISTIO_LOCAL_EXCLUDE_PORTS: "22,15090,15021,15020",
    ISTIO_NAMESPACE: namespace,
    ISTIO_SERVICE: `${group}.${namespace}`,
    ISTIO_SERVICE_CIDR: "*",
  };
  const lines = Object.entries(environment).map(
    ([key, value]) => `${key}='${value.replaceAll("'", `'"'"'`)}'\n`,
  );
  const defaultConfig = { discoveryAddress: `${discovery.host}:${discovery.port}`, proxyMetadata };
  return new Map([
    ["mesh.yaml", stringify({ defaultConfig }, { lineWidth: 0 })],
    ["cluster.env", lines.sort().join("")],
    ["root-cert.pem", wish.rootCert],
    ["istio-token", wish.token],
    ["hosts", `${discovery.address} ${discovery.host}\n`],
  ]);
}

/** The token's file is 0600, the others 0644. */
export async function writeBundle(folder: string, files: ReadonlyMap<string, string>): Promise<void> {
  await mkdir(folder, { recursive: true });
  for (const [name, text] of files)
    await writeFile(join(folder, name), text, { mode: name === "istio-token" ? 0o600 : 0o644 });
}
