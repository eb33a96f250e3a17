import type { CaptureWish, MachineFacts } from "../../agent/iptables/plan/wish.ts";

/** A modern machine with both families. */
export const MACHINE: MachineFacts = {
  backend: "nft",
  backendWhy: "",
  programs: { 4: "iptables-nft", 6: "ip6tables-nft" },
  nft: true,
  ipv6: true,
  sshPorts: [22],
};

/** The same without IPv6. */
export const MACHINE_V4: MachineFacts = {
  ...MACHINE,
  programs: { 4: "iptables-nft", 6: undefined },
  ipv6: false,
};

/** A usual wish: one declared port, everything outbound, one network of the mesh. */
export const WISH: CaptureWish = {
  agentUid: 990,
  envoyUid: 989,
  inbound: { kind: "ports", ports: [9000] },
  sshPorts: [],
  outbound: { cidrs: ["*"], excludeCidrs: [], excludePorts: [] },
  meshCidrs: ["10.96.0.0/12"],
  dns: undefined,
  ipv6: true,
  istiod: [],
  keep: [],
};
