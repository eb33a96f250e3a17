import { isDeepStrictEqual } from "node:util";
import { VmmeshError } from "../../../agent/core/errors.ts";
import { parseYamlFields, renderYaml } from "../../../agent/mesh/yaml.ts";
import { type Target, unlessRefused } from "../target.ts";

const parse = (text: string) => parseYamlFields(text, "mesh.yaml", "BUNDLE_MALFORMED", "Make a new one.");

export const target: Target = {
  about: "a YAML text is refused, or means what it means after it was written again",
  covers: /\/agent\/mesh\/|node_modules\/yaml\//,
  seeds: [
    'defaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n  proxyMetadata:\n    A: "1"\n  tracing: {}\n',
    "a: &x [1, 2.5e3, ~, true]\nb: *x\nc: |\n  text\n  more\nd: >-\n  folded\n",
    '{"a": [{"b": null}], "c": "\\u0041"}',
    "? [complex]\n: !!str 1\n---\nx: 0x1f\n...\n",
    "base: &b {x: 1}\nmore:\n  <<: *b\n  y: 2020-01-01\n",
  ],
  words: [
    "&a ",
    "*a",
    "<<: ",
    "!!binary ",
    "- ",
    ": ",
    "? ",
    "---\n",
    "|\n ",
    ">\n ",
    "[",
    "{",
    "%YAML 1.1\n",
    "\t",
    "#",
  ],
  run(bytes) {
    const fields = unlessRefused(
      () => parse(Buffer.from(bytes).toString()),
      (thrown) => thrown instanceof VmmeshError && thrown.code === "BUNDLE_MALFORMED",
    );
    if (fields === undefined) return;
    const again = parse(renderYaml(fields));
    if (!isDeepStrictEqual(again, fields)) throw new Error("it changed when it was written again");
  },
};
