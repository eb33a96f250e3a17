import { VmmeshError } from "../core/errors.ts";

/** Kubernetes' own rule for both parts, 63 characters each; a key may have a DNS prefix before a `/`. */
const PART = /^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$/;
const PREFIX = /^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$/;

/**
 * `k=v` words as labels; of a key that stands twice, the later value. Checked here because nothing behind checks labels
 * inside a WorkloadGroup: the API server takes any text, and istiod then fails to make the WorkloadEntry.
 *
 * @throws {VmmeshError} USAGE naming the word
 */
export function parseLabels(words: readonly string[]): Record<string, string> {
  return Object.fromEntries(words.map(parseLabel));
}

function parseLabel(word: string): readonly [string, string] {
  const [key = "", value, ...more] = word.split("=");
  const [name = "", ...prefix] = key.split("/").reverse();
  const keyFits = PART.test(name) && prefix.length <= 1 && prefix.every((part) => PREFIX.test(part));
  if (value === undefined || more.length > 0 || !keyFits || (value !== "" && !PART.test(value))) {
    throw new VmmeshError("USAGE", `--labels ${word} is not a label of Kubernetes`, {
      next: "Write it as KEY=VALUE with letters, digits, dots, dashes and underscores, at most 63 of them.",
    });
  }
  return [key, value];
}
