import { copyFileSync, cpSync, mkdirSync } from "node:fs";
import { packageLayer, tailscaleWriter } from "../../lab/build.ts";
import type { Machine } from "../../lab/lab.ts";
import { treeOf } from "../../lab/parts.ts";

/** Somebody who writes the firewall. */
export interface Writer {
  readonly name: string;
  readonly does: string;
  /** As the journal should name it. */
  readonly is: string;
  /** Tools that it runs: who is named so is not known, and not named wrongly. */
  readonly by?: readonly string[];
  /** All of nf_tables goes, guard and fence too: until they are back, the held fence refuses. */
  readonly wipes?: true;
  /** Whether what it leaves of others' rules is compared in a quick run, too. */
  readonly kept?: true;
}

export const PACKAGES: readonly string[] = [
  ...["firewalld", "ufw", "docker.io"],
  ...["podman", "crun", "catatonit", "netavark"],
  ...["libvirt-daemon-system", "libvirt-daemon-system-systemd", "libvirt-clients", "dnsmasq-base"],
];

export const KUBE = "/usr/local/bin/kube-proxy";
export const KUBE_READY =
  "for i in $(seq 100); do iptables-nft -t nat -S OUTPUT | grep -q KUBE-SERVICES && break; sleep 0.1; done";
/** They run these; the kernel names the program that writes, not who has started it. */
const IPTABLES = ["iptables", "iptables-restor", "ip6tables", "ip6tables-resto"];
const NETAVARK =
  "/root/trixie/ld-linux-x86-64.so.2 --library-path /root/trixie /root/trixie/netavark --config /run/netavark";

export const WRITERS: readonly Writer[] = [
  {
    name: "kube-proxy, cleaned up and started",
    does: `systemctl stop kube-proxy; ${KUBE} --cleanup; systemctl start kube-proxy; ${KUBE_READY}`,
    is: "kube-proxy",
    kept: true,
  },
  { name: "kube-proxy, restarted", does: `systemctl restart kube-proxy; ${KUBE_READY}`, is: "kube-proxy" },
  { name: "firewalld, reloaded", does: "firewall-cmd --reload", is: "firewalld", by: IPTABLES },
  {
    name: "firewalld, restarted",
    does: "systemctl restart firewalld",
    is: "firewalld",
    by: IPTABLES,
    kept: true,
  },
  { name: "Docker, restarted", does: "systemctl restart docker", is: "docker", kept: true },
  {
    name: "Podman (netavark 1.4, iptables), a container with a published port restarted",
    does: "podman restart -t 0 web",
    is: "podman",
    by: IPTABLES,
  },
  {
    name: "Podman's netavark 1.14 (nftables), its network made anew",
    does: `export NETAVARK_FW=nftables; ${NETAVARK} teardown /run/netns/web < /root/netavark.json; nft delete table inet netavark; ${NETAVARK} setup /run/netns/web < /root/netavark.json`,
    is: "podman",
    by: ["nft"],
  },
  {
    name: "libvirt, its network restarted",
    does: "virsh net-destroy default; virsh net-start default",
    is: "libvirt",
    by: IPTABLES,
  },
  {
    name: "Tailscale (its own linuxfw, called as its router does at a start)",
    does: "/root/tailscale",
    is: "tailscale",
    by: IPTABLES,
  },
  { name: "ufw, reloaded", does: "ufw reload", is: "ufw" },
  { name: "iptables -t nat -F", does: "iptables -t nat -F", is: "iptables" },
  {
    name: "iptables -I OUTPUT 1",
    does: "iptables -t nat -I OUTPUT 1 -p tcp -j ACCEPT",
    is: "iptables",
  },
  {
    name: "netfilter-persistent, restarted",
    does: "systemctl restart netfilter-persistent",
    is: "netfilter-persistent",
    by: IPTABLES,
  },
  {
    name: "netfilter-persistent flush",
    does: "netfilter-persistent flush",
    is: "netfilter-persistent",
    by: IPTABLES,
    kept: true,
  },
  { name: "nft flush ruleset", does: "nft flush ruleset", is: "nft", wipes: true, kept: true },
  { name: "nftables.service, restarted", does: "systemctl restart nftables", is: "nft", wipes: true },
];

