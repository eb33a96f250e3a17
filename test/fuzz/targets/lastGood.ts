import { createHash } from "node:crypto";
import { VmmeshError } from "../../../agent/core/errors.ts";
import { LastGoodFile } from "../../../agent/xds/lastGood.ts";
import { MemoryFiles } from "../../fakes/files.ts";
import type { Target } from "../target.ts";

const NOW = new Date("2026-11-23T00:00:00Z");
const PATH = "/last-good";
const owner = { spiffe: "s", node: "n", cluster: "k", discovery: "d:1" };
const file = (files: MemoryFiles): LastGoodFile =>
  new LastGoodFile({
    host: { files, clock: { now: () => NOW } },
    path: PATH,
    owner,
    notAfter: () => new Date(NOW.getTime() + 1000),
  });

async function saved(): Promise<Uint8Array> {
  const files = new MemoryFiles({ "/etc/x": "" });
  const any = Buffer.from("any");
  const types = new Map([
    ["a", [{ name: "r", version: "1", any }]],
    ["b", []],
  ]);
  await file(files).save(types, 1, "REDIRECT");
  return (await files.read(PATH)) ?? new Uint8Array();
}

/** With the hash that belongs to it: what the hash finds needs no fuzzer. */
function hashed(bytes: Uint8Array): Buffer {
  const text = Buffer.from(bytes);
  const first = text.indexOf("\n") + 1;
  const second = text.indexOf("\n", first) + 1;
  if (first === 0 || second === 0) return text;
  const [line, body] = [text.subarray(0, first), text.subarray(second)];
  return Buffer.concat([
    line,
    Buffer.from(`${createHash("sha256").update(line).update(body).digest("hex")}\n`),
    body,
  ]);
}

export const target: Target = {
  about: "a damaged last-known-good file is set aside with a reason; one that is served was this machine's",
  covers: /\/agent\/(xds|proto)\//,
  seeds: [await saved()],
  words: ['"format":1', '"notAfter":"2027-01-01"', "null", "{}"],
  async run(bytes) {
    for (const content of [Buffer.from(bytes), hashed(bytes)]) {
      const files = new MemoryFiles({ "/etc/x": "" });
      await files.writeAtomic(PATH, content, { mode: 0o600 });
      try {
        const found = await file(files).load();
        if (found === undefined) throw new Error("the file was there");
        if (!(found.notAfter > NOW)) throw new Error("its certificate has ended");
        found.savedAt.toISOString();
      } catch (thrown) {
        if (!(thrown instanceof VmmeshError && thrown.code === "STATE_UNREADABLE")) throw thrown;
        if ((await files.read(PATH)) !== undefined || (await files.read(`${PATH}.refused`)) === undefined)
          throw new Error("it was not set aside");
      }
    }
  },
};
