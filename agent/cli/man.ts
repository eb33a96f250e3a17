import { ERROR_CODES } from "../core/errors.ts";
import { paths } from "../core/paths.ts";
import { COMMANDS, COMMON_OPTIONS, type OptionSpec } from "./commands.ts";

/** What each exit status means; README.md and vmmesh(1) print this table. */
export const EXIT_STATUSES: readonly (readonly [number, string])[] = [
  [0, "done; for audit: nothing found"],
  [1, "a fault in vmmesh; for audit: something found; for status: a condition is an error"],
  [2, "what was typed or given is wrong; for audit: something critical found"],
  [3, "this machine cannot do it: not root, no systemd, no Envoy, a program is missing"],
  [4, "the mesh refuses or cannot be reached: istiod, identity, token, clock"],
  [5, "the Kubernetes API refuses or cannot be reached"],
  [6, "somebody else is at it: another join runs, or the machine is joined already"],
  [7, "the firewall: rules refused, not confirmed, or no privilege"],
  [8, "trace: the rules cannot be read, so only what lies around them was told"],
];

/** vmmesh(1) as roff, made from the command table, so that the page cannot drift from what the program does. */
export function manPage(version: string): string {
  const option = (spec: OptionSpec): string => {
    const dashes = spec.name.length === 1 ? "\\-" : "\\-\\-";
    const value =
      spec.type === "boolean" ? "" : ` \\fI${text(spec.choices?.join("|") ?? spec.value ?? "VALUE")}\\fR`;
    const notes = [
      spec.required ? "Required." : "",
      spec.repeat ? "May be repeated." : "",
      spec.default === undefined ? "" : `Default: ${String(spec.default)}.`,
    ]
      .filter(Boolean)
      .join(" ");
    return `.TP\n\\fB${dashes}${text(spec.name)}\\fR${value}\n${text(sentence(spec.describe))}${notes === "" ? "" : ` ${text(notes)}`}`;
  };
  const at = paths();
  return [
    `.TH VMMESH 1 "" "vmmesh ${version}" "vmmesh"`,
    ".SH NAME\nvmmesh \\- joins this machine to an Istio mesh",
    ".SH SYNOPSIS\n\\fBvmmesh\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR]",
    ".SH DESCRIPTION\nvmmesh makes a Linux machine a workload of an Istio mesh: identity, registration, Envoy under systemd, traffic capture ahead of other programs' rules, names of the mesh, metrics. \\fBvmmesh leave\\fR undoes every bit of it.",
    ".SH COMMANDS",
    ...COMMANDS.filter(({ hidden }) => hidden !== true).flatMap((command) => [
      `.SS vmmesh ${text(command.words)}\n${text(sentence(command.summary))}`,
      ...command.options.map(option),
      ...command.examples.map(
        ([line, what]) => `.PP\nExample: \\fB${text(line)}\\fR\n.br\n${text(sentence(what))}`,
      ),
    ]),
    ".SH COMMON OPTIONS",
    ...COMMON_OPTIONS.map(option),
    ".SH EXIT STATUS",
    ...EXIT_STATUSES.map(([status, meaning]) => `.TP\n\\fB${status}\\fR\n${text(sentence(meaning))}`),
    ".SH ERRORS\nEvery error is one code, one sentence, its reason and the next step. Codes and their exit statuses:",
    `.PP\n${Object.entries(ERROR_CODES)
      .map(([code, status]) => `${code} (${status})`)
      .join(", ")}.`,
    ".SH FILES",
    ...[
      [at.etc, "what join rendered, for people to read; sidecar.env is yours to change"],
      [at.state, "the agent's certificate and token"],
      [at.hostState, "journal of the join and the confirmed rules; root only"],
      [at.run, "sockets and Envoy's bootstrap"],
    ].map(([path = "", what = ""]) => `.TP\n\\fI${text(path)}\\fR\n${text(sentence(what))}`),
    ".SH SEE ALSO\n\\fBsystemctl\\fR(1), \\fBjournalctl\\fR(1), \\fBiptables\\fR(8), \\fBnft\\fR(8)",
    "",
  ].join("\n");
}

const sentence = (words: string): string =>
  `${words.charAt(0).toUpperCase()}${words.slice(1)}${/[.)]$/.test(words) ? "" : "."}`;
/** Roff's own characters, and a leading dot or quote, which would be a request. */
const text = (words: string): string =>
  words
    .replaceAll("\\", "\\e")
    .replaceAll("-", "\\-")
    .replace(/^([.'])/, "\\&$1");
