import { expect, test } from "vitest";
import { linuxHost } from "../platform/linux.ts";
import { runInTurn } from "./inTurn.ts";

test("each program has its own words, outputs and exit code, whatever is in them", async () => {
  const word = `a'b"c $HOME \`id\`\n%s\\0`;
  expect(
    await runInTurn(linuxHost(), [
      ["printf", "%s", word],
      ["sh", "-c", "echo out; echo err >&2; exit 3"],
      ["no-such-program-of-vmmesh"],
      ["true"],
    ]),
  ).toEqual([
    { code: 0, stdout: word, stderr: "" },
    { code: 3, stdout: "out\n", stderr: "err\n" },
    { code: 127, stdout: "", stderr: expect.stringContaining("not found") },
    { code: 0, stdout: "", stderr: "" },
  ]);
});
