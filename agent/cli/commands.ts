/**
 * What a person can type, as data: parsing, help texts, the man page and README's table all come from here, and a test
 * holds them equal.
 */
export interface OptionSpec {
  readonly name: string;
  readonly type: "string" | "boolean" | "number";
  /** May be given more than once. */
  readonly repeat?: true;
  readonly describe: string;
  /** Word for the value in help texts. */
  readonly value?: string;
  readonly default?: string | number | boolean;
  readonly choices?: readonly string[];
  readonly required?: true;
}

export type OptionValue = string | number | boolean | readonly string[] | undefined;
export type Options = Readonly<Record<string, OptionValue>>;

export interface CommandSpec {
  /** Words after `vmmesh`. */
  readonly words: string;
  readonly summary: string;
  readonly options: readonly OptionSpec[];
  readonly examples: readonly (readonly [string, string])[];
  /**
   * With this option another program's words follow: all words but the option and its value are handed on as they are, in
   * `options.words`, and are read by that program's rules. Common options cannot stand among them.
   */
  readonly handsOnWith?: string;
  /** Not in the help texts: units call it, people need not. */
  readonly hidden?: true;
  /** Loads the code behind the command, and nothing of the other commands. Resolves to the exit status. */
  load(): Promise<(options: Options) => Promise<number>>;
}

const OUTPUT: OptionSpec = {
  name: "output",
  type: "string",
  choices: ["text", "json"],
  default: "text",
  describe: "for people or for programs",
};

/** Options that every command takes. */
export const COMMON_OPTIONS: readonly OptionSpec[] = [
  {
    name: "root",
    type: "string",
    value: "DIR",
    default: "/",
    describe: "put every file below DIR (for tests and the demo)",
  },
  {
    name: "log-level",
    type: "string",
    choices: ["debug", "info", "warn", "error"],
    default: "info",
    describe: "how much is logged",
  },
];

const KUBE_CONTEXT: OptionSpec = {
  name: "context",
  type: "string",
  value: "NAME",
  describe: "context of the kubeconfig",
};

const TOKEN_DURATION: OptionSpec = {
  name: "token-duration",
  type: "number",
  value: "SECONDS",
  default: 3600,
  describe: "lifetime of the token, at least 600",
};

const MESH_OPTIONS: readonly OptionSpec[] = [
  {
    name: "namespace",
    type: "string",
    value: "N",
    describe: "namespace of the workload; with a kubeconfig it must be given",
  },
  {
    name: "workload-group",
    type: "string",
    value: "G",
    describe: "WorkloadGroup to register under (default: this machine's host name)",
  },
  {
    name: "service-account",
    type: "string",
    value: "S",
    describe: "service account of the workload (default: the group's, else the group's name)",
  },
  {
    name: "service",
    type: "string",
    value: "NAME",
    describe: "also make a Service of this name that selects the group (needs --port)",
  },
  {
    name: "port",
    type: "string",
    repeat: true,
    value: "PROTOCOL:PORT",
    describe: "a port that the workload serves, e.g. http:9080, tcp:3306, grpc:7070",
  },
  { name: "labels", type: "string", repeat: true, value: "K=V", describe: "label of the workload" },
  {
    name: "kubeconfig",
    type: "string",
    value: "FILE",
    describe: "credentials for the Kubernetes API; used now, not kept",
  },
  KUBE_CONTEXT,
  { name: "revision", type: "string", value: "R", describe: "revision of the control plane" },
  {
    name: "network",
    type: "string",
    value: "N",
    describe: "network of this machine, when the mesh has several",
  },
  {
    name: "istiod-address",
    type: "string",
    value: "IP",
    describe:
      "where istiod (or the east-west gateway) is reached (default: the address of Service istio-eastwestgateway)",
  },
  {
    name: "cluster-id",
    type: "string",
    value: "ID",
    describe: "name of the cluster (default: what istiod's injector says, else Kubernetes)",
  },
  TOKEN_DURATION,
];

