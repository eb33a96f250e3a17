import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot } from "../lab/acceptance.ts";
import { Lab, type Machine } from "../lab/lab.ts";
import { ADDRESS } from "../lab/parts.ts";
import { packageFile } from "./package.ts";

/**
 * Every bad input of the join: one clear error (code, reason, next step), the documented exit status, and the machine as
 * it was. The real istiod and API server refuse, nothing stands in for them.
 */
let lab: Lab;
let machine: Machine;
let good: string;

/** What `vmmesh` may leave behind if it leaves anything. */
async function traces(): Promise<string> {
  const { stdout } = await machine.exec(
    "ls -d /etc/vmmesh /var/lib/vmmesh /var/lib/vmmesh-host /run/vmmesh /run/vmmesh-envoy /run/vmmesh-capture.json 2>/dev/null; " +
      "iptables-save | grep -i 'istio\\|vmmesh'; ip6tables-save | grep -i 'istio\\|vmmesh'; nft list tables | grep vmmesh; " +
      "systemctl list-units 'vmmesh*' --state=active,activating,failed --no-legend; systemctl list-unit-files 'vmmesh*' --state=enabled --no-legend",
    { allowFail: true },
  );
  return stdout;
}

/** Puts a bundle like the good one at /root/b, changed by `change`, which gets its folder. */
function bundle(change: (folder: string) => void = () => undefined): void {
  const folder = `${machine.root}/root/b`;
  rmSync(folder, { recursive: true, force: true });
  cpSync(good, folder, { recursive: true });
  change(folder);
}

const edit = (path: string, change: (text: string) => string): void =>
  writeFileSync(path, change(readFileSync(path, "utf8")));

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("clumsy");
  machine = await lab.vm("clumsy", { deb: packageFile() });
  await defineWorkload(lab, "clumsy", 9080);
  good = await istioctlBundle(lab, "clumsy");
  for (const user of ["admin", "reader", "nobody"] as const)
    machine.putFile(`/root/${user}`, lab.kubeconfigText(user), 0o600);
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("clumsy");
});

beforeEach(() => bundle());

interface Case {
  readonly name: string;
  readonly prepare?: () => void | Promise<void>;
  readonly command: string;
  readonly code: string;
  readonly exit: number;
  /** Words that the error must say. */
  readonly says?: string;
  readonly after?: string;
}

const JOIN = "vmmesh join --bundle /root/b --ready-within 8";
const FROM_CLUSTER = (user: string, more = ""): string =>
  `vmmesh join --namespace default --workload-group clumsy --kubeconfig /root/${user} ${more}`;

