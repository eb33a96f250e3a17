/**
 * Compares our bundle with that of the real istioctl for one WorkloadGroup of a real cluster, file by file:
 *
 *   node test/kube/compare.ts ISTIOCTL KUBECONFIG NAMESPACE GROUP [REVISION]
 *
 * Lists whose order istioctl leaves to chance are sorted on both sides; tokens are compared by their claims but for times
 * and ids. Prints one line per file, exits 1 if one differs.
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { makeBundle } from "../../agent/kube/bundle.ts";
import { KubeClient } from "../../agent/kube/client.ts";
import { loadKubeconfig } from "../../agent/kube/kubeconfig.ts";
import { renderBundle } from "../../agent/mesh/bundle.ts";
import { linuxHost } from "../../agent/platform/linux.ts";

const [istioctl, kubeconfig, namespace, group, revision] = process.argv.slice(2);
if (istioctl === undefined || kubeconfig === undefined || namespace === undefined || group === undefined) {
  throw new Error("usage: node test/kube/compare.ts ISTIOCTL KUBECONFIG NAMESPACE GROUP [REVISION]");
}

const folder = mkdtempSync(`${tmpdir()}/vmmesh-compare-`);
try {
  const theirs = configure(istioctl, kubeconfig, namespace, group, revision);
  const ours = await make(kubeconfig, namespace, group, revision);
  let differences = 0;
  for (const name of ["cluster.env", "mesh.yaml", "hosts", "root-cert.pem", "istio-token"]) {
    const [a, b] = [theirs(name), ours(name)].map((text) => comparable(name, text));
    differences += a === b ? 0 : 1;
    console.log(a === b ? `same     ${name}` : `differs  ${name}\n--- istioctl\n${a}\n--- vmmesh\n${b}`);
  }
  process.exitCode = differences === 0 ? 0 : 1;
} finally {
  rmSync(folder, { recursive: true });
}

function configure(
  program: string,
  config: string,
  space: string,
  name: string,
  rev?: string,
): (file: string) => string {
  const args = [
    "x",
    "workload",
    "entry",
    "configure",
    "--kubeconfig",
    config,
    "--name",
    name,
    "-n",
    space,
    "-o",
    folder,
  ];
  const more = [
    "--clusterID",
    "Kubernetes",
    "--autoregister",
    "--internalIP",
    "10.10.10.10",
    "--revision",
    rev ?? "default",
  ];
  execFileSync(program, [...args, ...more], { stdio: ["ignore", "ignore", "inherit"] });
  return (file) => readFileSync(`${folder}/${file}`, "utf8");
}

async function make(
  config: string,
  space: string,
  name: string,
  rev?: string,
): Promise<(file: string) => string> {
  const access = await loadKubeconfig(linuxHost(), { path: config, env: {}, home: "/", uid: 0 });
  await using client = new KubeClient(access);
  const bundle = await makeBundle(client, {
    group: await client.get({ kind: "WorkloadGroup", name, namespace: space }),
    tokenSeconds: 3600,
    clusterId: "Kubernetes",
    internalIp: "10.10.10.10",
    ...(rev === undefined ? {} : { revision: rev }),
  });
  const files = renderBundle(bundle);
  return (file) => files.get(file)?.text ?? "";
}

function comparable(file: string, text: string): string {
  if (file === "cluster.env") {
    return text.replace(
      /^(ISTIO_INBOUND_PORTS)='(.*)'$/m,
      (_, key: string, list: string) => `${key}='${list.split(",").sort().join(",")}'`,
    );
  }
  if (file !== "istio-token") return text;
  const claims = JSON.parse(Buffer.from(text.split(".")[1] ?? "", "base64url").toString()) as Record<
    string,
    unknown
  >;
  const { iat, exp, nbf: _nbf, jti: _jti, ...rest } = claims;
  return JSON.stringify({ ...rest, seconds: Number(exp) - Number(iat) });
}