export const COMMANDS: readonly CommandSpec[] = [
  {
    words: "join",
    summary: "make this machine part of the mesh",
    options: [
      ...MESH_OPTIONS,
      {
        name: "bundle",
        type: "string",
        value: "DIR|FILE",
        describe:
          "join with files made elsewhere (`vmmesh bundle create`, istioctl) and no cluster credential",
      },
      {
        name: "ip",
        type: "string",
        value: "A",
        describe: "address of this machine that its peers reach (default: the first that is not loopback)",
      },
      {
        name: "envoy",
        type: "string",
        value: "PATH",
        describe: "Envoy to run, 1.36 or later (default: the one on PATH)",
      },
      {
        name: "credential-exec",
        type: "string",
        value: "PATH",
        describe:
          "program that prints a token for istiod's CA (audience istio-ca), asked as user vmmesh when neither certificate nor token file help: a cloud's or SPIRE's attestation (default: none)",
      },
      {
        name: "metrics-tls",
        type: "string",
        value: "workload|DIR",
        describe:
          "serve the metrics at port 15020 by TLS only, with the workload's certificate or with tls.crt and tls.key of DIR, which user vmmesh must be able to read (default: plain)",
      },
      {
        name: "include-outbound-cidr",
        type: "string",
        repeat: true,
        value: "CIDR|*",
        describe: "destinations that are captured beside the mesh's (default: what the bundle says)",
      },
      {
        name: "exclude-outbound-cidr",
        type: "string",
        repeat: true,
        value: "CIDR",
        describe: "destinations that are not captured",
      },
      {
        name: "exclude-outbound-port",
        type: "string",
        repeat: true,
        value: "PORT",
        describe: "destination ports that are not captured",
      },
      {
        name: "include-outbound-port",
        type: "string",
        repeat: true,
        value: "PORT",
        describe: "destination ports that are captured wherever they lead",
      },
      {
        name: "include-outbound-user",
        type: "string",
        repeat: true,
        value: "USER",
        describe: "capture nobody's connections but those of this user (and of other included owners)",
      },
      {
        name: "exclude-outbound-user",
        type: "string",
        repeat: true,
        value: "USER",
        describe: "never capture this user's connections",
      },
      {
        name: "include-outbound-group",
        type: "string",
        repeat: true,
        value: "GROUP",
        describe: "capture nobody's connections but those of this group (and of other included owners)",
      },
      {
        name: "exclude-outbound-group",
        type: "string",
        repeat: true,
        value: "GROUP",
        describe: "never capture connections of processes of this group",
      },
      {
        name: "include-outbound-unit",
        type: "string",
        repeat: true,
        value: "UNIT",
        describe:
          "capture nobody's connections but those of this systemd service or slice (and of other included owners), through each restart",
      },
      {
        name: "exclude-outbound-unit",
        type: "string",
        repeat: true,
        value: "UNIT",
        describe: "never capture this systemd service's or slice's connections",
      },
      {
        name: "include-inbound-port",
        type: "string",
        repeat: true,
        value: "PORT|*",
        describe: "own ports that are captured (default: what the bundle says)",
      },
      {
        name: "exclude-inbound-port",
        type: "string",
        repeat: true,
        value: "PORT",
        describe: "own ports that are not captured",
      },
      {
        name: "mesh-cidr",
        type: "string",
        repeat: true,
        value: "CIDR",
        describe:
          "where the mesh's services live (default: the cluster's service range, when it can be read)",
      },
      {
        name: "exclude-interface",
        type: "string",
        repeat: true,
        value: "NAME",
        describe: "an interface whose traffic is not captured, in both directions, e.g. docker0 or br-+",
      },
      {
        name: "virtual-interface",
        type: "string",
        repeat: true,
        value: "NAME",
        describe:
          "a bridge of containers or virtual machines whose traffic is captured like this machine's own (default: it is not)",
      },
      {
        name: "drop-invalid",
        type: "boolean",
        describe: "drop segments that conntrack calls invalid on captured ports",
      },
      {
        name: "backend",
        type: "string",
        choices: ["auto", "nft", "legacy", "nftables"],
        describe:
          "where the rules are: the iptables of one kind, or nftables without any iptables (default: auto, the one that this machine uses)",
      },
      {
        name: "rule-comments",
        type: "string",
        choices: ["on", "off"],
        describe: "whether each rule carries its reason as a netfilter comment (default: on)",
      },
      {
        name: "interception-mode",
        type: "string",
        choices: ["redirect", "tproxy"],
        describe:
          "how inbound connections reach Envoy; with tproxy the application sees the client's address (default: what the mesh says; else tproxy where the machine's own firewall judges by port, redirect where it does not)",
      },
      {
        name: "failure-policy",
        type: "string",
        repeat: true,
        value: "RULE",
        describe:
          "what happens while Envoy does not answer: outbound:CIDR|*[:PORT]=open|closed, inbound:PORT|*=open|closed; the most specific wins (default: declared ports and the mesh closed, the rest open)",
      },
      {
        name: "confirm-within",
        type: "number",
        value: "SECONDS",
        default: 30,
        describe: "the rules go out again unless connectivity is confirmed in this time",
      },
      {
        name: "ready-within",
        type: "number",
        value: "SECONDS",
        default: 60,
        describe: "give up when Envoy is not ready in this time",
      },
      {
        name: "dry-run",
        type: "boolean",
        describe:
          "print the steps and which live connections would change or break, with the option that leaves each out; change nothing",
      },
      OUTPUT,
    ],
    examples: [
      [
        "vmmesh join --namespace default",
        "with the kubeconfig at hand; names and ports have printed defaults",
      ],
      [
        "vmmesh join --namespace default --service details --port http:9080",
        "also make the Service that peers call",
      ],
      [
        "vmmesh join --bundle ./details-bundle",
        "no cluster credential on this machine; on a joined machine whose identity is not renewed it brings only a fresh token",
      ],
    ],
    load: async () => (await import("./join.ts")).join,
  },
  {
    words: "leave",
    summary: "give the machine back: out of the endpoints, drained, rules out, files restored",
    options: [
      {
        name: "withdraw-within",
        type: "number",
        value: "SECONDS",
        default: 20,
        describe: "how long peers get to stop calling before Envoy is drained",
      },
      { name: "now", type: "boolean", describe: "do not wait for peers (requests in flight fail)" },
      OUTPUT,
    ],
    examples: [["vmmesh leave", "peers see no failed request when the service has another endpoint"]],
    load: async () => (await import("./leave.ts")).leave,
  },
  {
    words: "status",
    summary: "identity, control plane, Envoy, capture, DNS, registration and health in one screen",
    options: [OUTPUT],
    examples: [["vmmesh status --output json", "for programs; exit status 1 when a condition is an error"]],
    load: async () => (await import("./status.ts")).status,
  },
  {
    words: "bundle create",
    summary: "make the files that join a machine without a cluster credential",
    options: [
      ...MESH_OPTIONS,
      {
        name: "o",
        type: "string",
        value: "DIR|FILE",
        required: true,
        describe: "a directory (made) or a file NAME.json to write; it holds a token: 0600",
      },
      { name: "ip", type: "string", value: "A", describe: "address of the machine that will join" },
      {
        name: "one-time",
        type: "boolean",
        describe:
          "bind the token to a Secret made for it (needs the right to create secrets): whoever deletes that, once the machine has joined, ends the token",
      },
      OUTPUT,
    ],
    examples: [
      [
        "vmmesh bundle create --namespace default --workload-group details -o ./details-bundle",
        "on the administrator's machine",
      ],
    ],
    load: async () => (await import("./bundle.ts")).bundleCreate,
  },
  {
    words: "token create",
    summary: "print a token of a service account; what a program of join --credential-exec may call",
    options: [
      {
        name: "namespace",
        type: "string",
        value: "N",
        required: true,
        describe: "namespace of the service account",
      },
      {
        name: "service-account",
        type: "string",
        value: "S",
        required: true,
        describe: "whose token; the credential needs no right but `create` on its `serviceaccounts/token`",
      },
      {
        name: "kubeconfig",
        type: "string",
        value: "FILE",
        describe: "credentials for the Kubernetes API, `exec` plugins included",
      },
      KUBE_CONTEXT,
      TOKEN_DURATION,
      {
        name: "audience",
        type: "string",
        value: "NAME",
        default: "istio-ca",
        describe: "whom the token is for; istiod wants istio-ca",
      },
    ],
    examples: [
      [
        "vmmesh token create --kubeconfig /etc/vmmesh-renew/kubeconfig --namespace default --service-account details",
        "see credentials.md in /usr/share/doc/vmmesh",
      ],
    ],
    load: async () => (await import("./token.ts")).tokenCreate,
  },
  {
    words: "iptables plan",
    summary:
      "what would be captured, and which live connections that changes or breaks, in words; changes nothing",
    options: [
      { name: "rules", type: "boolean", describe: "print the rules themselves" },
      {
        name: "compat",
        type: "string",
        choices: ["istio"],
        describe:
          "print what `pilot-agent istio-iptables` would apply instead: takes its flags and variables, needs no root",
      },
      {
        name: "family",
        type: "string",
        choices: ["ipv4", "ipv6"],
        describe:
          "with --compat: input for iptables-restore (as without the option) or for ip6tables-restore",
      },
      {
        name: "ipv6",
        type: "string",
        choices: ["true", "false"],
        describe: "with --compat: as if the machine had IPv6 or not, whatever its addresses are",
      },
      {
        name: "dns-server",
        type: "string",
        repeat: true,
        value: "IP|none",
        describe: "with --compat: as if resolv.conf named these servers",
      },
      OUTPUT,
    ],
    handsOnWith: "compat",
    examples: [
      ["vmmesh iptables plan --rules", "as iptables-restore and nft text"],
      [
        "vmmesh iptables plan --compat istio --family ipv6 --ipv6 true -p 15001 -b '*' -i '*'",
        "the rules of istio-iptables with these flags",
      ],
    ],
    load: async () => (await import("./iptables.ts")).plan,
  },
  {
    words: "iptables apply",
    summary: "install the rules under a timer that takes them out unless connectivity is confirmed",
    options: [
      {
        name: "confirm-within",
        type: "number",
        value: "SECONDS",
        default: 30,
        describe: "time until they go out again",
      },
      {
        name: "if-resolvers-changed",
        type: "boolean",
        describe:
          "only if /etc/resolv.conf names other servers than the rules in force (what vmmesh-resolvers.service runs when DHCP writes it)",
      },
      OUTPUT,
    ],
    examples: [["vmmesh iptables apply", "after a change in /etc/vmmesh/sidecar.env"]],
    load: async () => (await import("./iptables.ts")).apply,
  },
  {
    words: "iptables audit",
    summary: "what is wrong with the capture, in words; exit status 0 nothing, 1 something, 2 critical",
    options: [OUTPUT],
    examples: [["vmmesh iptables audit", "fit for cron and CI"]],
    load: async () => (await import("./iptables.ts")).audit,
  },
  {
    words: "iptables trace",
    summary: "where one packet goes, rule by rule, other programs' rules included; changes nothing",
    options: [
      {
        name: "to",
        type: "string",
        value: "ADDRESS:PORT",
        required: true,
        describe: "where the connection goes",
      },
      {
        name: "as",
        type: "string",
        value: "USER|UID|UNIT",
        describe: "who on this machine makes it",
      },
      { name: "from", type: "string", value: "ADDRESS", describe: "or the address from which it comes in" },
      {
        name: "protocol",
        type: "string",
        choices: ["tcp", "udp", "icmp"],
        default: "tcp",
        describe: "of the connection; icmp: an echo request, with --to ADDRESS",
      },
      {
        name: "live",
        type: "boolean",
        describe: "make the connection and compare with the kernel's own trace of its first packet",
      },
      OUTPUT,
    ],
    examples: [
      ["vmmesh iptables trace --to 10.96.0.10:80 --as www-data", "one sentence a rule, then one verdict"],
      ["vmmesh iptables trace --to 10.0.0.5:9080 --from 10.0.0.9", "the way in"],
    ],
    load: async () => (await import("./trace.ts")).trace,
  },
  {
    words: "iptables clean",
    summary: "take out what was really applied; foreign rules stay byte for byte",
    options: [
      {
        name: "leftovers",
        type: "boolean",
        describe:
          "instead, take out what Istio's own tools of any version have left: chains, nft tables, routing; refused while they run",
      },
      { name: "dry-run", type: "boolean", describe: "with --leftovers: only say what would be taken out" },
      OUTPUT,
    ],
    examples: [
      ["vmmesh iptables clean", "the machine stays joined, its traffic no longer goes through Envoy"],
      ["vmmesh iptables clean --leftovers --dry-run", "what istio-iptables or pilot-agent left behind"],
    ],
    load: async () => (await import("./iptables.ts")).clean,
  },
  {
    words: "iptables repair",
    summary: "put the confirmed rules right, if something moved them",
    options: [],
    examples: [],
    hidden: true,
    load: async () => (await import("./iptables.ts")).repair,
  },
  {
    words: "run",
    summary: "the agent itself; systemd starts it",
    options: [
      {
        name: "foreground",
        type: "boolean",
        describe:
          "without systemd: run agent and Envoy below --root, as `join` and `leave` with the same --root ask",
      },
      {
        name: "log-format",
        type: "string",
        choices: ["auto", "json"],
        default: "auto",
        describe: "journal lines under systemd, plain lines on a terminal, or JSON",
      },
    ],
    examples: [["vmmesh run --foreground --root /tmp/vm-a", "in a network namespace or a container"]],
    load: async () => (await import("./run.ts")).run,
  },
  {
    words: "version",
    summary: "version of vmmesh",
    options: [],
    examples: [],
    load: async () => (await import("./version.ts")).version,
  },
];
