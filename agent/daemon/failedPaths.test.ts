import { expect, test } from "vitest";
import { startFailedPaths } from "./failedPaths.ts";

async function look(states: string, startCode = 0) {
  const ran: string[] = [];
  const said: string[] = [];
  const run = async ({ argv }: { argv: readonly string[] }) => {
    ran.push(argv.join(" "));
    return argv[1] === "is-failed"
      ? { code: states.includes("failed") ? 0 : 1, stdout: states, stderr: "" }
      : { code: startCode, stdout: "", stderr: startCode === 0 ? "" : "Job failed.\nSee journalctl" };
  };
  await startFailedPaths({ run }, (line) => said.push(line));
  return { started: ran.slice(1), said };
}

test.for([
  { name: "both are active", states: "active\nactive\n" },
  { name: "the operator stopped one", states: "inactive\nactive\n" },
  { name: "systemd does not run", states: "" },
])("$name: nothing is started or said", async ({ states }) => {
  expect(await look(states)).toEqual({ started: [], said: [] });
});

test("the one that failed is started, and said", async () => {
  const { started, said } = await look("active\nfailed\n");
  expect(started).toEqual(["systemctl start vmmesh-resolvers.path"]);
  expect(said).toEqual([expect.stringMatching(/^repaired: vmmesh-resolvers\.path had failed/)]);
});

test("one that cannot be started is told with the reason and what is left", async () => {
  const { said } = await look("failed\nactive\n", 1);
  expect(said[1]).toMatch(/^vmmesh-rules\.path cannot be started \(Job failed\.\): .*half a minute/);
});
