/** An option set of the peer with the machine that it meets. */
export interface CompatCase {
  readonly name: string;
  readonly argv: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** The machine has an address of IPv6 only; of IPv4 only otherwise. */
  readonly ipv6?: true;
  readonly nameservers?: readonly string[];
}

const UIDS = ["-u", "3,4", "-g", "1,2"];
const VIRT = ["-k", "eth1,eth2"];
const TPROXY = ["-m", "TPROXY"];
const V4_DNS = { nameservers: ["127.0.0.53"] };

/** The peer's own golden cases (VM protocol, ch. 7.8), then the worked example of its Appendix A. */
export const CASES: readonly CompatCase[] = [
  { name: "empty", argv: [] },
  { name: "inbound-ports-include", argv: ["-b", "32000,31000"] },
  { name: "inbound-ports-wildcard", argv: ["-b", "*"] },
  { name: "inbound-ports-tproxy", argv: ["-b", "32000,31000", ...TPROXY] },
  { name: "inbound-ports-wildcard-tproxy", argv: ["-b", "*", ...TPROXY] },
  { name: "inbound-ports-empty-tproxy", argv: TPROXY },
  {
    name: "tproxy",
    argv: [
      ...TPROXY,
      "-b",
      "*",
      "-x",
      "1.1.0.0/16",
      "-i",
      "9.9.0.0/16",
      "--redirect-dns",
      "-c",
      "not-istio-nic",
    ],
    ipv6: true,
    ...V4_DNS,
  },
  {
    name: "ip-range",
    argv: ["-x", "1.1.0.0/16", "-i", "9.9.0.0/16", "--redirect-dns", ...UIDS],
    ...V4_DNS,
  },
  { name: "ipnets", argv: ["-i", "10.0.0.0/8"] },
  { name: "kube-virt-interfaces", argv: [...VIRT, "-i", "*"] },
  { name: "ipnets-with-kube-virt-interfaces", argv: [...VIRT, "-i", "10.0.0.0/8"] },
  {
    name: "loopback-outbound-iprange",
    argv: ["-i", "127.1.2.3/32", "--redirect-dns", ...UIDS],
    ...V4_DNS,
  },
  {
    name: "dns-uid-gid",
    argv: ["--redirect-dns", ...UIDS],
    ipv6: true,
    nameservers: ["127.0.0.53", "::127.0.0.53"],
  },
  { name: "ipv6-dns-uid-gid", argv: ["--redirect-dns", ...UIDS], ipv6: true },
  { name: "outbound-owner-groups", argv: [], env: { ISTIO_OUTBOUND_OWNER_GROUPS: "java,202" } },
  {
    name: "outbound-owner-groups-exclude",
    argv: [],
    env: { ISTIO_OUTBOUND_OWNER_GROUPS: "*", ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: "888,ftp" },
  },
  {
    name: "ipv6-dns-outbound-owner-groups",
    argv: ["--redirect-dns"],
    env: { ISTIO_OUTBOUND_OWNER_GROUPS: "java,202" },
    ipv6: true,
  },
  {
    name: "ipv6-dns-outbound-owner-groups-exclude",
    argv: ["--redirect-dns"],
    env: { ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: "888,ftp" },
    ipv6: true,
  },
  { name: "outbound-ports-include", argv: ["-q", "32000,31000"] },
  { name: "ipv6-outbound-ports", argv: ["-q", "32000,31000"], ipv6: true },
  { name: "basic-exclude-nic", argv: ["-c", "not-istio-nic"] },
  { name: "drop-invalid", argv: ["--drop-invalid"] },
  { name: "host-ipv4-loopback-cidr", argv: [], env: { ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "127.0.0.1/8" } },
  { name: "ipv6-empty-inbound-ports", argv: [], ipv6: true },
  { name: "ipv6-inbound-ports", argv: ["-b", "4000,5000"], ipv6: true },
  { name: "ipv6-virt-interfaces", argv: ["-b", "4000,5000", "-k", "eth0,eth1"], ipv6: true },
  {
    name: "ipv6-ipnets",
    argv: [
      ...["-b", "4000,5000", "-k", "eth0,eth1"],
      ...["-d", "6000,7000,", "-i", "2001:db8::/32", "-x", "2001:db8::/32"],
    ],
    ipv6: true,
  },
  {
    name: "ipv6-uid-gid",
    argv: [
      ...["-b", "4000,5000", "-k", "eth0,eth1", ...UIDS],
      ...["-d", "6000,7000,", "-i", "2001:db8::/32", "-x", "2001:db8::/32"],
    ],
    ipv6: true,
  },
  {
    name: "capture-all-dns",
    argv: ["--redirect-dns", "--capture-all-dns", ...TPROXY, "--drop-invalid"],
    ipv6: true,
  },
  {
    name: "default-bundle",
    argv: ["-u", "998"],
    env: {
      ISTIO_INBOUND_PORTS: "*",
      ISTIO_LOCAL_EXCLUDE_PORTS: "22,15090,15021,15020",
      ISTIO_SERVICE_CIDR: "*",
      ISTIO_META_DNS_CAPTURE: "true",
    },
    ...V4_DNS,
  },
];

/** Documents as the peer would feed them, by family. */
export const golden = (name: string, family: 4 | 6): string =>
  new URL(`../../agent/iptables/golden/compat/${name}.ipv${family}.rules`, import.meta.url).pathname;
