import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import {
  BASE,
  CACHE,
  CRDS,
  ENVOY,
  ISTIO,
  ISTIO_API,
  ISTIO_BIN,
  KUBE_BIN,
  KUBERNETES,
  PEER_BOOTSTRAP,
} from "./parts.ts";
import { say, sh } from "./sh.ts";

const DEBIAN = [
  "etcd-server",
  "prometheus",
  "debootstrap",
  "systemd-container",
  "iptables",
  "nftables",
  "conntrack",
  "dnsmasq-base",
  "iproute2",
  "curl",
  "openssl",
  "procps",
  "unzip",
];
const PROGRAMS = [
  "etcd",
  "prometheus",
  "debootstrap",
  "systemd-nspawn",
  "iptables",
  "nft",
  "conntrack",
  "dnsmasq",
  "ip",
  "curl",
  "openssl",
];
/** What a machine of the lab has beside Debian's minimum. */
const IN_MACHINE = [
  "systemd",
  "systemd-sysv",
  "dbus",
  "iproute2",
  "iptables",
  "nftables",
  "ca-certificates",
  "curl",
  "procps",
  "python3",
  "openssh-server",
  "conntrack",
  "sudo",
  "hostname",
  "bind9-dnsutils",
  "libatomic1",
  "libstdc++6",
];

/** Builds what is missing in the cache; each part is made aside and renamed, so that a killed build leaves no half. */
export async function build(): Promise<void> {
  mkdirSync(CACHE, { recursive: true });
  await packages();
  await part(ISTIO_BIN, "istiod, pilot-agent, istioctl (8 minutes)", async (to) => {
    const commands = ["pilot/cmd/pilot-discovery", "pilot/cmd/pilot-agent", "istioctl/cmd/istioctl"];
    await go(
      [
        "install",
        "-trimpath",
        "-ldflags=-s -w",
        ...commands.map((path) => `istio.io/istio/${path}@${ISTIO}`),
      ],
      { GOBIN: to },
    );
  });
  await part(CRDS, "Istio's resource definitions", (to) =>
    moduleFile(`istio.io/api@${ISTIO_API}`, "kubernetes/customresourcedefinitions.gen.yaml", to),
  );
  await part(PEER_BOOTSTRAP, "the peer's bootstrap template", (to) =>
    moduleFile(`istio.io/istio@${ISTIO}`, "tools/packaging/common/envoy_bootstrap.json", to),
  );
  await part(KUBE_BIN, "kube-apiserver, kube-proxy, kubectl (7 minutes)", async (to) => {
    const module = mkdtempSync(`${CACHE}/.kubernetes-`);
    try {
      cpSync(new URL("./kubernetes", import.meta.url), module, { recursive: true });
      for (const name of ["sample-cli-plugin", "sample-controller"]) {
        mkdirSync(`${module}/empty/${name}`, { recursive: true });
        writeFileSync(`${module}/empty/${name}/go.mod`, `module k8s.io/${name}\n`);
      }
      const [, major, minor] = /^v(\d+)\.(\d+)/.exec(KUBERNETES) ?? [];
      const version = [`gitVersion=${KUBERNETES}`, `gitMajor=${major}`, `gitMinor=${minor}`].map(
        (it) => `-X k8s.io/component-base/version.${it}`,
      );
      const commands = ["kube-apiserver", "kube-proxy", "kubectl"].map(
        (name) => `k8s.io/kubernetes/cmd/${name}`,
      );
      await go(
        [
          "build",
          "-trimpath",
          "-mod=mod",
          `-ldflags=-s -w ${version.join(" ")}`,
          "-o",
          `${to}/`,
          ...commands,
        ],
        {},
        module,
      );
    } finally {
      rmSync(module, { recursive: true, force: true });
    }
  });
  await envoy(ENVOY);
  await part(BASE, "a Debian tree for the machines (1 minute)", async (to) => {
    await sh(["debootstrap", "--variant=minbase", `--include=${IN_MACHINE.join(",")}`, "bookworm", to]);
    await sh(["chroot", to, "apt-get", "clean"]);
    await sh(["chroot", to, "systemctl", "disable", "ssh.service"], { allowFail: true });
    rmSync(`${to}/etc/machine-id`, { force: true });
    rmSync(`${to}/etc/resolv.conf`, { force: true });
  });
}

