import { isDeepStrictEqual } from "node:util";
import { gzipSync } from "node:zlib";
import { VmmeshError } from "../../../agent/core/errors.ts";
import { readBundle, renderBundle, renderBundleFile } from "../../../agent/mesh/bundle.ts";
import type { Bundle } from "../../../agent/mesh/types.ts";
import type { Target } from "../target.ts";

const ROOT = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
const BUNDLE: Bundle = {
  clusterEnv: new Map([
    ["ISTIO_NAMESPACE", "shop"],
    ["POD_NAMESPACE", "shop"],
  ]),
  proxyConfig: { discoveryAddress: "istiod.istio-system.svc:15012", proxyMetadata: { A: "b" } },
  rootCert: ROOT,
  token: "e30.e30.c2ln",
  hosts: new Map([["istiod.istio-system.svc", ["10.0.0.1", "lb.example.com"]]]),
  meshCidrs: ["10.96.0.0/12"],
  refusedKeys: [],
};

function tar(files: Iterable<readonly [string, string]>): Uint8Array {
  const blocks = [...files].flatMap(([name, text]) => {
    const header = Buffer.alloc(512);
    header.write(name);
    header.write(text.length.toString(8).padStart(11, "0"), 124);
    header.write("0ustar", 156);
    header.write("ustar", 257);
    const body = Buffer.alloc(Math.ceil(text.length / 512) * 512);
    body.write(text);
    return [header, body];
  });
  return Buffer.concat([...blocks, Buffer.alloc(1024)]);
}
const files = [...renderBundle(BUNDLE)].map(([name, { text }]) => [name, text] as const);

const read = (bytes: Uint8Array): Promise<Bundle> =>
  readBundle({ list: async () => undefined, read: async () => bytes }, "/b");

export const target: Target = {
  about: "a bundle in one file is refused, or is the same after it was written and read again",
  covers: /\/agent\/mesh\//,
  seeds: [renderBundleFile(BUNDLE), tar(files), tar(files.slice(0, 3)), gzipSync(tar(files))],
  words: [
    "ustar",
    "hosts",
    "mesh.yaml",
    "cluster.env",
    '"__proto__":',
    "00000000017",
    "77777777777",
    "\n10.0.0.1 a",
  ],
  async run(bytes) {
    let bundle: Bundle;
    try {
      bundle = await read(bytes);
    } catch (thrown) {
      if (thrown instanceof VmmeshError && /^(BUNDLE|ENV_FILE)_MALFORMED$/.test(thrown.code)) return;
      throw thrown;
    }
    const again = await read(Buffer.from(renderBundleFile(bundle)));
    if (!isDeepStrictEqual({ ...again, refusedKeys: bundle.refusedKeys }, bundle))
      throw new Error("it changed when it was written again");
  },
};
