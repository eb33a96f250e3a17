import yargs from "yargs";
import { VmmeshError } from "../core/errors.ts";
import { COMMANDS, COMMON_OPTIONS, type CommandSpec, type OptionSpec, type Options } from "./commands.ts";

/** What to run, or text to print (help). */
export type Parsed =
  | { readonly command: CommandSpec; readonly options: Options }
  | { readonly print: string };

/**
 * @param argv without node and script
 * @throws {VmmeshError} USAGE naming the word that is wrong
 */
export async function parse(argv: readonly string[]): Promise<Parsed> {
  const command = [...COMMANDS]
    .sort((a, b) => b.words.length - a.words.length)
    .find(({ words }) => words.split(" ").every((word, index) => argv[index] === word));
  const rest = command === undefined ? argv : argv.slice(command.words.split(" ").length);
  const wantsHelp = rest.some((word) => word === "--help" || word === "-h" || word === "help");
  if (command === undefined) {
    if (argv.length === 0 || wantsHelp) return { print: overview() };
    const typed = argv.filter((word) => !word.startsWith("-")).join(" ");
    throw new VmmeshError("USAGE", `there is no command \`vmmesh ${typed || argv.join(" ")}\``, {
      next: `Commands: ${visible()
        .map(({ words }) => words)
        .join(", ")}. \`vmmesh help\` says what each does.`,
    });
  }
  if (wantsHelp) return { print: helpOf(command) };

  const { words, foreign } = handOn(command, rest);
  const specs = [...command.options, ...COMMON_OPTIONS];
  let complaint: string | undefined;
  let parser = yargs([...words])
    .help(false)
    .version(false)
    .exitProcess(false)
    .strict()
    .parserConfiguration({
      "duplicate-arguments-array": true,
      "parse-numbers": false,
      "boolean-negation": false,
    })
    .fail((message, error) => {
      complaint = message ?? error?.message;
    });
  for (const spec of specs) {
    parser = parser.option(spec.name, {
      type: spec.type === "number" ? "string" : spec.type,
      array: spec.repeat === true,
      requiresArg: spec.type !== "boolean",
      ...(spec.choices === undefined ? {} : { choices: [...spec.choices] }),
      ...(spec.required === true ? { demandOption: true } : {}),
    });
  }
  const typed = (await parser.parse()) as Record<string, unknown>;
  if (complaint !== undefined) throw usage(command, complaint.replace(/\s*\n\s*/g, " "));
  return {
    command,
    options: {
      ...Object.fromEntries(specs.map((spec) => [spec.name, optionValue(command, spec, typed[spec.name])])),
      ...(foreign === undefined ? {} : { words: foreign }),
    },
  };
}

/** Splits off the words that another program's rules are for; undefined: there are none such. */
function handOn(
  { handsOnWith }: CommandSpec,
  rest: readonly string[],
): { words: readonly string[]; foreign?: readonly string[] } {
  const at = rest.findIndex((word) => word === `--${handsOnWith}` || word.startsWith(`--${handsOnWith}=`));
  if (handsOnWith === undefined || at < 0) return { words: rest };
  const end = at + (rest[at]?.includes("=") === true ? 1 : 2);
  return { words: rest.slice(at, end), foreign: [...rest.slice(0, at), ...rest.slice(end)] };
}

function optionValue(command: CommandSpec, spec: OptionSpec, typed: unknown): Options[string] {
  if (typed === undefined) return spec.default;
  if (spec.repeat === true)
    return (typed as unknown[])
      .map(String)
      .flatMap((item) => item.split(","))
      .filter((item) => item !== "");
  if (Array.isArray(typed)) throw usage(command, `--${spec.name} was given ${typed.length} times`);
  if (spec.type !== "number") return typed as string | boolean;
  const number = Number(typed);
  if (!Number.isFinite(number) || number < 0)
    throw usage(command, `--${spec.name} takes a number, not \`${String(typed)}\``);
  return number;
}

function usage(command: CommandSpec, complaint: string): VmmeshError {
  return new VmmeshError("USAGE", `vmmesh ${command.words}: ${complaint}`, {
    next: `\`vmmesh ${command.words} --help\` lists its options.`,
  });
}

const visible = (): CommandSpec[] => COMMANDS.filter(({ hidden }) => hidden !== true);

function overview(): string {
  const width = Math.max(...visible().map(({ words }) => words.length));
  return [
    "vmmesh: joins this machine to an Istio mesh",
    "",
    ...visible().map(({ words, summary }) => `  vmmesh ${words.padEnd(width)}  ${summary}`),
    "",
    "`vmmesh COMMAND --help` lists a command's options. Exit statuses and error codes are in vmmesh(1).",
  ].join("\n");
}

/** The help text of one command, at most 110 columns for its longest option. */
export function helpOf(command: CommandSpec): string {
  const flag = (spec: OptionSpec): string =>
    `${spec.name.length === 1 ? "-" : "--"}${spec.name}${spec.type === "boolean" ? "" : ` ${spec.choices?.join("|") ?? spec.value ?? "VALUE"}`}`;
  const specs = [...command.options, ...COMMON_OPTIONS];
  const width = Math.max(...specs.map((spec) => flag(spec).length));
  const notes = (spec: OptionSpec): string =>
    [
      spec.required === true ? "required" : "",
      spec.repeat === true ? "may be repeated" : "",
      spec.default === undefined ? "" : `default ${String(spec.default)}`,
    ]
      .filter(Boolean)
      .join("; ");
  return [
    `vmmesh ${command.words}: ${command.summary}`,
    "",
    ...specs.map(
      (spec) =>
        `  ${flag(spec).padEnd(width)}  ${spec.describe}${notes(spec) === "" ? "" : ` (${notes(spec)})`}`,
    ),
    ...(command.examples.length === 0
      ? []
      : ["", ...command.examples.map(([line, what]) => `  ${line}\n      ${what}`)]),
  ].join("\n");
}
