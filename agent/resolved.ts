#!/usr/bin/env node
// What vmmesh-resolved@.service starts for each connection of the agent: one line of domains in, one line out. It opens nothing that the agent can write.
import { describeError } from "./core/errors.ts";
import { routeNames, unrouteNames } from "./daemon/resolved.ts";
import { linuxHost } from "./platform/linux.ts";

/** 1024 domains of 253 characters and their separators. */
const MAX_INPUT = 1024 * 255;

const host = linuxHost();
let text = "";
let gone = false;
process.stdout.on("error", () => undefined);
const line = await new Promise<string>((resolve) => {
  process.stdin.setEncoding("utf8");
  process.stdin.on("data", (part: string) => {
    text += part;
    if (text.includes("\n") || text.length > MAX_INPUT) resolve(text.split("\n")[0] ?? "");
  });
  for (const end of ["end", "error", "close"])
    process.stdin.on(end, () => {
      gone = true;
      resolve("");
    });
});
let answer = "ok";
try {
  await routeNames(host, line.split(" ").filter(Boolean));
} catch (thrown) {
  answer = describeError(thrown).replaceAll("\n", " ");
}
// The agent that asked has died meanwhile: its unit's last act may have come before ours.
if (gone) await unrouteNames(host);
process.stdout.write(`${answer}\n`, () => process.exit());
