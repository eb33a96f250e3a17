import { VmmeshError } from "../../../agent/core/errors.ts";
import { parseEnv } from "../../../agent/mesh/env.ts";
import { nodeOf } from "../../../agent/mesh/node.ts";
import { workloadOf } from "../../../agent/mesh/workload.ts";
import { parseYamlFields } from "../../../agent/mesh/yaml.ts";
import { parseAppTargets } from "../../../agent/telemetry/scrape.ts";
import type { Target } from "../target.ts";

const machine = {
  hostname: "vm1.example.com",
  addresses: [{ interface: "eth0", address: "10.0.0.9", family: 4, prefix: 24 }],
} as unknown as Parameters<typeof workloadOf>[0]["machine"];

export const target: Target = {
  about:
    "the files of a joined machine are refused by key and file, or make a workload whose node message can be written",
  covers: /\/agent\/(mesh|telemetry\/scrape|core)/,
  seeds: [
    "ISTIO_NAMESPACE='shop'\nISTIO_META_WORKLOAD_NAME='vm'\nCANONICAL_SERVICE='a'\nISTIO_METAJSON_LABELS='{\"app\":\"a\"}'\nPOD_NAMESPACE=x\nISTIO_META_POD_PORTS='[{\"name\":\"http\",\"containerPort\":80}]'\n\0VMMESH_FAILURE_POLICY='outbound:10.0.0.0/8:443=closed'\nISTIO_INBOUND_PORTS='80,443'\nISTIO_SERVICE_CIDR='10.0.0.0/8'\nSECRET_TTL=1h\n\0discoveryAddress: istiod.istio-system.svc:15012\nproxyMetadata: {ISTIO_META_DNS_CAPTURE: 'true'}\nreadinessProbe: {periodSeconds: 5, httpGet: {path: /h, port: 80, scheme: HTTPS, httpHeaders: [{name: a, value: b}]}}\n",
    'ISTIO_NAMESPACE=a\n\0ISTIO_PROMETHEUS_ANNOTATIONS=\'{"scrape":"true","port":"9090","targets":[{"port":1}]}\'\nISTIO_SVC_IP=10.0.0.1\n\0readinessProbe: {exec: {command: [a]}, failureThreshold: 0}\ndiscoveryAddress: \'[::1]:15012\'\n',
    "ISTIO_NAMESPACE=a\n\0VMMESH_KEY_KIND=rsa-2048\nINVALID_DROP=true\n\0readinessProbe: {grpc: {port: 1, service: x}}\nconcurrency: 2\n",
    "ISTIO_NAMESPACE=a\n\0\0readinessProbe: {tcpSocket: {port: 1}}\n",
  ],
  words: [
    "\0",
    "toString",
    "__proto__",
    "ISTIO_META_",
    "ISTIO_METAJSON_",
    "readinessProbe:",
    "{}",
    "[]",
    "null",
    "1e400",
    "-1",
    ": *",
  ],
  run(bytes) {
    const [cluster = "", sidecar = "", mesh = ""] = Buffer.from(bytes).toString().split("\0");
    try {
      const workload = workloadOf({
        clusterEnv: parseEnv(cluster, "cluster.env"),
        sidecarEnv: parseEnv(sidecar, "sidecar.env"),
        proxyConfig: parseYamlFields(mesh, "mesh.yaml", "BUNDLE_MALFORMED", "Make a new one."),
        machine,
      });
      parseAppTargets(workload.appMetrics);
      JSON.stringify(nodeOf(workload));
    } catch (thrown) {
      if (!(thrown instanceof VmmeshError) || thrown.code === "INTERNAL") throw thrown;
    }
  },
};
