import { expect, test } from "vitest";
import { refused } from "./read.ts";

test("a held xtables lock is named as such, with the command that shows its holder", () => {
  const stderr =
    "Can't lock /run/xtables.lock: Resource temporarily unavailable\nAnother app is currently holding the xtables lock. Stopped waiting after 5s.\n";
  const error = refused({ code: 4, stdout: "", stderr }, "iptables-legacy -t nat -S OUTPUT");
  expect(error.message).toContain("waited in vain for the xtables lock");
  expect(error.next).toContain("fuser -v /run/xtables.lock");
});
