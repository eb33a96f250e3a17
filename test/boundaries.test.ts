import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";

/** Who may import whom; the same table stands in ARCHITECTURE.md. A room missing here may not exist. */
const MAY_IMPORT: Record<string, readonly string[]> = {
  core: [],
  proto: [],
  platform: ["core"],
  health: ["core", "platform"],
  telemetry: ["core", "platform", "health", "proto"],
  mesh: ["core", "platform"],
  kube: ["core", "platform", "mesh"],
  iptables: ["core", "platform", "health"],
  identity: ["core", "platform", "health", "proto"],
  sds: ["core", "platform", "health", "proto", "identity"],
  xds: ["core", "platform", "health", "proto"],
  envoy: ["core", "platform", "health"],
  dns: ["core", "platform", "health"],
  daemon: [
    "core",
    "platform",
    "health",
    "telemetry",
    "mesh",
    "kube",
    "iptables",
    "identity",
    "sds",
    "xds",
    "envoy",
    "dns",
  ],
  cli: ["core", "platform", "daemon", "telemetry", "mesh", "kube", "iptables", "envoy"],
};

/** Modules that reach the machine; only the seam has them. Framing over sockets that the seam made is no reach. */
const EFFECTS = /^node:(fs|fs\/promises|net|tls|dgram|child_process|dns|dns\/promises|http2|os)$/;
const EFFECTS_ALLOWED: Record<string, readonly string[]> = {
  "health/probes.ts": ["node:http2", "node:tls"],
  "telemetry/tls.ts": ["node:tls"],
};

interface Import {
  readonly file: string;
  readonly room: string;
  readonly from: string;
  readonly typeOnly: boolean;
}

function importsOf(folder: string): Import[] {
  const files = readdirSync(folder, { recursive: true, encoding: "utf8" }).filter(
    (name) => name.endsWith(".ts") && !name.endsWith(".test.ts"),
  );
  return files.flatMap((file) => {
    const text = readFileSync(`${folder}/${file}`, "utf8");
    const room = file.includes("/") ? (file.split("/")[0] ?? "") : "main";
    return [
      ...text.matchAll(
        /^(?:import|export)\s+(type\s)?[^;]*?from "([^"]+)"|import\("([^"]+)"\)|^import "([^"]+)"/gm,
      ),
    ].map((match) => ({
      file,
      room,
      from: match[2] ?? match[3] ?? match[4] ?? "",
      typeOnly: match[1] !== undefined,
    }));
  });
}

const imports = importsOf("agent");

describe("the rooms", () => {
  test("each room imports only what the table allows", () => {
    const trespasses = imports
      .filter(({ room, from }) => room !== "main" && from.startsWith("../"))
      .map((found) => ({ ...found, to: new URL(found.from, `file:///${found.file}`).pathname.split("/")[1] }))
      .filter(({ room, to = "" }) => to !== room && !(MAY_IMPORT[room] ?? []).includes(to))
      .map(({ file, from }) => `${file} imports ${from}`);
    expect(trespasses).toEqual([]);
  });

  test("only the seam reaches the machine", () => {
    const reaches = imports
      .filter(({ room, from, typeOnly }) => room !== "platform" && !typeOnly && EFFECTS.test(from))
      .filter(({ file, from }) => !(EFFECTS_ALLOWED[file] ?? []).includes(from))
      .map(({ file, from }) => `${file} imports ${from}`);
    expect(reaches).toEqual([]);
  });

  test("the resident agent loads nothing that only the command line needs", () => {
    const seen = new Set<string>();
    const walk = (file: string): void => {
      if (seen.has(file)) return;
      seen.add(file);
      const folder = file.includes("/") ? file.slice(0, file.lastIndexOf("/")) : ".";
      const text = readFileSync(`agent/${file}`, "utf8");
      for (const [, typeOnly, from = ""] of text.matchAll(
        /^(?:import|export)\s+(type\s)?[^;]*?from "([^"]+)"/gm,
      )) {
        if (typeOnly !== undefined) continue;
        if (from.startsWith(".")) walk(new URL(from, `file:///${folder}/`).pathname.slice(1));
        else seen.add(from);
      }
    };
    walk("agentd.ts");
    const heavy = ["yargs", "zod", "undici", "execa"].filter((name) => seen.has(name));
    expect(heavy).toEqual([]);
    expect([...seen].filter((file) => file.startsWith("kube/"))).toEqual([]);
  });
});
