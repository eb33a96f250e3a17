import { readFileSync } from "node:fs";
import { gzipSync } from "node:zlib";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { VmmeshError } from "../core/errors.ts";
import { readBundle, renderBundle, renderBundleFile, writeBundle } from "./bundle.ts";
import type { Bundle } from "./types.ts";

const NAMES = ["mesh.yaml", "cluster.env", "root-cert.pem", "istio-token", "hosts"] as const;
const golden = Object.fromEntries(
  NAMES.map((name) => [name, readFileSync(new URL(`./golden/foo/${name}`, import.meta.url), "utf8")]),
);

/** The golden directory with some files changed; `undefined` takes one away. */
function directory(change: Readonly<Record<string, string | undefined>> = {}): MemoryFiles {
  const files = Object.entries({ ...golden, ...change }).flatMap(([name, text]) =>
    text === undefined ? [] : [[`/b/${name}`, text] as const],
  );
  return new MemoryFiles(Object.fromEntries(files));
}

/** A ustar archive as `tar -C DIR -cf - .` makes it. */
function tar(files: Readonly<Record<string, string>>): Buffer {
  const blocks = Object.entries(files).flatMap(([name, text]) => {
    const header = Buffer.alloc(512);
    header.write(`./${name}`, 0);
    header.write(Buffer.byteLength(text).toString(8).padStart(11, "0"), 124);
    header.write("0", 156);
    header.write("ustar\0", 257);
    const body = Buffer.alloc(Math.ceil(Buffer.byteLength(text) / 512) * 512);
    body.write(text);
    return [header, body];
  });
  return Buffer.concat([...blocks, Buffer.alloc(1024)]);
}

async function fileOf(data: string | Uint8Array): Promise<MemoryFiles> {
  const files = new MemoryFiles({ "/x/other": "" });
  await files.writeAtomic("/x/bundle", data, { mode: 0o600 });
  return files;
}

async function failure(work: Promise<unknown>): Promise<VmmeshError> {
  const thrown = await work.then(
    () => undefined,
    (error: unknown) => error,
  );
  if (thrown instanceof VmmeshError) return thrown;
  throw new Error(`no VmmeshError but ${String(thrown)}`);
}

describe("a bundle of istioctl", () => {
  test("is read from its directory", async () => {
    const bundle = await readBundle(directory(), "/b");
    expect(bundle.clusterEnv.get("ISTIO_SERVICE")).toBe("foo.bar");
    expect(bundle.proxyConfig["readinessProbe"]).toEqual({ httpGet: { port: 8080 } });
    expect(bundle.hosts).toEqual(new Map([["istiod-rev-1.istio-system.svc", ["10.10.10.11"]]]));
    expect(bundle.token).toBe(golden["istio-token"]);
    expect(bundle.refusedKeys).toEqual([]);
  });

  test("is written as istioctl wrote it, byte for byte, with modes that keep the token", async () => {
    const rendered = renderBundle(await readBundle(directory(), "/b"));
    expect(Object.fromEntries([...rendered].map(([name, { text }]) => [name, text]))).toEqual(golden);
    expect(Object.fromEntries([...rendered].map(([name, { mode }]) => [name, mode.toString(8)]))).toEqual({
      "mesh.yaml": "644",
      "cluster.env": "644",
      "root-cert.pem": "644",
      "istio-token": "600",
      hosts: "644",
    });
  });

  test.for([
    { name: "a tar", data: tar(golden) },
    { name: "a gzipped tar", data: gzipSync(tar(golden)) },
  ])("is read from $name", async ({ data }) => {
    expect(await readBundle(await fileOf(data), "/x/bundle")).toEqual(await readBundle(directory(), "/b"));
  });

  test.for([
    { name: "without a token", change: { "istio-token": undefined } },
    { name: "with an empty token", change: { "istio-token": "\n" } },
  ])("is read $name: the machine may have a certificate already", async ({ change }) => {
    expect(await readBundle(directory(change), "/b")).not.toHaveProperty("token");
  });

  test("keys that a root shell must not see are left out and named", async () => {
    const files = directory({
      "cluster.env": `${golden["cluster.env"]}NODE_OPTIONS='--require /x'\nLD_PRELOAD='/x'\n`,
    });
    const bundle = await readBundle(files, "/b");
    expect(bundle.refusedKeys).toEqual(["NODE_OPTIONS", "LD_PRELOAD"]);
    expect(renderBundle(bundle).get("cluster.env")?.text).toBe(golden["cluster.env"]);
  });
});

