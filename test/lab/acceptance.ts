import type { Lab } from "./lab.ts";
import { ORDINARY_USER } from "./load.ts";
import type { Machine } from "./machine.ts";
import { waitFor } from "./sh.ts";

/** What an application behind Envoy saw of a request. */
export interface Seen {
  readonly status: number;
  readonly server?: string;
  /** Address at the other end of the application's connection. */
  readonly client?: string;
  readonly headers: Readonly<Record<string, string>>;
}

/** Answers every GET with its own name and the headers that it got, as JSON; /healthz says 503 while /tmp/unhealthy exists. */
const APP = `
import http.server, json, os, sys
class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        sick = self.path == "/healthz" and os.path.exists("/tmp/unhealthy")
        body = json.dumps({"server": sys.argv[2], "client": self.client_address[0], "headers": {k.lower(): v for k, v in self.headers.items()}}).encode()
        self.send_response(503 if sick else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
Server(("0.0.0.0", int(sys.argv[1])), App).serve_forever()
`;

/** Starts the application as an enabled unit, so that it is back after a reboot, too. */
export async function startApp(machine: Machine, port: number, name = machine.name): Promise<void> {
  machine.putFile("/opt/app.py", APP);
  machine.putFile(
    "/etc/systemd/system/app.service",
    `[Service]\nExecStart=/usr/bin/python3 /opt/app.py ${port} ${name}\nUser=nobody\nRestart=always\n[Install]\nWantedBy=multi-user.target\n`,
  );
  await machine.exec("systemctl daemon-reload && systemctl enable -q --now app.service");
  await waitFor(
    `the application of ${name}`,
    async () =>
      (await machine.exec(`curl -sf -m 1 http://127.0.0.1:${port}/`, { allowFail: true })).code === 0
        ? true
        : undefined,
    15_000,
  );
}

/** A request as an ordinary user of the machine; status 0: no answer. */
export async function request(from: Machine, url: string): Promise<Seen> {
  const { stdout } = await from.exec(
    [...ORDINARY_USER, "curl", "-s", "-m", "5", "-w", "\n%{http_code}", url],
    { allowFail: true },
  );
  const cut = stdout.lastIndexOf("\n");
  const status = Number(stdout.slice(cut + 1));
  try {
    return {
      status,
      ...(JSON.parse(stdout.slice(0, cut)) as {
        server: string;
        client: string;
        headers: Record<string, string>;
      }),
    };
  } catch {
    return { status, headers: {} };
  }
}

/** Asks until the request arrives with this client identity; configuration takes a moment to spread. */
export async function arrivesAs(
  from: Machine,
  url: string,
  spiffe: string,
  timeoutMs = 20_000,
): Promise<Seen> {
  let last: Seen | undefined;
  try {
    return await waitFor(
      `${url} from ${from.name} as ${spiffe}`,
      async () => {
        last = await request(from, url);
        return last.status === 200 &&
          (last.headers["x-forwarded-client-cert"] ?? "").includes(`URI=${spiffe}`)
          ? last
          : undefined;
      },
      timeoutMs,
      300,
    );
  } catch (thrown) {
    throw new Error(`${(thrown as Error).message}; the last answer was ${JSON.stringify(last)}`);
  }
}

export const spiffe = (serviceAccount: string): string =>
  `spiffe://cluster.local/ns/default/sa/${serviceAccount}`;

export async function strictMtls(lab: Lab): Promise<void> {
  await lab.apply(
    "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: default}\nspec: {mtls: {mode: STRICT}}\n",
  );
}

/**
 * ServiceAccount, WorkloadGroup and Service (port 80 → `port`).
 *
 * @param options.probe a quick one, unless told otherwise; "": none
 * @param options.network that its machines are in; none: the mesh does not tell networks apart for them
 */
export async function defineWorkload(
  lab: Lab,
  name: string,
  port: number,
  {
    probe = `{periodSeconds: 1, initialDelaySeconds: 1, successThreshold: 1, failureThreshold: 2, httpGet: {port: ${port}, path: /healthz}}`,
    network = "",
  }: { readonly probe?: string; readonly network?: string } = {},
): Promise<void> {
  await lab.apply(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: ${name}, namespace: default}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: ${name}, namespace: default}
spec:
  metadata: {labels: {app: ${name}}}
  ${probe === "" ? "" : `probe: ${probe}`}
  template: {serviceAccount: ${name}, ports: {http: ${port}}, network: "${network}"}
---
apiVersion: v1
kind: Service
metadata: {name: ${name}, namespace: default}
spec: {selector: {app: ${name}}, ports: [{name: http, port: 80, targetPort: ${port}}]}
`);
}

/** Takes away what earlier tests made in namespace default. */
export async function cleanNamespace(lab: Lab): Promise<void> {
  await lab.kubectl([
    "delete",
    "workloadentries,workloadgroups,peerauthentications",
    "--all",
    "-n",
    "default",
    "--wait=false",
  ]);
  const { stdout } = await lab.kubectl(["get", "services,serviceaccounts", "-n", "default", "-o", "name"]);
  const names = stdout.split("\n").filter((name) => name !== "" && name !== "service/kubernetes");
  if (names.length > 0)
    await lab.kubectl(["delete", "-n", "default", "--wait=false", ...names], { allowFail: true });
}

/**
 * A bundle by the real istioctl; a folder on this machine.
 *
 * @param ingress address at which its machines find istiod; the lab's, if left out
 */
export async function istioctlBundle(lab: Lab, group: string, ingress?: string): Promise<string> {
  const folder = `${lab.folder("bundles")}/${group}`;
  await lab.istioctl([
    "x",
    "workload",
    "entry",
    "configure",
    "--name",
    group,
    "-n",
    "default",
    "-o",
    folder,
    "--clusterID",
    "Kubernetes",
    "--autoregister",
    ...(ingress === undefined ? [] : ["--ingressIP", ingress]),
  ]);
  return folder;
}

/** What the real `istioctl proxy-status` says: proxy name → its line. */
export async function proxyStatus(lab: Lab): Promise<Map<string, string>> {
  const { stdout } = await lab.istioctl([
    "proxy-status",
    // A column for each type; without it only the subscribed types are named, not whether they are in sync.
    "--verbosity",
    "1",
    "--xds-address",
    `${lab.address}:15012`,
    "--authority",
    "istiod.istio-system.svc",
    "--insecure",
  ]);
  return new Map(
    stdout
      .split("\n")
      .slice(1)
      .filter((line) => line.trim() !== "")
      .map((line) => [line.split(/\s+/)[0] ?? "", line]),
  );
}

export interface EntryStatus {
  readonly address: string;
  readonly healthy: boolean | undefined;
}

export async function workloadEntries(lab: Lab): Promise<Map<string, EntryStatus>> {
  const { stdout } = await lab.kubectl(["get", "workloadentries", "-n", "default", "-o", "json"]);
  const { items } = JSON.parse(stdout) as {
    items: {
      metadata: { name: string };
      spec: { address: string };
      status?: { conditions?: { type: string; status: string }[] };
    }[];
  };
  return new Map(
    items.map(({ metadata, spec, status }) => {
      const condition = status?.conditions?.find(({ type }) => type === "Healthy");
      return [
        metadata.name,
        { address: spec.address, healthy: condition === undefined ? undefined : condition.status === "True" },
      ];
    }),
  );
}

export function requireRoot(): void {
  if (process.getuid?.() !== 0) throw new Error("this lane boots systemd machines and needs root");
}
