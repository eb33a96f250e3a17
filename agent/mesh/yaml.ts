import { isCollection, isPair, isScalar, parseDocument, stringify } from "yaml";
import type { ErrorCode } from "../core/errors.ts";
import { VmmeshError } from "../core/errors.ts";

/** A JSON object whose members are not known yet. */
export type Fields = Readonly<Record<string, unknown>>;

export function isFields(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The member as an object; an absent one, or one of another kind, is empty. */
export function fieldsOf(value: unknown): Fields {
  return isFields(value) ? value : {};
}

/** The member as text; undefined if it is absent or of another kind. */
export function textOf(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

/** Every member that is text: how Kubernetes and Istio write maps of strings. */
export function textMapOf(value: unknown): Record<string, string> {
  return Object.fromEntries(
    Object.entries(fieldsOf(value)).filter(
      (entry): entry is [string, string] => typeof entry[1] === "string",
    ),
  );
}

/**
 * A YAML (or JSON) text whose top is a map.
 * @param where names the text in errors
 * @throws {VmmeshError} `code` with the line, if it is not
 */
export function parseYamlFields(text: string, where: string, code: ErrorCode, next: string): Fields {
  const document = parseDocument(text, YAML_OPTIONS);
  const [error] = document.errors;
  if (error !== undefined) {
    const line = error.linePos?.[0].line;
    const reason = error.message.split("\n")[0]?.replace(/ at line \d+, column \d+:?$/, "") ?? error.code;
    throw new VmmeshError(code, `${where}${line === undefined ? "" : `, line ${line}`}: ${reason}`, { next });
  }
  const value = plainOf(document);
  if (value instanceof Error) throw new VmmeshError(code, `${where}: ${value.message}`, { next });
  if (!isFields(value))
    throw new VmmeshError(code, `${where}, line 1: there is no map of keys in it`, { next });
  return value;
}

/**
 * How foreign YAML is read. The library would print warnings by itself, with parts of the file; and of a key that is a
 * list or a map it makes a text, which takes a minute where 500 of them are in each other.
 */
export const YAML_OPTIONS = { logLevel: "error", stringKeys: true } as const;

/** Deeper than anything that Istio or kubectl writes; beyond, the stack would decide. */
const MAX_DEPTH = 100;

/**
 * The document as plain values; an error if its aliases lead nowhere, or multiply it (a few bytes could fill the memory),
 * or if it is nested deeper than 100.
 */
export function plainOf(document: Pick<ReturnType<typeof parseDocument>, "contents" | "toJS">): unknown {
  if (isTooDeep(document.contents)) return new Error(`it is nested deeper than ${MAX_DEPTH}`);
  try {
    return document.toJS({ maxAliasCount: 100 });
  } catch (thrown) {
    return thrown instanceof Error ? thrown : new Error(String(thrown));
  }
}

function isTooDeep(contents: unknown): boolean {
  const todo: { readonly node: unknown; readonly depth: number }[] = [{ node: contents, depth: 0 }];
  for (let at = todo.pop(); at !== undefined; at = todo.pop()) {
    const { node, depth } = at;
    if (depth > MAX_DEPTH) return true;
    if (!isCollection(node)) continue;
    for (const item of node.items) todo.push({ node: isPair(item) ? item.value : item, depth: depth + 1 });
  }
  return false;
}

/** YAML as istioctl writes it: keys sorted at every depth, block style, lines never folded. */
export function renderYaml(value: Fields): string {
  const keyText = (pair: { readonly key: unknown }): string =>
    isScalar(pair.key) ? String(pair.key.value) : String(pair.key);
  return stringify(value, {
    sortMapEntries: (a, b) => byGoYamlOrder(keyText(a), keyText(b)),
    lineWidth: 0,
    indentSeq: false,
  });
}

/** go-yaml's order of keys: at the first difference whatever is no letter comes first, so `META_X` before `METAJSON`. */
function byGoYamlOrder(a: string, b: string): number {
  for (let at = 0; at < Math.min(a.length, b.length); at += 1) {
    const [left = "", right = ""] = [a[at], b[at]];
    if (left === right) continue;
    const [leftIsLetter, rightIsLetter] = [/\p{L}/u.test(left), /\p{L}/u.test(right)];
    if (leftIsLetter !== rightIsLetter) return leftIsLetter ? 1 : -1;
    return left < right ? -1 : 1;
  }
  return a.length - b.length;
}