const CASES: readonly Case[] = [
  {
    name: "not root",
    command: `cp -r /root/b /tmp/b; chmod -R a+rX /tmp/b; setpriv --reuid=65534 --regid=65534 --clear-groups vmmesh join --bundle /tmp/b`,
    code: "NOT_ROOT",
    exit: 3,
    says: "sudo",
  },
  {
    name: "no systemd",
    command: `unshare -m sh -c 'mount -t tmpfs none /run/systemd && ${JOIN}'`,
    code: "NO_SYSTEMD",
    exit: 3,
    says: "run --foreground",
  },
  {
    name: "no Envoy",
    command: `mv /usr/local/bin/envoy /root/envoy; ${JOIN}; s=$?; mv /root/envoy /usr/local/bin/envoy; exit $s`,
    code: "ENVOY_MISSING",
    exit: 3,
    says: "--envoy",
  },
  {
    name: "an Envoy that is too old",
    prepare: () =>
      machine.putFile(
        "/opt/old-envoy",
        "#!/bin/sh\necho 'envoy  version: abc/1.30.4/Clean/RELEASE/BoringSSL'\n",
        0o755,
      ),
    command: `${JOIN} --envoy /opt/old-envoy`,
    code: "ENVOY_TOO_OLD",
    exit: 3,
    says: "1.30.4",
  },
  {
    name: "an istiod that is not there",
    command: `${JOIN} --istiod-address 10.99.0.77`,
    code: "ISTIOD_UNREACHABLE",
    exit: 4,
    says: "10.99.0.77:15012",
  },
  {
    name: "an address where nothing listens on istiod's port",
    command: `${JOIN} --istiod-address 127.0.0.1`,
    code: "ISTIOD_UNREACHABLE",
    exit: 4,
    says: "127.0.0.1:15012",
  },
  {
    name: "a server that is not istiod",
    prepare: () =>
      bundle((at) =>
        edit(`${at}/mesh.yaml`, (text) =>
          text.replace("istiod.istio-system.svc:15012", "istiod.istio-system.svc:6443"),
        ),
      ),
    command: JOIN,
    code: "ISTIOD_UNTRUSTED",
    exit: 4,
    says: "10.99.0.2:6443",
  },
  {
    name: "an expired token",
    prepare: () =>
      bundle((at) =>
        writeFileSync(
          `${at}/istio-token`,
          lab.signToken({ namespace: "default", serviceAccount: "clumsy", expiresInSec: -3600 }),
        ),
      ),
    command: JOIN,
    code: "TOKEN_EXPIRED",
    exit: 4,
    says: "expired 1h",
  },
  {
    name: "a token for another audience",
    prepare: () =>
      bundle((at) =>
        writeFileSync(
          `${at}/istio-token`,
          lab.signToken({
            namespace: "default",
            serviceAccount: "clumsy",
            audience: "vault",
            expiresInSec: 3600,
          }),
        ),
      ),
    command: JOIN,
    code: "TOKEN_AUDIENCE",
    exit: 4,
    says: "vault",
  },
  {
    name: "a token that is none",
    prepare: () => bundle((at) => writeFileSync(`${at}/istio-token`, "hello")),
    command: JOIN,
    code: "BUNDLE_MALFORMED",
    exit: 2,
  },
  {
    name: "an istiod of another revision than the bundle's",
    prepare: () =>
      bundle((at) =>
        edit(`${at}/mesh.yaml`, (text) =>
          text.replace("istiod.istio-system.svc", "istiod-canary.istio-system.svc"),
        ),
      ),
    command: `${JOIN} --istiod-address ${ADDRESS.controlPlane}`,
    code: "ISTIOD_UNTRUSTED",
    exit: 4,
    says: "is not istiod-canary.istio-system.svc",
  },
  {
    name: "a cluster id that istiod does not know",
    prepare: () =>
      bundle((at) =>
        edit(`${at}/cluster.env`, (text) =>
          text.replace("ISTIO_META_CLUSTER_ID='Kubernetes'", "ISTIO_META_CLUSTER_ID='elsewhere'"),
        ),
      ),
    command: JOIN,
    code: "IDENTITY_REFUSED",
    exit: 4,
    says: "ISTIO_META_CLUSTER_ID",
  },
  {
    name: "a token with a forged signature",
    prepare: () => bundle((at) => edit(`${at}/istio-token`, (text) => `${text.slice(0, -10)}AAAAAAAAAA`)),
    command: JOIN,
    code: "IDENTITY_REFUSED",
    exit: 4,
  },
  {
    name: "a token of a service account that does not exist",
    prepare: () =>
      bundle((at) =>
        writeFileSync(
          `${at}/istio-token`,
          lab.signToken({ namespace: "default", serviceAccount: "nobody-here", expiresInSec: 3600 }),
        ),
      ),
    command: JOIN,
    code: "IDENTITY_REFUSED",
    exit: 4,
  },
  {
    name: "a token from the future: the clock is off by hours",
    prepare: () => bundle((at) => writeFileSync(`${at}/istio-token`, tokenOfTheFuture())),
    command: JOIN,
    code: "CLOCK_OFF",
    exit: 4,
    says: "behind",
  },
  {
    name: "a certificate authority of another mesh",
    prepare: async () => {
      await machine.exec("openssl version >/dev/null 2>&1 || true", { allowFail: true });
      bundle((at) =>
        writeFileSync(`${at}/root-cert.pem`, readFileSync(`/run/vmmesh-lab/${lab.id}/ca.crt`, "utf8")),
      );
    },
    command: JOIN,
    code: "ISTIOD_UNTRUSTED",
    exit: 4,
    says: "root-cert.pem",
  },
  {
    name: "rights to read only",
    command: FROM_CLUSTER("reader", "--service clumsy2 --port http:9080"),
    code: "KUBE_FORBIDDEN",
    exit: 5,
    says: "create",
  },
  { name: "no rights at all", command: FROM_CLUSTER("nobody"), code: "KUBE_FORBIDDEN", exit: 5, says: "get" },
  {
    name: "a namespace that does not exist",
    command: "vmmesh join --namespace nowhere --kubeconfig /root/admin",
    code: "KUBE_NOT_FOUND",
    exit: 5,
    says: "nowhere",
  },
  {
    name: "a kubeconfig that does not exist",
    command: "vmmesh join --namespace default --kubeconfig /root/none",
    code: "KUBECONFIG_MISSING",
    exit: 5,
    says: "/root/none",
  },
  {
    name: "a service account other than the group's",
    command: FROM_CLUSTER("admin", "--service-account other"),
    code: "KUBE_CONFLICT",
    exit: 5,
    says: "other",
  },
  {
    name: "a port without its protocol",
    command: FROM_CLUSTER("admin", "--service x --port 9080"),
    code: "PORT_WITHOUT_PROTOCOL",
    exit: 2,
    says: "metrics",
  },
  {
    name: "a bundle that is not there",
    command: "vmmesh join --bundle /root/nothing",
    code: "BUNDLE_MALFORMED",
    exit: 2,
    says: "/root/nothing",
  },
  {
    name: "a bundle without its root certificate",
    prepare: () => bundle((at) => rmSync(`${at}/root-cert.pem`)),
    command: JOIN,
    code: "BUNDLE_MALFORMED",
    exit: 2,
    says: "root-cert.pem",
  },
  {
    name: "an empty root certificate",
    prepare: () => bundle((at) => writeFileSync(`${at}/root-cert.pem`, "")),
    command: JOIN,
    code: "BUNDLE_MALFORMED",
    exit: 2,
    says: "root-cert.pem",
  },
  {
    name: "a broken line in cluster.env",
    prepare: () => bundle((at) => edit(`${at}/cluster.env`, (text) => `${text}ISTIO_X='open\n`)),
    command: JOIN,
    code: "ENV_FILE_MALFORMED",
    exit: 2,
    says: "line",
  },
  {
    name: "broken YAML in mesh.yaml",
    prepare: () => bundle((at) => writeFileSync(`${at}/mesh.yaml`, "defaultConfig: [oops\n")),
    command: JOIN,
    code: "BUNDLE_MALFORMED",
    exit: 2,
    says: "mesh.yaml",
  },
  {
    name: "bundle and kubeconfig at once",
    command: `${JOIN} --kubeconfig /root/admin`,
    code: "USAGE",
    exit: 2,
    says: "exclude each other",
  },
  {
    name: "neither namespace nor bundle",
    command: "vmmesh join",
    code: "USAGE",
    exit: 2,
    says: "--namespace",
  },
  {
    name: "an Envoy that cannot start",
    prepare: () =>
      machine.putFile(
        "/opt/dead-envoy",
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'envoy  version: abc/1.40.0/Clean/RELEASE/BoringSSL' && exit 0\nexit 1\n",
        0o755,
      ),
    command: `${JOIN} --envoy /opt/dead-envoy`,
    code: "NOT_READY",
    exit: 4,
  },
  { name: "leave on a machine that is not joined", command: "vmmesh leave", code: "NOT_JOINED", exit: 2 },
  { name: "status on a machine that is not joined", command: "vmmesh status", code: "NOT_JOINED", exit: 2 },
];

