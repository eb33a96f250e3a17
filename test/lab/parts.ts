/** Versions that were seen to work together, and where what is built from them lies. */
export const ISTIO = "v0.0.0-20260827124520-eed52ebb66ad";
export const ISTIO_API = "v1.31.0-rc.0.0.20260824154656-b943409680a7";
export const KUBERNETES = "v1.37.2";
export const ENVOY = "1.40.0";
/** Of release-v3.28, August 2025: the latest that the Go proxy knows. */
export const CALICO = "v1.11.0-cni-plugin.0.20250813170300-a0db560f0520";

/** Used where the distribution's Go is older than 1.21. */
export const GO_VERSION = "1.26.8";

export const CACHE = process.env["VMMESH_LAB_CACHE"] ?? "/var/cache/vmmesh-lab";
export const ISTIO_BIN = `${CACHE}/istio-${ISTIO}`;
export const KUBE_BIN = `${CACHE}/kubernetes-${KUBERNETES}`;
export const CRDS = `${CACHE}/crds-${ISTIO_API}.yaml`;
export const GO = `${CACHE}/go-${GO_VERSION}`;
/** The peer's template of an Envoy bootstrap, which its package puts beside its binary. */
export const PEER_BOOTSTRAP = `${CACHE}/envoy-bootstrap-${ISTIO}.json`;
/** Writes what Tailscale writes into netfilter; its version is in `tailscale/go.mod`. */
export const TAILSCALE = `${CACHE}/tailscale-v1.98.10`;
/** Keeps its rules where Calico's Felix keeps them. */
export const CALICO_BIN = `${CACHE}/calico-${CALICO}`;
/** Debian's release on a machine that asks for no other. */
export const RELEASE = "bookworm";
/** The number changes with the list of packages in `build.ts`. */
export const treeOf = (release: string): string => `${CACHE}/machine-${release}-2`;

/** Addresses inside the lab's own namespaces; nothing of them leaves the machine. */
export const ADDRESS = {
  controlPlane: "10.99.0.2",
  controlPlane6: "fd00:99::2",
  machine: (number: number): string => `10.99.0.${10 + number}`,
  machine6: (number: number): string => `fd00:99::${10 + number}`,
} as const;
export const SERVICE_RANGE = "10.96.0.0/16";
