import { commentLines, renderEnv } from "./env.ts";

/** The machine's own wishes; what is absent stands in the file as a comment, with its meaning. */
export interface SidecarSettings {
  readonly ip?: string;
  readonly instanceName?: string;
  readonly envoyPath?: string;
  readonly istiodAddresses?: readonly string[];
  readonly meshCidrs?: readonly string[];
  /** `["*"]`: every port. */
  readonly inboundPorts?: readonly string[];
  readonly interceptionMode?: string;
  readonly excludeInterfaces?: readonly string[];
  readonly virtualInterfaces?: readonly string[];
  readonly dropInvalid?: string;
  readonly backend?: string;
  readonly ruleComments?: string;
  readonly tproxyRouteTable?: string;
  readonly inboundExcludePorts?: readonly number[];
  readonly outboundCidrs?: readonly string[];
  readonly outboundExcludeCidrs?: readonly string[];
  readonly outboundExcludePorts?: readonly number[];
  /** Captured wherever they lead. */
  readonly outboundPorts?: readonly number[];
  readonly outboundUsers?: readonly string[];
  readonly outboundExcludeUsers?: readonly string[];
  readonly outboundGroups?: readonly string[];
  readonly outboundExcludeGroups?: readonly string[];
  readonly outboundUnits?: readonly string[];
  readonly outboundExcludeUnits?: readonly string[];
  readonly failurePolicy?: readonly string[];
  readonly appMetrics?: string;
  readonly metricsTls?: string;
  readonly certificateTtl?: string;
  readonly keyKind?: string;
  readonly credentialExec?: string;
}

interface SidecarKey {
  readonly setting: keyof SidecarSettings;
  readonly comment: string;
}

