import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { exclusively } from "./lock.ts";
import { ADDRESS, CRDS, ISTIO_BIN, KUBE_BIN, SERVICE_RANGE } from "./parts.ts";
import { type Output, type ShOptions, say, sh, waitFor } from "./sh.ts";
import { changeState, folderOf, isRunning, readState, start, stop } from "./state.ts";

/** Users of the API; what each may do is in `rbac`. The tokens are good in this lab only. */
export const USERS = ["admin", "joiner", "reader", "nobody"] as const;
export type User = (typeof USERS)[number];

export const netnsOf = (id: string): string => `vmmesh-${id}`;
export const inNetns = (id: string, argv: readonly string[]): string[] => [
  "ip",
  "netns",
  "exec",
  netnsOf(id),
  ...argv,
];

/** Without these istiod names extensions that only Istio's own Envoy build has. */
const STOCK_ENVOY = { PILOT_ENABLE_ALPN_FILTER: "false", PILOT_ENABLE_METADATA_EXCHANGE: "false" };

/** Network, etcd, API server, istiod and a DNS server for the outside; whatever runs already stays. */
export function up(id: string, options: { istiodDefaults?: boolean } = {}): Promise<void> {
  return exclusively(`${id}-lab`, () => bringUp(id, options));
}

async function bringUp(id: string, options: { istiodDefaults?: boolean }): Promise<void> {
  mkdirSync(folderOf(id), { recursive: true });
  await network(id);
  await kubernetes(id);
  const env = options.istiodDefaults === true ? {} : STOCK_ENVOY;
  const asWanted =
    options.istiodDefaults === undefined || JSON.stringify(istiodEnvOf(id)) === JSON.stringify(env);
  if (isRunning(id, "istiod") && !asWanted) await stopIstiod(id);
  if (!isRunning(id, "istiod")) await startIstiod(id, env);
  // An `up` that was killed may have left it on its way.
  else await istiodReady(id);
  if (!isRunning(id, "dnsmasq")) {
    const records = [
      "--address=/outside.lab/10.99.0.2",
      "--address=/outside.lab/fd00:99::2",
      "--txt-record=outside.lab,plain text",
      "--mx-host=outside.lab,mail.outside.lab,10",
    ];
    start(
      id,
      "dnsmasq",
      inNetns(id, [
        "dnsmasq",
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--user=root",
        "--pid-file",
        `--listen-address=${ADDRESS.controlPlane}`,
        "--bind-interfaces",
        ...records,
      ]),
    );
  }
}

async function network(id: string): Promise<void> {
  const name = netnsOf(id);
  const { stdout } = await sh(["ip", "netns", "list"]);
  if (!stdout.split("\n").some((line) => line.split(" ")[0] === name)) await sh(["ip", "netns", "add", name]);
  const inside = (...argv: string[]) => sh(inNetns(id, ["ip", ...argv]), { allowFail: true });
  await inside("link", "set", "lo", "up");
  await inside("link", "add", "br0", "type", "bridge");
  await inside("address", "add", `${ADDRESS.controlPlane}/24`, "dev", "br0");
  await inside("-6", "address", "add", `${ADDRESS.controlPlane6}/64`, "dev", "br0", "nodad");
  await inside("link", "set", "br0", "up");
}

