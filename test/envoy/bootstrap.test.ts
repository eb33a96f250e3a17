import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type BootstrapInput, envoyArgv, renderBootstrap } from "../../agent/envoy/bootstrap.ts";
import { checkEnvoy } from "../../agent/envoy/version.ts";
import { linuxHost } from "../../agent/platform/linux.ts";
import { ENVOY_VERSIONS, fetchEnvoy } from "./fetch.ts";

const PLAIN: BootstrapInput = {
  node: {
    id: "sidecar~10.0.0.5~vm-1.default~default.svc.cluster.local",
    cluster: "details.default",
    metadata: {
      INSTANCE_IPS: "10.0.0.5",
      NAME: "vm-1",
      NAMESPACE: "default",
      SERVICE_ACCOUNT: "details",
      LABELS: { app: "details" },
      ENVOY_STATUS_PORT: 15021,
    },
  },
  adminSocket: "/run/vmmesh-envoy/admin.sock",
  adminSocketMode: 0o600,
  xdsSocket: "/run/vmmesh/xds.sock",
  sdsSocket: "/run/vmmesh/sds.sock",
  ipv6: false,
  lease: false,
};

const CASES: readonly { name: string; file: string; input: BootstrapInput }[] = [
  { name: "a machine with IPv4 only, everything closed", file: "plain.json", input: PLAIN },
  {
    name: "IPv6 too, a lease, a locality and an operator's wishes",
    file: "full.json",
    input: {
      ...PLAIN,
      node: { ...PLAIN.node, locality: { region: "eu", zone: "eu-1", subZone: "rack-7" } },
      adminSocketMode: 0o660,
      ipv6: true,
      lease: true,
      maxConnections: 20_000,
      runtime: { "envoy.reloadable_features.http_reject_path_with_fragment": "" },
      stats: {
        prefixes: ["cluster.outbound"],
        suffixes: ["x_total"],
        regexps: [".*retry.*"],
        tags: ["team"],
      },
    },
  },
];

describe("the bootstrap's golden files", () => {
  test.for(CASES)("$name", async ({ file, input }) => {
    await expect(`${JSON.stringify(renderBootstrap(input), null, 2)}\n`).toMatchFileSnapshot(
      `../golden/envoy/${file}`,
    );
  });
});

describe.for(ENVOY_VERSIONS)("Envoy %s", (version) => {
  let binary: string;
  let folder: string;
  beforeAll(async () => {
    binary = await fetchEnvoy(version);
    folder = await mkdtemp(join(tmpdir(), "vmmesh-bootstrap-"));
  });
  afterAll(() => rm(folder, { recursive: true }));

  test.for(CASES)("accepts the bootstrap and the command line: $name", async ({ file, input }) => {
    const bootstrap = join(folder, file);
    await writeFile(bootstrap, JSON.stringify(renderBootstrap(input)));
    const argv = envoyArgv({ binary, bootstrap, concurrency: 1, componentLogLevel: "config:info" });
    const { code, stdout, stderr } = await linuxHost().run({ argv: [...argv, "--mode", "validate"] });
    expect({
      code,
      stdout,
      warnings: stderr.split("\n").filter((line) => /^(warning|error|critical)/.test(line)),
    }).toEqual({
      code: 0,
      stdout: `configuration '${bootstrap}' OK\n`,
      warnings: [],
    });
  });

  test("is found, asked for its version and fit", async () => {
    const found = await checkEnvoy(linuxHost(), binary);
    expect(found.version.text).toBe(version);
  });
});