/**
 * A wipe took firewalld's tables, too: its next reload would fail halfway and leave the drop of all new connections that it
 * puts up meanwhile. And who starts firewalld stops nftables.service (they conflict), whose stop is a wipe of its own.
 */
export const AFTER_WIPE = "systemctl stop nftables; systemctl restart firewalld";

/** What netavark's caller, podman, gives it on its standard input. */
const NETWORK = {
  container_id: "2d0fe608dc86d7ba65dcec724a335b618328f08daa62afd2ee7fa9d41f74e5a9",
  container_name: "web",
  networks: { inner: { static_ips: ["10.89.0.2"], interface_name: "eth0" } },
  network_info: {
    inner: {
      name: "inner",
      id: "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
      driver: "bridge",
      network_interface: "podman9",
      subnets: [{ subnet: "10.89.0.0/24", gateway: "10.89.0.1" }],
      ipv6_enabled: false,
      internal: false,
      dns_enabled: false,
      ipam_options: { driver: "host-local" },
    },
  },
  port_mappings: [{ container_port: 80, host_port: 8089, protocol: "tcp", host_ip: "", range: 1 }],
};

/** What the writers need before they can start. */
export async function prepareWriters(machine: Machine): Promise<void> {
  // Debian's package of it and ufw's break each other.
  const persistent = await packageLayer("bookworm", ["iptables-persistent"]);
  for (const path of [
    "usr/sbin/netfilter-persistent",
    "usr/share/netfilter-persistent",
    "usr/lib/systemd/system/netfilter-persistent.service",
    "etc/default/netfilter-persistent",
  ])
    cpSync(`${persistent}/${path}`, `${machine.root}/${path}`, { recursive: true });
  machine.putFile(
    "/etc/iptables/rules.v4",
    "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n-A POSTROUTING -s 10.77.0.0/16 -j MASQUERADE\nCOMMIT\n",
  );

  copyFileSync(await tailscaleWriter(), `${machine.root}/root/tailscale`);

  // Of Debian 13, with what it is linked to: Debian 12's knows no nftables.
  const netavark = `${await packageLayer("trixie", ["netavark"])}/usr/lib/podman/netavark`;
  const trixie = treeOf("trixie");
  mkdirSync(`${machine.root}/root/trixie`);
  for (const file of [
    netavark,
    `${trixie}/usr/lib64/ld-linux-x86-64.so.2`,
    ...["libc.so.6", "libgcc_s.so.1", "libm.so.6"].map((it) => `${trixie}/usr/lib/x86_64-linux-gnu/${it}`),
  ])
    copyFileSync(file, `${machine.root}/root/trixie/${file.slice(file.lastIndexOf("/") + 1)}`);
  machine.putFile("/root/netavark.json", JSON.stringify(NETWORK));

  // A machine of the lab lies on an overlay and hands out no cgroups.
  machine.putFile(
    "/etc/containers/storage.conf",
    '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n',
  );
  machine.putFile(
    "/etc/containers/containers.conf",
    '[containers]\ncgroups = "disabled"\n[network]\nnetwork_backend = "netavark"\n[engine]\nruntime = "crun"\n',
  );

  // They are restarted more often than a machine's would be.
  for (const unit of ["docker.service", "docker.socket", "netfilter-persistent.service"])
    machine.putFile(`/etc/systemd/system/${unit}.d/lab.conf`, "[Unit]\nStartLimitIntervalSec=0\n");
  await machine.exec(
    "mkdir -p /root/web /run/netavark; cp /usr/bin/catatonit /root/web/; ip netns add web; systemctl daemon-reload",
  );
}

/** Everybody writes once, after vmmesh. */
export async function startWriters(machine: Machine): Promise<void> {
  await machine.exec(
    "systemctl start firewalld docker kube-proxy libvirtd netfilter-persistent; ufw --force enable; ufw default allow incoming",
  );
  await machine.exec(
    "podman run -d --name web -p 8088:80 --rootfs /root/web /catatonit -P; virsh net-start default; /root/tailscale",
  );
}