async function kubernetes(id: string): Promise<void> {
  const at = folderOf(id);
  const prepared = `${at}/prepared`;
  // Of what is applied: a lab that an older checkout has brought up gets what is new.
  const wanted = createHash("sha256").update(MESH).digest("hex");
  const done = existsSync(prepared) && readFileSync(prepared, "utf8") === wanted;
  if (isRunning(id, "kube-apiserver") && isRunning(id, "etcd") && done) return;
  await certificates(at);
  say("starting etcd and kube-apiserver");
  const etcd = "http://127.0.0.1:2379";
  if (!isRunning(id, "etcd"))
    start(
      id,
      "etcd",
      inNetns(id, [
        "etcd",
        "--data-dir",
        `${at}/etcd`,
        "--listen-client-urls",
        etcd,
        "--advertise-client-urls",
        etcd,
        "--unsafe-no-fsync",
      ]),
    );
  writeFileSync(
    `${at}/tokens.csv`,
    USERS.map((user) => `${user}-token,${user},${user}${user === "admin" ? ',"system:masters"' : ""}\n`).join(
      "",
    ),
    { mode: 0o600 },
  );
  const api = inNetns(id, [
    `${KUBE_BIN}/kube-apiserver`,
    `--etcd-servers=${etcd}`,
    "--service-account-issuer=https://kubernetes.default.svc",
    `--service-account-key-file=${at}/sa.pub`,
    `--service-account-signing-key-file=${at}/sa.key`,
    "--authorization-mode=RBAC",
    `--token-auth-file=${at}/tokens.csv`,
    `--service-cluster-ip-range=${SERVICE_RANGE}`,
    "--secure-port=6443",
    "--bind-address=0.0.0.0",
    `--advertise-address=${ADDRESS.controlPlane}`,
    `--tls-cert-file=${at}/api.crt`,
    `--tls-private-key-file=${at}/api.key`,
    `--cert-dir=${at}`,
    "--disable-admission-plugins=ServiceAccount",
  ]);
  if (!isRunning(id, "kube-apiserver")) start(id, "kube-apiserver", api);
  for (const user of USERS) writeKubeconfig(at, user);
  await waitFor(
    "kube-apiserver",
    async () => ((await kubectl(id, ["get", "--raw", "/readyz"])).stdout === "ok" ? true : undefined),
    60_000,
  );
  await kubectl(id, ["apply", "--server-side", "-f", CRDS]);
  await kubectl(id, ["apply", "-f", "-"], { input: MESH });
  const patch = JSON.stringify({ status: { loadBalancer: { ingress: [{ ip: ADDRESS.controlPlane }] } } });
  await kubectl(id, [
    "-n",
    "istio-system",
    "patch",
    "service",
    "istio-eastwestgateway",
    "--subresource=status",
    "--type=merge",
    "-p",
    patch,
  ]);
  // Last: an `up` that was killed before this does it all again.
  writeFileSync(prepared, wanted);
}

async function certificates(at: string): Promise<void> {
  if (existsSync(`${at}/api.crt`)) return;
  const openssl = (...args: string[]) => sh(["openssl", ...args]);
  await openssl("genrsa", "-out", `${at}/sa.key`, "2048");
  await openssl("rsa", "-in", `${at}/sa.key`, "-pubout", "-out", `${at}/sa.pub`);
  await openssl(
    "req",
    "-x509",
    "-newkey",
    "rsa:2048",
    "-nodes",
    "-keyout",
    `${at}/ca.key`,
    "-out",
    `${at}/ca.crt`,
    "-days",
    "30",
    "-subj",
    "/CN=vmmesh lab",
  );
  await openssl(
    "req",
    "-newkey",
    "rsa:2048",
    "-nodes",
    "-keyout",
    `${at}/api.key`,
    "-out",
    `${at}/api.csr`,
    "-subj",
    "/CN=kube-apiserver",
  );
  writeFileSync(
    `${at}/api.ext`,
    `subjectAltName=IP:${ADDRESS.controlPlane},IP:127.0.0.1,DNS:kubernetes.default.svc\n`,
  );
  await openssl(
    "x509",
    "-req",
    "-in",
    `${at}/api.csr`,
    "-CA",
    `${at}/ca.crt`,
    "-CAkey",
    `${at}/ca.key`,
    "-CAcreateserial",
    "-days",
    "30",
    "-extfile",
    `${at}/api.ext`,
    "-out",
    `${at}/api.crt.new`,
  );
  renameSync(`${at}/api.crt.new`, `${at}/api.crt`);
}

function writeKubeconfig(at: string, user: User): void {
  const config = {
    apiVersion: "v1",
    kind: "Config",
    clusters: [
      {
        name: "lab",
        cluster: { server: `https://${ADDRESS.controlPlane}:6443`, "certificate-authority": `${at}/ca.crt` },
      },
    ],
    users: [{ name: user, user: { token: `${user}-token` } }],
    contexts: [{ name: "lab", context: { cluster: "lab", user } }],
    "current-context": "lab",
  };
  writeFileSync(`${at}/kubeconfig-${user}`, JSON.stringify(config, null, 1), { mode: 0o600 });
}

