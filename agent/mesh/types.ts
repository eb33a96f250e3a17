/** A protobuf-JSON ProxyConfig as it stands in mesh.yaml: kept as it is, also fields that we do not know. */
export type ProxyConfig = Readonly<Record<string, unknown>>;

/** A file set that joins one machine, whoever made it: `istioctl x workload entry configure`, `vmmesh bundle create`, or `vmmesh join` itself. */
export interface Bundle {
  /** cluster.env: keys in file order. */
  readonly clusterEnv: ReadonlyMap<string, string>;
  /** mesh.yaml: the content of its `defaultConfig`. */
  readonly proxyConfig: ProxyConfig;
  /** PEM, one or several. */
  readonly rootCert: string;
  /** JWT for audience `istio-ca`; absent if the machine has a certificate already. */
  readonly token?: string;
  /**
   * Name of istiod → what to dial for it, in order: IP addresses, or the host name of a load balancer that has no fixed
   * address (in a bundle of istioctl such a name is lost and the map is empty).
   */
  readonly hosts: ReadonlyMap<string, readonly string[]>;
  /** Where the cluster's services live; empty if the bundle does not say. Only vmmesh's own bundles do. */
  readonly meshCidrs: readonly string[];
  /** Keys that cluster.env had and that were left out, because a root shell sources that file: to be printed. */
  readonly refusedKeys: readonly string[];
}

export interface WorkloadPort {
  readonly name: string;
  readonly port: number;
}

/** WorkloadGroup.spec.probe after Istio's defaults (ch. 5.3 of the VM protocol): all times in seconds. */
export interface ReadinessProbe {
  readonly initialDelaySeconds: number;
  readonly timeoutSeconds: number;
  readonly periodSeconds: number;
  readonly successThreshold: number;
  readonly failureThreshold: number;
  readonly check:
    | {
        readonly kind: "http";
        readonly scheme: "http" | "https";
        readonly host?: string;
        readonly port: number;
        readonly path: string;
        readonly headers: readonly { readonly name: string; readonly value: string }[];
      }
    | { readonly kind: "tcp"; readonly host?: string; readonly port: number }
    | { readonly kind: "exec"; readonly argv: readonly string[] }
    | { readonly kind: "grpc"; readonly port: number; readonly service: string };
}

export interface OwnerNames {
  readonly users: readonly string[];
  readonly groups: readonly string[];
  /** Systemd units. */
  readonly units: readonly string[];
}

/** Everything the daemon knows of its workload, read from cluster.env, sidecar.env and mesh.yaml. Pure data. */
export interface Workload {
  readonly namespace: string;
  readonly serviceAccount: string;
  readonly trustDomain: string;
  /** WorkloadGroup for auto-registration; undefined: the machine registers nothing. */
  readonly workloadGroup: string | undefined;
  readonly workloadName: string;
  /** `node.cluster`: `GROUP.NAMESPACE` on a VM. */
  readonly serviceCluster: string;
  readonly clusterId: string;
  readonly meshId: string;
  readonly network: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly ports: readonly WorkloadPort[];
  /** `host:port` of istiod as the certificate names it, e.g. `istiod.istio-system.svc:15012`. */
  readonly discoveryAddress: string;
  /** IP addresses or host names to dial for `discoveryAddress`, in order; empty: ask the machine's resolver for that name itself. */
  readonly istiodAddresses: readonly string[];
  /** POD_NAME of the node id: the machine's host name. */
  readonly instanceName: string;
  /** First is the registered one. */
  readonly addresses: readonly string[];
  readonly inbound: { readonly kind: "ports"; readonly ports: readonly number[] } | { readonly kind: "all" };
  /** Interfaces whose traffic is left alone in both directions, and those behind which containers or machines are captured. */
  readonly excludeInterfaces: readonly string[];
  readonly virtualInterfaces: readonly string[];
  /** What conntrack calls invalid is dropped on captured ports. */
  readonly dropInvalid: boolean;
  /** Which program's tables the rules are in; `auto`: the one that the machine uses. */
  readonly backend: "auto" | "nft" | "legacy" | "nftables";
  /** Whether rules carry their reasons. */
  readonly ruleComments: boolean;
  /** How inbound connections reach Envoy; `routeTable` is used by TPROXY alone. */
  readonly interception: { readonly mode: "REDIRECT" | "TPROXY"; readonly routeTable: number };
  readonly inboundExcludePorts: readonly number[];
  /** CIDRs captured outbound; `["*"]` is everything. */
  readonly outboundCidrs: readonly string[];
  readonly outboundExcludeCidrs: readonly string[];
  readonly outboundExcludePorts: readonly number[];
  /** Captured wherever they lead. */
  readonly outboundPorts: readonly number[];
  /** Users and groups, by name or number, and systemd units whose connections are captured (`only`, empty: everybody's) or left alone. */
  readonly outboundOwners: { readonly only: OwnerNames; readonly never: OwnerNames };
  /** Where the mesh's services live: the fence refuses what would reach them past Envoy. */
  readonly meshCidrs: readonly string[];
  /** What differs from the default failure policy, as the operator wrote it. */
  readonly failurePolicy: readonly string[];
  readonly dnsCapture: boolean;
  readonly probe: ReadinessProbe | undefined;
  /** Where the probe goes unless it names a host itself: the first address, or `localhost` if that one is not on the machine. */
  readonly probeHost: string;
  readonly proxyConfig: ProxyConfig;
  readonly envoyPath: string;
  /** Where the application's own metrics are, as Istio's JSON of the prometheus.io annotations; undefined: not scraped. */
  readonly appMetrics: string | undefined;
  /** Port 15020 serves metrics by TLS: "workload" for the mesh's certificate, or the folder of another; undefined: plain. */
  readonly metricsTls: string | undefined;
  /** Lifetime to ask the CA for, in milliseconds; istiod may grant less. */
  readonly certificateTtlMs: number;
  /** Of the key that is made for each certificate. */
  readonly keyKind: "ecdsa-p256" | "rsa-2048";
  /** Absolute path of the program that prints a token when certificate and token file do not help; undefined: there is none. */
  readonly credentialExec: string | undefined;
  /** `ISTIO_META_*` keys that are passed on in the node's metadata, without the prefix. */
  readonly meta: Readonly<Record<string, string>>;
  /** `ISTIO_METAJSON_*` keys but LABELS, without the prefix; the members of each land at the top level of the metadata. */
  readonly metaJson: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
}
