import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { fileURLToPath } from "node:url";
import { exclusively } from "./lock.ts";
import {
  CACHE,
  CALICO,
  CALICO_BIN,
  CRDS,
  ENVOY,
  GO,
  GO_VERSION,
  ISTIO,
  ISTIO_API,
  ISTIO_BIN,
  KUBE_BIN,
  KUBERNETES,
  PEER_BOOTSTRAP,
  RELEASE,
  TAILSCALE,
  treeOf,
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
  // For tests that look from outside a machine.
  "bind9-dnsutils",
  "ipset",
  "socat",
  "tcpdump",
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
  "dig",
  "ipset",
  "socat",
  "tcpdump",
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
export function build(): Promise<void> {
  return exclusively("build", buildAll);
}

async function buildAll(): Promise<void> {
  mkdirSync(CACHE, { recursive: true });
  // Of an earlier build that was killed.
  for (const name of readdirSync(CACHE))
    if (/^\.(part|kubernetes|calico)-/.test(name)) await removeTree(`${CACHE}/${name}`);
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
  await debian(RELEASE);
}

/** Path of the tree that machines of this release are laid over, made if it is missing. */
export async function machineTree(release: string): Promise<string> {
  if (!/^[a-z]+$/.test(release)) throw new Error(`${release} is no name of a Debian release`);
  if (!existsSync(treeOf(release))) await exclusively("build", () => debian(release));
  return treeOf(release);
}

/** debootstrap mounts /proc in its tree: so that this goes with it, and all that it runs with us, whenever we are killed. */
const CONFINED = [
  ...["setpriv", "--pdeathsig", "KILL", "--"],
  ...["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"],
];

/** Removes a tree of a killed build, with nothing of this machine still mounted in it. */
async function removeTree(path: string): Promise<void> {
  const mounts = readFileSync("/proc/self/mounts", "utf8")
    .split("\n")
    .map((line) => line.split(" ")[1] ?? "")
    .filter((at) => at.startsWith(`${path}/`));
  for (const at of mounts.reverse()) await sh(["umount", at]);
  rmSync(path, { recursive: true, force: true });
}

async function debian(release: string): Promise<void> {
  await part(treeOf(release), `a tree of Debian ${release} for the machines (1 minute)`, async (to) => {
    const packages = `--include=${IN_MACHINE.join(",")}`;
    await sh([...CONFINED, "debootstrap", "--variant=minbase", packages, release, to]);
    await sh(["chroot", to, "apt-get", "clean"]);
    await sh(["chroot", to, "systemctl", "disable", "ssh.service"], { allowFail: true });
    rmSync(`${to}/etc/machine-id`, { force: true });
    rmSync(`${to}/etc/resolv.conf`, { force: true });
  });
}

/**
 * Path of what these packages add to the tree of a release: an upper layer of its own, made once. Nothing of them starts by
 * itself in a machine.
 */
export async function packageLayer(release: string, packages: readonly string[]): Promise<string> {
  const layer = `${await machineTree(release)}+${[...packages].sort().join("+")}`;
  const script = `
mount -t overlay overlay -o lowerdir=$TREE,upperdir=$TO/upper,workdir=$TO/work $TO/root
mount -t proc proc $TO/root/proc
cp -L /etc/resolv.conf $TO/root/etc/resolv.conf
printf '#!/bin/sh\nexit 101\n' > $TO/root/usr/sbin/policy-rc.d
chmod 755 $TO/root/usr/sbin/policy-rc.d
chroot $TO/root apt-get update -qq
DEBIAN_FRONTEND=noninteractive chroot $TO/root apt-get install -y -qq --no-install-recommends "$@"
chroot $TO/root apt-get clean
rm -rf $TO/root/usr/sbin/policy-rc.d $TO/root/etc/resolv.conf $TO/root/var/lib/apt/lists/*
umount $TO/root/proc $TO/root
[ ! -d $TO/upper/etc/systemd/system ] || find $TO/upper/etc/systemd/system -type l -delete`;
  const make = () =>
    part(layer, `${packages.join(", ")} for the machines`, async (to) => {
      for (const folder of ["upper", "work", "root"]) mkdirSync(`${to}/${folder}`, { recursive: true });
      await sh([...CONFINED, "sh", "-ec", script, "sh", ...packages], {
        env: { TREE: treeOf(release), TO: to },
      });
      rmSync(`${to}/work`, { recursive: true, force: true });
    });
  if (!existsSync(layer)) await exclusively("build", make);
  return `${layer}/upper`;
}

/** Path of a program that writes what Tailscale writes into netfilter, built if it is missing. */
export async function tailscaleWriter(): Promise<string> {
  const make = () =>
    part(TAILSCALE, "Tailscale's writer of netfilter (1 minute)", async (to) => {
      const module = fileURLToPath(new URL("./tailscale", import.meta.url));
      await go(["build", "-trimpath", "-ldflags=-s -w", "-o", `${to}/`, "."], {}, module);
    });
  if (!existsSync(TAILSCALE)) await exclusively("build", make);
  return `${TAILSCALE}/tailscale`;
}

/**
 * Of Calico's module, as they are. `felix/iptables` wants of `felix/logutils` but the one file; the others want
 * `projectcalico/api`, which the Go proxy has not.
 */
const CALICO_PARTS = [
  "felix/iptables",
  "felix/environment",
  "felix/netlinkshim",
  "felix/proto",
  "felix/logutils/summary.go",
  "libcalico-go/lib/set",
  "libcalico-go/lib/logutils",
  "libcalico-go/lib/prometheus",
];

/** Path of a program that keeps its rules first with Calico's own code, built if it is missing. */
export async function calicoKeeper(): Promise<string> {
  const make = () =>
    part(CALICO_BIN, "Calico's keeper of netfilter (1 minute)", async (to) => {
      const module = mkdtempSync(`${CACHE}/.calico-`);
      try {
        const calico = await moduleFolder(`github.com/projectcalico/calico@${CALICO}`);
        cpSync(new URL("./calico", import.meta.url), module, { recursive: true });
        for (const name of CALICO_PARTS)
          cpSync(`${calico}/${name}`, `${module}/${name}`, { recursive: true });
        await go(["build", "-trimpath", "-ldflags=-s -w", "-o", `${to}/`, "./keeper"], {}, module);
      } finally {
        await sh(["chmod", "-R", "u+w", module]);
        rmSync(module, { recursive: true, force: true });
      }
    });
  if (!existsSync(CALICO_BIN)) await exclusively("build", make);
  return `${CALICO_BIN}/keeper`;
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
    await install(DEBIAN);
  } finally {
    if (ours) rmSync(policy);
  }
}