/** Nine levels of nine: 600 bytes that would become 387 million values. */
const BOMB = Array.from({ length: 9 }, (_, level) => {
  const item = level === 0 ? "x" : `*a${level - 1}`;
  return `a${level}: &a${level} [${Array(9).fill(item).join(", ")}]\n`;
}).join("");

describe("a malformed bundle is refused by file, line and next step:", () => {
  test.for([
    { name: "no file", change: { "mesh.yaml": undefined }, want: "/b: `mesh.yaml` is missing" },
    {
      name: "broken YAML",
      change: { "mesh.yaml": "defaultConfig:\n  a: 'x\n" },
      want: "/b/mesh.yaml, line 3: Missing closing",
    },
    // The fuzzing below met the first: the YAML reader threw a ReferenceError from deep inside.
    {
      name: "an alias of nothing",
      change: { "mesh.yaml": "a: *b\n" },
      want: "/b/mesh.yaml: Unresolved alias",
    },
    {
      name: "keys that are maps, in each other",
      change: { "mesh.yaml": `a: ${"{".repeat(500)}${"}".repeat(500)}` },
      want: "/b/mesh.yaml, line 1: With stringKeys, all keys must be strings",
    },
    {
      name: "a nesting that fills the stack",
      change: { "mesh.yaml": `a: ${"[".repeat(200)}${"]".repeat(200)}` },
      want: "/b/mesh.yaml: it is nested deeper than 100",
    },
    {
      name: "aliases that multiply",
      change: { "mesh.yaml": BOMB },
      want: "/b/mesh.yaml: Excessive alias count",
    },
    {
      name: "YAML that is a list",
      change: { "mesh.yaml": "- a\n" },
      want: "/b/mesh.yaml, line 1: there is no map",
    },
    { name: "no defaultConfig", change: { "mesh.yaml": "a: 1\n" }, want: "no map `defaultConfig`" },
    {
      name: "a command in cluster.env",
      change: { "cluster.env": "A='1'\nrm -rf /\n" },
      want: "/b/cluster.env, line 2: `rm`",
    },
    {
      name: "a root that is no PEM",
      change: { "root-cert.pem": "<html>" },
      want: "/b/root-cert.pem, line 1: there is no PEM",
    },
    {
      name: "a token that is none",
      change: { "istio-token": "hello" },
      want: "/b/istio-token, line 1: is not a JSON Web Token",
    },
    {
      name: "a hosts line",
      change: { hosts: "# x\nistiod 10.0.0.1\n" },
      want: "/b/hosts, line 2: `istiod 10.0.0.1`",
    },
    {
      name: "a newer vmmesh.json",
      change: { "vmmesh.json": '{"version":9}' },
      want: "/b/vmmesh.json: has format 9",
    },
    {
      name: "a range that is none",
      change: { "vmmesh.json": '{"version":1,"meshCidrs":["x"]}' },
      want: "`x` in `meshCidrs`",
    },
  ])("$name", async ({ change, want }) => {
    const error = await failure(readBundle(directory(change), "/b"));
    expect(error.message).toContain(want);
    expect(error.code).toMatch(/MALFORMED$/);
    expect(error.next).toMatch(/\.$/);
  });

  test.for([
    { name: "a file of something else", data: "hello: 1\n", want: "is neither a tar archive nor" },
    { name: "a tar cut off", data: tar(golden).subarray(0, 700), want: "cut off" },
    { name: "a gzip cut off", data: gzipSync(tar(golden)).subarray(0, 40), want: "cannot be decompressed" },
    {
      name: "a gzip that grows without end",
      data: gzipSync(Buffer.alloc(8 * 1024 * 1024)),
      want: "cannot be decompressed",
    },
    {
      name: "a newer format",
      data: "format: vmmesh-bundle\nversion: 2\n",
      want: "has format 2, this vmmesh reads 1",
    },
    {
      name: "a version that is no text",
      data: "format: vmmesh-bundle\nversion: {toString: 1}\n",
      want: 'has format {"toString":1}',
    },
    { name: "no environment", data: "format: vmmesh-bundle\nversion: 1\n", want: "no map `clusterEnv`" },
  ])("$name", async ({ data, want }) => {
    const error = await failure(readBundle(await fileOf(data), "/x/bundle"));
    expect(error.message).toContain(want);
    expect(error.message).toContain("/x/bundle");
  });

  test("nothing there", async () => {
    expect((await failure(readBundle(new MemoryFiles(), "/nowhere"))).message).toBe(
      "/nowhere: there is no such file or directory",
    );
  });

  test("no bytes make the reader fall over with an error of another kind", async () => {
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 2000 }), async (noise) => {
        const archive = tar(golden);
        archive.set(noise, Math.floor(archive.length / 3));
        for (const data of [noise, archive]) {
          const files = await fileOf(data);
          await readBundle(files, "/x/bundle").catch((error: unknown) =>
            expect(error).toBeInstanceOf(VmmeshError),
          );
        }
      }),
      { numRuns: 50 },
    );
  });
});

