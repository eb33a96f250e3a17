import type { CommandResult, Host } from "../platform/host.ts";

/**
 * Several programs one after the other in one shell: a start of a program costs Node more than most of these programs take.
 * For programs that read nothing and end by themselves.
 *
 * @returns one result for each; code 127: not installed
 */
export async function runInTurn(
  host: Pick<Host, "run">,
  argvs: readonly (readonly string[])[],
): Promise<CommandResult[]> {
  // No rule can hold a NUL, whatever its comment says.
  const script = argvs.map(
    (argv) => String.raw`${argv.map(quoted).join(" ")}; printf '\0%s\0' $?; printf '\0' >&2`,
  );
  const { code, stdout, stderr } = await host.run({ argv: ["sh", "-c", script.join("\n")] });
  const [out, err] = [stdout.split("\0"), stderr.split("\0")];
  return argvs.map((_, at) => ({
    code: Number(out[2 * at + 1] ?? code),
    stdout: out[2 * at] ?? "",
    stderr: err[at] ?? "",
  }));
}

/** A word for the shell. */
function quoted(word: string): string {
  return `'${word.replaceAll("'", String.raw`'\''`)}'`;
}
