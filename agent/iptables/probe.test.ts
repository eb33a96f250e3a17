import { expect, test } from "vitest";
import type { CommandResult } from "../platform/host.ts";
import { linuxHost } from "../platform/linux.ts";
import { auditExitCode } from "./audit/finding.ts";
import { judgeProbe, probeCapture } from "./probe.ts";

const LISTENING = `  sl  local_address rem_address   st tx_queue
   0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000   989        0 1
`;
const ELSEWHERE = LISTENING.replace("3A99 ", "3A98 ").replace(" 0A ", " 01 ");

const answers = (result: Partial<CommandResult>, sockets = LISTENING) => ({
  run: async () => ({ code: 0, stdout: "", stderr: "", ...result }),
  files: { ...linuxHost().files, readText: async () => sockets },
});

const CASES = [
  { name: "Envoy's answer", result: { stdout: "vmmesh: Envoy answers" }, met: "envoy", exit: 0 },
  {
    name: "a refused connection",
    result: { code: 1, stderr: "bash: connect: Connection refused" },
    met: "refused",
    exit: 1,
  },
  { name: "silence", result: { code: 124 }, met: "past", exit: 2 },
  { name: "somebody else's answer", result: { stdout: "SSH-2.0" }, met: "past", exit: 2 },
  {
    name: "no route",
    result: { code: 1, stderr: "bash: connect: Network is unreachable" },
    met: "no route",
    exit: 0,
  },
  { name: "no permission", result: { code: 1, stderr: "setpriv: no" }, met: "impossible", exit: 0 },
] as const;

test.for(CASES)("$name is $met", async ({ result, met, exit }) => {
  const seen = await probeCapture(answers(result), 4);
  expect(seen.met).toBe(met);
  expect(auditExitCode(judgeProbe(seen))).toBe(exit);
});

test("a refusal without a listener is Envoy's silence, not the order; IPv6 without one is istiod's choice", async () => {
  const refused = { code: 1, stderr: "bash: connect: Connection refused" };
  for (const [family, exit] of [
    [4, 1],
    [6, 0],
  ] as const) {
    const seen = await probeCapture(answers(refused, ELSEWHERE), family);
    expect(seen.met).toBe("no listener");
    expect(auditExitCode(judgeProbe(seen))).toBe(exit);
  }
});