/** Go since 1.21 fetches the toolchain that a module names by itself, as a module. */
async function fetchesToolchains(program: string): Promise<boolean> {
  const { code, stdout } = await sh([program, "version"], { allowFail: true });
  const [, minor] = / go1\.(\d+)/.exec(stdout) ?? [];
  return code === 0 && Number(minor) >= 21;
}

/** A Go that is new enough: this machine's, or one that Debian's older Go has fetched as a module, checked as each module. */
async function goProgram(): Promise<string> {
  for (const program of ["go", "/usr/local/go/bin/go"]) if (await fetchesToolchains(program)) return program;
  if (!existsSync("/usr/bin/go")) {
    say("installing Go (apt)");
    await install(["golang-go"]);
  }
  if (await fetchesToolchains("/usr/bin/go")) return "/usr/bin/go";
  await part(GO, "a newer Go", async (to) => {
    const platform = `linux-${process.arch === "x64" ? "amd64" : process.arch}`;
    const module = `golang.org/toolchain@v0.0.1-go${GO_VERSION}.${platform}`;
    const { stdout } = await sh(["/usr/bin/go", "mod", "download", "-json", module], {
      env: { GOFLAGS: "" },
    });
    const { Dir } = JSON.parse(stdout) as { Dir: string };
    await sh(["cp", "-r", "--no-preserve=mode", `${Dir}/.`, to]);
    // A module's files are not executable, and no module may hold another: Go packs its own so, and so undoes it.
    await sh(["chmod", "-R", "+x", `${to}/bin`, `${to}/pkg/tool`]);
    await sh(["find", to, "-name", "_go.mod", "-execdir", "mv", "_go.mod", "go.mod", ";"]);
  });
  return `${GO}/bin/go`;
}

async function go(
  args: readonly string[],
  env: Record<string, string> = {},
  cwd?: string,
): Promise<{ stdout: string }> {
  return sh([await goProgram(), ...args], {
    env: { CGO_ENABLED: "0", GOTOOLCHAIN: "auto", GOFLAGS: "-buildvcs=false", ...env },
    timeoutMs: 40 * 60_000,
    ...(cwd === undefined ? {} : { cwd }),
  });
}

async function install(names: readonly string[]): Promise<void> {
  await sh(["apt-get", "update", "-qq"]);
  await sh(["apt-get", "install", "-y", "-qq", "--no-install-recommends", ...names], {
    env: { DEBIAN_FRONTEND: "noninteractive" },
  });
}

/** Where a Go module lies, read-only. */
async function moduleFolder(module: string): Promise<string> {
  const { stdout } = await go(["mod", "download", "-json", module]);
  const { Dir } = JSON.parse(stdout) as { Dir: string };
  return Dir;
}

/** One file of a Go module. */
async function moduleFile(module: string, path: string, to: string): Promise<void> {
  const folder = await moduleFolder(module);
  rmSync(to, { recursive: true });
  cpSync(`${folder}/${path}`, to);
}

async function part(path: string, what: string, make: (to: string) => Promise<void>): Promise<void> {
  if (existsSync(path)) return;
  say(`building ${what}`);
  const aside = mkdtempSync(`${CACHE}/.part-`);
  try {
    await make(aside);
    // mkdtemp's folder is its owner's only; users inside a machine read from it as well.
    chmodSync(aside, 0o755);
    renameSync(aside, path);
  } catch (thrown) {
    await removeTree(aside);
    throw thrown;
  }
  say(`built ${what}`);
}

export function isBuilt(): boolean {
  return [ISTIO_BIN, KUBE_BIN, CRDS, PEER_BOOTSTRAP, treeOf(RELEASE)].every((path) => existsSync(path));
}

/** Version of the stock Envoy, as the binary itself says it. */
export async function envoyVersion(path: string): Promise<string> {
  const { stdout } = await sh([path, "--version"]);
  return /\/(\d+\.\d+\.\d+)\//.exec(stdout)?.[1] ?? stdout.trim();
}
