import { copyFileSync, readFileSync } from "node:fs";
import { istioctlBundle } from "./acceptance.ts";
import type { Lab } from "./lab.ts";
import type { Machine } from "./machine.ts";
import { PEER_BOOTSTRAP } from "./parts.ts";
import { waitFor } from "./sh.ts";

/**
 * The peer's agent as its own service. It reads the bundle's `cluster.env`; paths are relative to "/" as in its start
 * script. Unless told which iptables to use, istio-iptables looks at both, by which the kernel gets legacy tables; its next
 * call then finds them and cleans or fills those, whatever the first has put into nft. Its standard output must be a file that its user may open, because Envoy opens /dev/stdout for the access log. Restart,
 * its wait of 10 s and how it is stopped are those of Istio's own unit (tools/packaging/common/istio.service).
 */
const UNIT = `[Unit]
Description=The peer: pilot-agent with a stock Envoy
After=network.target
StartLimitIntervalSec=0
[Service]
EnvironmentFile=/var/lib/istio/envoy/cluster.env
Environment=POD_NAME=%H INSTANCE_IP=@IP@ PROV_CERT=/etc/certs OUTPUT_CERTS=/etc/certs ENVOY_USER=istio-proxy
Environment=CA_ADDR=istiod.istio-system.svc:15012 FORCE_IPTABLES_BINARY=nft
WorkingDirectory=/
ExecStartPre=+/usr/local/bin/pilot-agent istio-iptables
ExecStart=/usr/local/bin/pilot-agent proxy --concurrency 2
ExecStopPost=+/usr/local/bin/pilot-agent istio-iptables --cleanup-only
User=istio-proxy
AmbientCapabilities=CAP_NET_BIND_SERVICE
StandardOutput=append:/var/log/istio/istio.log
StandardError=append:/var/log/istio/istio.log
KillMode=mixed
TimeoutStopSec=30s
Restart=always
RestartSec=10
[Install]
WantedBy=multi-user.target
`;

/** What the service does before it starts, alone: the peer's own program makes its rules from the bundle. */
export const PEER_RULES =
  "set -a; . /var/lib/istio/envoy/cluster.env; FORCE_IPTABLES_BINARY=nft; exec /usr/local/bin/pilot-agent istio-iptables";

const FOLDERS = [
  "/etc/certs",
  "/etc/istio/config",
  "/etc/istio/proxy",
  "/run/secrets/tokens",
  "/var/lib/istio/envoy",
  "/var/log/istio",
].join(" ");

/** Lays a bundle of the real istioctl out as Istio's documentation says. The service is there, and not started. */
export async function installPeer(lab: Lab, machine: Machine, group: string): Promise<void> {
  const bundle = await istioctlBundle(lab, group);
  const text = (name: string): string => readFileSync(`${bundle}/${name}`, "utf8");
  await machine.exec(
    `getent passwd istio-proxy >/dev/null || useradd --system --user-group --uid 1337 --home-dir /var/lib/istio istio-proxy
     mkdir -p ${FOLDERS}; touch /var/log/istio/istio.log`,
  );
  copyFileSync(PEER_BOOTSTRAP, `${machine.root}/var/lib/istio/envoy/envoy_bootstrap_tmpl.json`);
  machine.putFile("/etc/certs/root-cert.pem", text("root-cert.pem"));
  machine.putFile("/run/secrets/tokens/istio-token", text("istio-token"), 0o600);
  machine.putFile("/var/lib/istio/envoy/cluster.env", text("cluster.env"));
  machine.putFile("/etc/istio/config/mesh", text("mesh.yaml"));
  const hosts = machine.getFile("/etc/hosts");
  if (!hosts.includes(text("hosts"))) machine.putFile("/etc/hosts", hosts + text("hosts"));
  machine.putFile("/etc/systemd/system/peer.service", UNIT.replace("@IP@", machine.ip));
  await machine.exec(`chown -R istio-proxy: ${FOLDERS} /run/secrets; systemctl daemon-reload`);
}

/** Starts the peer and waits until its own readiness port says that Envoy is ready. */
export async function startPeer(machine: Machine): Promise<void> {
  await machine.exec("systemctl restart peer.service");
  await waitFor(
    `the peer on ${machine.name}`,
    async () =>
      (await machine.exec("curl -sf -m 1 http://127.0.0.1:15021/healthz/ready", { allowFail: true })).code ===
      0
        ? true
        : undefined,
    30_000,
  ).catch(async (thrown: unknown) => {
    const { stdout } = await machine.exec(
      "systemctl status peer.service --no-pager -l; tail -n 30 /var/log/istio/istio.log",
      { allowFail: true },
    );
    throw new Error(`${(thrown as Error).message}\n${stdout}`);
  });
}

export async function stopPeer(machine: Machine): Promise<void> {
  await machine.exec("systemctl stop peer.service");
}