/** Path of a stock Envoy of this version, fetched if it is missing. */
export async function envoy(version: string): Promise<string> {
  const { stdout } = await sh([new URL("../../scripts/fetch-envoy", import.meta.url).pathname, version]);
  return stdout.trim().split("\n").at(-1) ?? "";
}

async function packages(): Promise<void> {
  const missing = [];
  for (const program of PROGRAMS)
    if (
      (
        await sh(["which", program], {
          allowFail: true,
          env: { PATH: `${process.env["PATH"]}:/usr/sbin:/sbin` },
        })
      ).code !== 0
    )
      missing.push(program);
  if (missing.length === 0) return;
  say(`installing Debian's packages for ${missing.join(", ")}`);
  // etcd and Prometheus would start as services of this machine, where there is a service manager.
  const policy = "/usr/sbin/policy-rc.d";
  const ours = !existsSync(policy);
  if (ours) writeFileSync(policy, "#!/bin/sh\nexit 101\n", { mode: 0o755 });
  try {
    await sh(["apt-get", "update", "-qq"]);
    await sh(["apt-get", "install", "-y", "-qq", "--no-install-recommends", ...DEBIAN], {
      env: { DEBIAN_FRONTEND: "noninteractive" },
    });
  } finally {
    if (ours) rmSync(policy);
  }
}

/** Go from PATH; modules name the toolchain that they want, and Go fetches it as a module. */
async function go(
  args: readonly string[],
  env: Record<string, string> = {},
  cwd?: string,
): Promise<{ stdout: string }> {
  if ((await sh(["which", "go"], { allowFail: true })).code !== 0) {
    say("installing Go (apt)");
    await sh(["apt-get", "update", "-qq"]);
    await sh(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "golang-go"], {
      env: { DEBIAN_FRONTEND: "noninteractive" },
    });
  }
  return sh(["go", ...args], {
    env: { CGO_ENABLED: "0", GOTOOLCHAIN: "auto", GOFLAGS: "-buildvcs=false", ...env },
    timeoutMs: 40 * 60_000,
    ...(cwd === undefined ? {} : { cwd }),
  });
}

/** One file of a Go module. */
async function moduleFile(module: string, path: string, to: string): Promise<void> {
  const { stdout } = await go(["mod", "download", "-json", module]);
  const { Dir } = JSON.parse(stdout) as { Dir: string };
  rmSync(to, { recursive: true });
  cpSync(`${Dir}/${path}`, to);
}

async function part(path: string, what: string, make: (to: string) => Promise<void>): Promise<void> {
  if (existsSync(path)) return;
  say(`building ${what}`);
  const aside = mkdtempSync(`${CACHE}/.part-`);
  try {
    await make(aside);
    renameSync(aside, path);
  } catch (thrown) {
    rmSync(aside, { recursive: true, force: true });
    throw thrown;
  }
  say(`built ${what}`);
}

export function isBuilt(): boolean {
  return [ISTIO_BIN, KUBE_BIN, CRDS, PEER_BOOTSTRAP, BASE].every((path) => existsSync(path));
}

/** Version of the stock Envoy, as the binary itself says it. */
export async function envoyVersion(path: string): Promise<string> {
  const { stdout } = await sh([path, "--version"]);
  return /\/(\d+\.\d+\.\d+)\//.exec(stdout)?.[1] ?? stdout.trim();
}

export function readText(path: string): string {
  return readFileSync(path, "utf8");
}
