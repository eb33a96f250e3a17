import { expect, test } from "vitest";
import { refusal } from "./refusal.ts";

const HELD = {
  code: 4,
  stdout: "",
  stderr:
    "Can't lock /run/xtables.lock: Resource temporarily unavailable\nAnother app is currently holding the xtables lock. Stopped waiting after 5s.\n",
};
const LOCKS = `1: POSIX  ADVISORY  WRITE 77 fe:00:9773057 0 EOF
2: FLOCK  ADVISORY  WRITE 78 00:1a:977305 0 EOF
2: -> FLOCK  ADVISORY  WRITE 80 fe:00:9773057 0 EOF
3: FLOCK  ADVISORY  WRITE 79 fe:00:9773057 0 EOF
`;

test.for([
  {
    name: "by the program that holds it",
    files: { "/proc/locks": LOCKS, "/proc/79/comm": "kube-proxy\n" },
    says: "which kube-proxy (pid 79) holds",
    next: "ps -fp 79",
  },
  {
    name: "by a process that has ended",
    files: { "/proc/locks": LOCKS },
    says: "a process that has ended (pid 79)",
    next: "ps -fp 79",
  },
  {
    name: "by somebody who is not to be seen",
    files: { "/proc/locks": "" },
    says: "which another program holds",
    next: "fuser -v /run/xtables.lock",
  },
])("a lock that is held $name has its own sentence", async ({ files, says, next }) => {
  const there: Readonly<Record<string, string | undefined>> = files;
  const host = {
    run: async () => ({ code: 0, stdout: "9773057\n", stderr: "" }),
    files: { readText: async (path: string) => there[path] },
  };
  const error = await refusal(host, HELD, "iptables-legacy -t nat -S OUTPUT");
  expect(error.code).toBe("RULES_REJECTED");
  expect(error.message).toContain(says);
  expect(error.next).toContain(next);
});
