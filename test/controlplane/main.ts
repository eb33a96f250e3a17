import { join } from "node:path";
import { parseArgs } from "node:util";
import { bundleFiles, writeBundle } from "./bundle.ts";
import type { MeshService } from "./resources.ts";
import { startControlPlane, type WorkloadGroup } from "./server.ts";

const USAGE = `usage: node test/controlplane/main.ts --listen IP:PORT --out DIR --group NAME:PORT:VIP… [--namespace N] [--access-log FILE]

Runs the embedded control plane until it is asked to stop (SIGTERM, SIGINT). Each --group makes a WorkloadGroup NAME with
a service account and an HTTP service of that name: VIP port 80 leads to port PORT of the group's machines. Its bundle is
written to DIR/NAME, for: vmmesh join --bundle DIR/NAME. One line of JSON on stdout tells when it serves.
`;

const { values } = parseArgs({
  options: {
    listen: { type: "string" },
    out: { type: "string" },
    group: { type: "string", multiple: true, default: [] },
    namespace: { type: "string", default: "default" },
    "access-log": { type: "string", default: "" },
  },
});
const { namespace, out } = values;
const listen = /^([\d.]+):(\d+)$/.exec(values.listen ?? "");
const groups = values.group.map((text) => /^([a-z0-9-]+):(\d+):([\d.]+)$/.exec(text));

if (listen === null || out === undefined || groups.length === 0 || groups.includes(null)) {
  process.stderr.write(USAGE);
  process.exit(2);
}

const wishes = groups.flatMap((match) => {
  const [, name = "", port = "", vip = ""] = match ?? [];
  return [{ name, port: Number(port), vip }];
});
const services = wishes.map(({ name, port, vip }): MeshService => {
  const ports = [{ name: "http", port: 80, targetPort: port, protocol: "http" as const }];
  return { name, namespace, vip, ports, selector: { app: name } };
});
const workloadGroups = wishes.map(({ name }): WorkloadGroup => {
  return { name, namespace, serviceAccount: name, labels: { app: name } };
});

const [, address = "", port = ""] = listen;
const plane = await startControlPlane({
  address,
  port: Number(port),
  services,
  groups: workloadGroups,
  accessLogFile: values["access-log"],
});
for (const { name, port: appPort } of wishes) {
  const files = bundleFiles({
    group: name,
    namespace,
    serviceAccount: name,
    labels: { app: name },
    ports: [{ name: "http", port: appPort }],
    clusterId: "Kubernetes",
    trustDomain: "cluster.local",
    rootCert: plane.rootCert,
    token: plane.mintToken({ namespace, serviceAccount: name }),
    discovery: { host: plane.serverName, port: plane.port, address },
  });
  await writeBundle(join(out, name), files);
}
console.log(
  JSON.stringify({
    listening: `${address}:${plane.port}`,
    bundles: wishes.map(({ name }) => join(out, name)),
  }),
);

const stop = (): void => void plane.stop();
process.once("SIGTERM", stop).once("SIGINT", stop);
