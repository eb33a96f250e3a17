import { messageOf, VmmeshError } from "../core/errors.ts";
import { SECOND_MS } from "../core/time.ts";
import type { Host, Owner } from "../platform/host.ts";

const TIMEOUT_MS = 20 * SECOND_MS;
/** A token of Kubernetes has about 1 KiB; those of clouds and SPIRE stay below 8. */
const MAX_BYTES = 65_536;
const SAID_LENGTH = 300;

/**
 * The token that a program of the operator's prints (`--credential-exec`): it gets no arguments and no input, runs without
 * a shell, and is killed with all that it started when it takes too long or prints too much.
 *
 * @param runAs whom it runs as, where we are root; else it runs as we do
 * @throws {VmmeshError} COMMAND_MISSING, COMMAND_FAILED in the program's own words
 */
export async function tokenOfCommand(
  host: Pick<Host, "run">,
  path: string,
  runAs: Owner | undefined,
  signal: AbortSignal,
): Promise<string> {
  const as = runAs === undefined ? {} : { as: runAs };
  const next = `Try it: runuser -u vmmesh -- ${path}`;
  const { code, stdout, stderr } = await host
    .run({ argv: [path], timeoutMs: TIMEOUT_MS, maxOutputBytes: MAX_BYTES, ...as }, signal)
    .catch((cause: unknown) => {
      if (signal.aborted || !(cause instanceof VmmeshError)) throw cause;
      const why = cause.code === "COMMAND_MISSING" ? "does not exist" : messageOf(cause);
      throw new VmmeshError(cause.code, `the credential command ${path} gave no token: ${why}`, {
        cause,
        next,
      });
    });
  const token = stdout.trim();
  if (code === 0 && token !== "") return token;
  const how = code === 0 ? "it printed nothing" : `it ended with status ${code}`;
  const said = oneLine(stderr);
  throw new VmmeshError(
    "COMMAND_FAILED",
    `the credential command ${path} gave no token: ${how}${said === "" ? "" : `, and said: ${said}`}`,
    { next },
  );
}

/** The end of a text counts: there stands what went wrong. */
function oneLine(text: string): string {
  const line = text.replace(/[\p{Cc}\s]+/gu, " ").trim();
  return line.length <= SAID_LENGTH ? line : `…${line.slice(-SAID_LENGTH)}`;
}