/** Every key of sidecar.env that vmmesh documents; others of Istio's (ISTIO_SERVICE, PILOT_ADDRESS, …) are read too. */
export const SIDECAR_KEYS: Readonly<Record<string, SidecarKey>> = {
  ISTIO_SVC_IP: {
    setting: "ip",
    comment:
      "Address of this machine that peers reach; it names the WorkloadEntry. Unset: the first that is not loopback.",
  },
  ISTIO_INBOUND_PORTS: {
    setting: "inboundPorts",
    comment: "Ports whose incoming connections go through Envoy, or * for all. Unset: what cluster.env says.",
  },
  ISTIO_LOCAL_EXCLUDE_PORTS: {
    setting: "inboundExcludePorts",
    comment:
      "With ISTIO_INBOUND_PORTS=*: ports left alone, beside those of cluster.env and always 22, 15020, 15021 and 15090.",
  },
  ISTIO_EXCLUDE_INTERFACES: {
    setting: "excludeInterfaces",
    comment:
      "Interfaces whose traffic is left alone, in both directions, e.g. docker0 or br-+ for all that begin so.",
  },
  KUBE_VIRT_INTERFACES: {
    setting: "virtualInterfaces",
    comment:
      "Bridges of containers and virtual machines, e.g. virbr0: what they send to elsewhere is captured like this machine's own. Unset: it is not.",
  },
  INVALID_DROP: {
    setting: "dropInvalid",
    comment: "true: segments that conntrack calls invalid are dropped on captured ports.",
  },
  VMMESH_BACKEND: {
    setting: "backend",
    comment:
      "Where the rules are: nft or legacy (which iptables), nftables (no iptables at all), or auto: the one that this machine uses. Unset: auto.",
  },
  VMMESH_RULE_COMMENTS: {
    setting: "ruleComments",
    comment:
      "false: the rules carry no reasons, e.g. where the kernel lacks the comment match. Unset: they do.",
  },
  ISTIO_INBOUND_INTERCEPTION_MODE: {
    setting: "interceptionMode",
    comment:
      "REDIRECT, or TPROXY: the application sees the client's address, and the machine's own firewall judges the port. Unset: REDIRECT.",
  },
  ISTIO_INBOUND_TPROXY_ROUTE_TABLE: {
    setting: "tproxyRouteTable",
    comment: "Routing table of TPROXY, of nobody else's use. Unset: 133.",
  },
  ISTIO_SERVICE_CIDR: {
    setting: "outboundCidrs",
    comment: "Destinations whose connections go through Envoy, or * for all. Unset: what cluster.env says.",
  },
  VMMESH_OUTBOUND_EXCLUDE_CIDRS: {
    setting: "outboundExcludeCidrs",
    comment: "Destinations left alone, e.g. 10.1.0.0/16.",
  },
  VMMESH_OUTBOUND_EXCLUDE_PORTS: {
    setting: "outboundExcludePorts",
    comment: "Destination ports left alone, e.g. 5432.",
  },
  ISTIO_OUTBOUND_PORTS: {
    setting: "outboundPorts",
    comment: "Destination ports whose connections go through Envoy wherever they lead, e.g. 443.",
  },
  VMMESH_OUTBOUND_OWNER_USERS: {
    setting: "outboundUsers",
    comment:
      "Users, by name or number, whose connections go through Envoy; with any of the keys for owners set, nobody else's do.",
  },
  VMMESH_OUTBOUND_OWNER_USERS_EXCLUDE: {
    setting: "outboundExcludeUsers",
    comment: "Users whose connections are left alone.",
  },
  ISTIO_OUTBOUND_OWNER_GROUPS: {
    setting: "outboundGroups",
    comment:
      "Groups, by name or number, whose processes' connections go through Envoy; with any of the keys for owners set, nobody else's do. Unset or *: everybody's.",
  },
  ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: {
    setting: "outboundExcludeGroups",
    comment: "Groups whose processes' connections are left alone.",
  },
  VMMESH_OUTBOUND_UNITS: {
    setting: "outboundUnits",
    comment:
      "Systemd services whose connections go through Envoy, e.g. shop.service; with any of the keys for owners or units set, nobody else's do.",
  },
  VMMESH_OUTBOUND_UNITS_EXCLUDE: {
    setting: "outboundExcludeUnits",
    comment: "Systemd services whose connections are left alone.",
  },
  VMMESH_MESH_CIDRS: {
    setting: "meshCidrs",
    comment: "Where the mesh's services live: what would reach them past Envoy is refused.",
  },
  VMMESH_FAILURE_POLICY: {
    setting: "failurePolicy",
    comment:
      "What differs from: declared ports and the mesh closed while Envoy does not answer, the rest open. E.g. outbound:10.0.0.0/8:443=closed, inbound:8080=open.",
  },
  VMMESH_ISTIOD_ADDRESSES: {
    setting: "istiodAddresses",
    comment: "Addresses or names to dial for the control plane, in order. Unset: ask the machine's resolver.",
  },
  VMMESH_INSTANCE_NAME: {
    setting: "instanceName",
    comment: "Name of this machine in the mesh. Unset: its host name.",
  },
  ISTIO_PROMETHEUS_ANNOTATIONS: {
    setting: "appMetrics",
    comment:
      'The application\'s own metrics, merged into port 15020: {"scrape":"true","port":"9090","path":"/metrics"}. Unset: none.',
  },
  VMMESH_METRICS_TLS: {
    setting: "metricsTls",
    comment:
      "Metrics at port 15020 by TLS: workload for the mesh's certificate, or a folder with tls.crt and tls.key that vmmesh may read. Unset: plain.",
  },
  SECRET_TTL: {
    setting: "certificateTtl",
    comment: "Lifetime of the certificate to ask for, a minute or more. Unset: 24h.",
  },
  VMMESH_KEY_KIND: {
    setting: "keyKind",
    comment:
      "Key of the certificate: ecdsa-p256, or rsa-2048 for peers or a CA that need it. Unset: ecdsa-p256.",
  },
  VMMESH_CREDENTIAL_EXEC: {
    setting: "credentialExec",
    comment:
      "Program, by its absolute path, that prints a token for istiod when neither certificate nor token file help; it runs as vmmesh. Unset: none.",
  },
  VMMESH_ENVOY: {
    setting: "envoyPath",
    comment: "Envoy to run. Unset: the one on PATH.",
  },
};

/**
 * sidecar.env: every documented key with a comment above it, those that are not set commented out. A shell may source
 * it, and so may Istio's own start script.
 */
export function renderSidecarEnv(settings: SidecarSettings): string {
  const header =
    "What this machine wishes, written by `vmmesh join`; it wins over cluster.env, which the mesh writes.\n" +
    "After a change: systemctl restart vmmesh-agent, and `vmmesh iptables apply` for what is captured.";
  const blocks = Object.entries(SIDECAR_KEYS).map(([key, { setting, comment }]) => {
    const value = settings[setting];
    const text = value === undefined || typeof value === "string" ? value : value.join(",");
    return text === undefined || text === ""
      ? [...commentLines(comment), `#${key}=''`, ""].join("\n")
      : `${renderEnv([[key, text]], { comments: { [key]: comment } })}`;
  });
  return `${commentLines(header).join("\n")}\n\n${blocks.map((block) => block.trimEnd()).join("\n\n")}\n`;
}