describe("vmmesh's own bundle", () => {
  const bundle: Bundle = {
    clusterEnv: new Map([["ISTIO_NAMESPACE", "bar"]]),
    proxyConfig: { readinessProbe: { tcpSocket: { port: 1 } } },
    rootCert: golden["root-cert.pem"] ?? "",
    token: golden["istio-token"] ?? "",
    hosts: new Map([["istiod.istio-system.svc", ["10.0.0.1", "10.0.0.2", "lb.example.org"]]]),
    meshCidrs: ["10.96.0.0/16"],
    refusedKeys: [],
  };

  test.for(["/out/b.json", "/out/b"])("written to %s is read back whole", async (target) => {
    const files = new MemoryFiles({ "/out/x": "" });
    await writeBundle(files, target, bundle);
    expect(await readBundle(files, target)).toEqual(bundle);
  });

  test("the one file is 0600, the directory 0700", async () => {
    const files = new MemoryFiles({ "/out/x": "" });
    await writeBundle(files, "/out/b.json", bundle);
    await writeBundle(files, "/out/b", bundle);
    expect((await files.stat("/out/b.json"))?.mode).toBe(0o600);
    expect((await files.stat("/out/b"))?.mode).toBe(0o700);
    expect((await files.stat("/out/b/istio-token"))?.mode).toBe(0o600);
  });

  test("its hosts file keeps to what istioctl's can hold: one address", () => {
    expect(renderBundle(bundle).get("hosts")?.text).toBe("10.0.0.1 istiod.istio-system.svc\n");
  });

  test("an existing directory keeps its mode, and loses the token of an older bundle", async () => {
    const files = new MemoryFiles({ "/home/me/notes": "mine", "/home/me/istio-token": "old" });
    const { token: _, ...without } = bundle;
    await writeBundle(files, "/home/me", without);
    expect(await files.readText("/home/me/istio-token")).toBeUndefined();
    expect(await files.readText("/home/me/notes")).toBe("mine");
    expect((await files.stat("/home/me"))?.mode).toBe(0o755);
  });

  test("a folder that does not exist is a usage error, not a stack", async () => {
    const error = await failure(writeBundle(new MemoryFiles(), "/none/b.json", bundle));
    expect([error.code, error.message]).toEqual([
      "USAGE",
      "there is no directory /none to write the bundle into",
    ]);
  });

  test("is YAML too, for a person who edits one", async () => {
    const yaml = `format: vmmesh-bundle\nversion: 1\nclusterEnv: {ISTIO_NAMESPACE: bar}\nproxyConfig: {}\nrootCert: |\n  ${golden["root-cert.pem"]?.replaceAll("\n", "\n  ")}\n`;
    expect((await readBundle(await fileOf(yaml), "/x/bundle")).clusterEnv.get("ISTIO_NAMESPACE")).toBe("bar");
    expect(JSON.parse(renderBundleFile(bundle))).toMatchObject({ format: "vmmesh-bundle", version: 1 });
  });
});