export function kubectl(id: string, args: readonly string[], options: ShOptions = {}): Promise<Output> {
  return sh(
    inNetns(id, [`${KUBE_BIN}/kubectl`, "--kubeconfig", `${folderOf(id)}/kubeconfig-admin`, ...args]),
    options,
  );
}

export async function startIstiod(id: string, env: Readonly<Record<string, string>>): Promise<void> {
  say("starting istiod");
  changeState(id, (state) => ({ ...state, istiodEnv: env }));
  start(
    id,
    "istiod",
    inNetns(id, [
      `${ISTIO_BIN}/pilot-discovery`,
      "discovery",
      "--kubeconfig",
      `${folderOf(id)}/kubeconfig-admin`,
      "--domain",
      "cluster.local",
    ]),
    {
      POD_NAMESPACE: "istio-system",
      POD_NAME: "istiod-0",
      SERVICE_ACCOUNT: "istiod",
      PILOT_CERT_PROVIDER: "istiod",
      CLUSTER_ID: "Kubernetes",
      ...env,
    },
  );
  await istiodReady(id);
}

async function istiodReady(id: string): Promise<void> {
  const ready = inNetns(id, [
    "curl",
    "-s",
    "-o",
    "/dev/null",
    "-w",
    "%{http_code}",
    "http://127.0.0.1:8080/ready",
  ]);
  await waitFor(
    "istiod",
    async () => ((await sh(ready, { allowFail: true })).stdout === "200" ? true : undefined),
    60_000,
  );
  await waitFor(
    "the mesh's root in namespace default",
    async () =>
      (await kubectl(id, ["get", "configmap", "istio-ca-root-cert"], { allowFail: true })).code === 0
        ? true
        : undefined,
    30_000,
  );
}

export async function stopIstiod(id: string): Promise<void> {
  await stop(id, "istiod");
}

export function istiodEnvOf(id: string): Readonly<Record<string, string>> {
  return readState(id).istiodEnv;
}

/** What a real mesh has, and users with narrower rights. `joiner` may do exactly what `vmmesh join` needs. */
const MESH = `
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
# istioctl asks istiod's debug xDS as this account.
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: istio-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    accessLogFile: /dev/stdout
    defaultConfig:
      discoveryAddress: istiod.istio-system.svc:15012
---
# The installer's values, where tools look for the cluster's name. Without templates istiod injects nothing.
apiVersion: v1
kind: ConfigMap
metadata: {name: istio-sidecar-injector, namespace: istio-system}
data:
  config: |
    policy: enabled
    templates: {}
  values: '{"global":{"multiCluster":{"clusterName":"Kubernetes"}}}'
---
apiVersion: v1
kind: Service
metadata: {name: istio-eastwestgateway, namespace: istio-system}
spec:
  type: LoadBalancer
  ports:
  - {name: tls-istiod, port: 15012, targetPort: 15012}
  - {name: tls-webhook, port: 15017, targetPort: 15017}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: lab-reader}
rules:
- {apiGroups: ["", networking.istio.io, networking.k8s.io], resources: [namespaces, configmaps, services, serviceaccounts, workloadgroups, workloadentries, servicecidrs], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: lab-reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: lab-reader}
subjects: [{kind: User, name: reader}]
---
# ServiceCIDRs belong to no namespace.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: lab-joiner}
rules:
- {apiGroups: [networking.k8s.io], resources: [servicecidrs], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: lab-joiner}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: lab-joiner}
subjects: [{kind: User, name: joiner}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: joiner, namespace: default}
rules:
- {apiGroups: [networking.istio.io], resources: [workloadgroups], verbs: [get, create, update]}
- {apiGroups: [""], resources: [services], verbs: [get, create, update]}
- {apiGroups: [""], resources: [serviceaccounts], verbs: [get, create]}
- {apiGroups: [""], resources: [serviceaccounts/token], verbs: [create]}
- {apiGroups: [""], resources: [configmaps], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: joiner, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: joiner}
subjects: [{kind: User, name: joiner}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: joiner, namespace: istio-system}
rules:
- {apiGroups: [""], resources: [configmaps], resourceNames: [istio, istio-sidecar-injector], verbs: [get]}
- {apiGroups: [""], resources: [services], resourceNames: [istio-eastwestgateway], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: joiner, namespace: istio-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: joiner}
subjects: [{kind: User, name: joiner}]
`;
