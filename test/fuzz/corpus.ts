import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";

/** Inputs that broke a property once stay for ever; the others as long as they reach something. */
const FINDING = "finding-";

/** The kept inputs of a target by the names of their files. */
export function readCorpus(folder: string): Map<string, Uint8Array> {
  if (!existsSync(folder)) return new Map();
  return new Map(
    readdirSync(folder).map((name) => [name, Uint8Array.from(readFileSync(`${folder}/${name}`))]),
  );
}

/** Replaces what was kept, findings excepted. */
export function writeCorpus(folder: string, inputs: readonly Uint8Array[]): void {
  const before = readCorpus(folder);
  const after = new Map(inputs.map((input) => [nameOf(input), input]));
  for (const name of before.keys())
    if (!after.has(name) && !name.startsWith(FINDING)) rmSync(`${folder}/${name}`);
  if (after.size > 0) mkdirSync(folder, { recursive: true });
  for (const [name, input] of after)
    if (!before.has(name) && !before.has(`${FINDING}${name}`)) writeFileSync(`${folder}/${name}`, input);
}

/**
 * Puts what broke a property into the corpus: the replay fails until that is mended, and watches over it then.
 * @returns its path
 */
export function saveFinding(folder: string, input: Uint8Array): string {
  mkdirSync(folder, { recursive: true });
  const path = `${folder}/${FINDING}${nameOf(input)}`;
  writeFileSync(path, input);
  return path;
}

function nameOf(input: Uint8Array): string {
  return createHash("sha256").update(input).digest("hex").slice(0, 12);
}
