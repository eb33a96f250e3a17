import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { TYPE_URL } from "../proto/discovery.ts";
import { LastGoodFile, type Owner, type ResourceSet } from "./lastGood.ts";

const PATH = "/var/lib/vmmesh/last-good";
const NOW = Date.parse("2026-11-23T06:00:00Z");
const OWNER: Owner = {
  spiffe: "spiffe://cluster.local/ns/default/sa/reviews",
  node: "reviews.default",
  cluster: "Kubernetes",
  discovery: "istiod.istio-system.svc:15012",
};
const SET: ResourceSet = new Map([
  [TYPE_URL.cluster, [{ name: "a", version: "", any: Buffer.from("bytes of a\nand more") }]],
  [TYPE_URL.listener, []],
]);

function fileOf(
  files: MemoryFiles,
  more: { owner?: Partial<Owner>; now?: number; notAfter?: Date | undefined } = {},
): LastGoodFile {
  const notAfter = "notAfter" in more ? more.notAfter : new Date(NOW + 3_600_000);
  return new LastGoodFile({
    host: { files, clock: { now: () => new Date(more.now ?? NOW) } },
    path: PATH,
    owner: { ...OWNER, ...more.owner },
    notAfter: () => notAfter,
  });
}

async function saved(): Promise<MemoryFiles> {
  const files = new MemoryFiles({ "/var/lib/vmmesh/token": "" });
  await fileOf(files).save(SET, 1, "TPROXY");
  return files;
}

describe("the configuration on disk", () => {
  test("comes back byte for byte, with its time, its certificate's end and its mode, and nobody else may read it", async () => {
    const files = await saved();
    const found = await fileOf(files).load();
    expect(found?.savedAt).toEqual(new Date(NOW));
    expect(found?.mode).toBe("TPROXY");
    expect(found?.notAfter).toEqual(new Date(NOW + 3_600_000));
    expect(
      [...(found?.types ?? [])].map(([type, all]) => [type, all.map((it) => [it.name, `${it.any}`])]),
    ).toEqual([
      [TYPE_URL.cluster, [["a", "bytes of a\nand more"]]],
      [TYPE_URL.listener, []],
    ]);
    expect((await files.stat(PATH))?.mode).toBe(0o600);
  });

  test("is none at all before anything was saved, or without a certificate", async () => {
    const files = new MemoryFiles({ "/var/lib/vmmesh/token": "" });
    const file = fileOf(files, { notAfter: undefined });
    await file.save(SET, 1, "TPROXY");
    expect(await file.load()).toBeUndefined();
  });

  test("is written again for a new revision and for a new certificate, and for nothing else", async () => {
    const files = new MemoryFiles({ "/var/lib/vmmesh/token": "" });
    let notAfter = new Date(NOW + 1000);
    const file = new LastGoodFile({
      host: { files, clock: { now: () => new Date(NOW) } },
      path: PATH,
      owner: OWNER,
      notAfter: () => notAfter,
    });
    expect(file.isSaved(1)).toBe(false);
    await file.save(SET, 1, "TPROXY");
    expect([file.isSaved(1), file.isSaved(2)]).toEqual([true, false]);
    notAfter = new Date(NOW + 2000);
    expect(file.isSaved(1)).toBe(false);
  });

  test("with any byte changed or cut off it is refused and set aside, and no error of ours", async () => {
    const whole = (await (await saved()).read(PATH)) ?? Buffer.of();
    await fc.assert(
      fc.asyncProperty(fc.nat(whole.length - 1), fc.integer({ min: 0, max: 255 }), async (at, flip) => {
        const bad =
          flip === 0 ? whole.slice(0, at) : Buffer.from(whole).fill((whole[at] ?? 0) ^ flip, at, at + 1);
        const files = new MemoryFiles({ "/var/lib/vmmesh/token": "" });
        await files.writeAtomic(PATH, bad, { mode: 0o600 });
        await expect(fileOf(files).load()).rejects.toMatchObject({ code: "STATE_UNREADABLE" });
        expect(await files.read(PATH)).toBeUndefined();
        expect(Buffer.from((await files.read(`${PATH}.refused`)) ?? Buffer.of())).toEqual(Buffer.from(bad));
      }),
    );
  });

  test.for([
    ["spiffe", "its spiffe is"],
    ["node", "its node is"],
    ["cluster", "its cluster is"],
    ["discovery", "its discovery is"],
  ] as const)("of another %s it is refused, with both named", async ([field, words]) => {
    const files = await saved();
    const other = fileOf(files, { owner: { [field]: "another" } }).load();
    await expect(other).rejects.toThrow(`${words} ${OWNER[field]}, this machine's is another`);
    expect(await files.read(PATH)).toBeUndefined();
  });

  test("at the end of its certificate it is refused", async () => {
    const files = await saved();
    await expect(fileOf(files, { now: NOW + 3_600_000 }).load()).rejects.toThrow(
      "the certificate that it belongs to ended at 2026-11-23T07:00:00.000Z",
    );
    expect(await fileOf(await saved(), { now: NOW + 3_599_999 }).load()).toBeDefined();
  });
});