function tokenOfTheFuture(): string {
  const [header, payload, signature] = lab
    .signToken({ namespace: "default", serviceAccount: "clumsy", expiresInSec: 5 * 3600 })
    .split(".");
  const claims = JSON.parse(Buffer.from(payload ?? "", "base64url").toString()) as Record<string, unknown>;
  const later = Math.floor(Date.now() / 1000) + 4 * 3600;
  return [
    header,
    Buffer.from(JSON.stringify({ ...claims, iat: later, nbf: later })).toString("base64url"),
    signature,
  ].join(".");
}

describe("bad input is one clear error and leaves the machine as it was", () => {
  test.for(CASES)("$name", async ({ prepare, command, code, exit, says }) => {
    await prepare?.();
    const result = await machine.exec(command, { allowFail: true });
    const complaint = result.stderr.slice(Math.max(0, result.stderr.indexOf("vmmesh: ")));
    expect(complaint).toContain(`vmmesh: ${code}: `);
    expect(result.code).toBe(exit);
    if (says !== undefined) expect(complaint).toContain(says);
    expect(complaint).toContain("  next: ");
    expect(complaint.split("\n").filter((line) => line.startsWith("vmmesh: "))).toHaveLength(1);
    expect(await traces()).toBe("");
  });

  test("two joins at once: one wins, the other says so, nothing is half-done", async () => {
    const results = await Promise.all(
      [1, 2].map(() => machine.exec("vmmesh join --bundle /root/b", { allowFail: true })),
    );
    expect(results.map(({ code }) => code).sort()).toEqual([0, 6]);
    expect(results.find(({ code }) => code === 6)?.stderr).toMatch(/vmmesh: (BUSY|ALREADY_JOINED): /);
    await machine.exec("vmmesh leave --now");
    expect(await traces()).toBe("");
  });
});
