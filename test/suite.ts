import { readdirSync } from "node:fs";
import { parseArgs } from "node:util";

/** `quick` is what CI can afford on every change; `full` is what the issue asks for (100 restarts, 200 kills …). */
export type Scale = "quick" | "full";

export interface Chosen {
  readonly json: boolean;
  readonly scale: Scale;
  /** Of the files of a folder, each of which is one of the suite. */
  readonly names: readonly string[];
}

/**
 * What `[--json] [--quick] [--only name,name]` says. Ends the process with exit code 64 if there is no such name.
 * @param kind what one of them is called
 * @param but files of the folder that are none
 */
export function chosen(kind: string, folder: URL, but: readonly string[] = []): Chosen {
  const { values } = parseArgs({
    options: {
      json: { type: "boolean", default: false },
      quick: { type: "boolean", default: false },
      only: { type: "string" },
    },
  });
  const names = readdirSync(folder)
    .filter((file) => file.endsWith(".ts") && !but.includes(file))
    .map((file) => file.slice(0, -".ts".length));
  const only = values.only?.split(",");
  const unknown = only?.find((name) => !names.includes(name));
  if (unknown !== undefined) {
    process.stderr.write(`no ${kind} is called "${unknown}"; there are: ${names.join(", ")}\n`);
    process.exit(64);
  }
  return {
    json: values.json,
    scale: values.quick ? "quick" : "full",
    names: names.filter((each) => only?.includes(each) ?? true),
  };
}

/** Runs each, told by its name; one that throws does not stop the others. @returns the names of those that did */
export async function eachInTurn(
  names: readonly string[],
  run: (name: string) => Promise<void>,
): Promise<string[]> {
  const broken: string[] = [];
  for (const name of names) {
    try {
      await run(name);
    } catch (error) {
      broken.push(name);
      process.stderr.write(
        `${name} broke: ${error instanceof Error ? (error.stack ?? error.message) : error}\n`,
      );
    }
  }
  return broken;
}
