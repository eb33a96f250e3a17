import { expect, test } from "vitest";
import { routeNames } from "./resolved.ts";

function machine(fails: (line: string) => boolean) {
  const ran: string[] = [];
  const run = async ({ argv }: { argv: readonly string[] }) => {
    const line = argv.join(" ");
    ran.push(line);
    return { code: fails(line) ? 1 : 0, stdout: "", stderr: fails(line) ? "no such thing\nmore" : "" };
  };
  return { ran, host: { run } };
}
const absent = (line: string): boolean => line.startsWith("ip link show");

test("resolved learns the server last, when the link is no default route and has its domains", async () => {
  const { ran, host } = machine(absent);
  await routeNames(host, ["cluster.local", "~api.example.com"]);
  expect(ran[2]).toBe("ip link add vmmesh0 type dummy");
  expect(ran.slice(-2)).toEqual([
    "resolvectl domain vmmesh0 cluster.local ~api.example.com",
    "resolvectl dns vmmesh0 127.0.0.1:15053",
  ]);
  expect(ran.indexOf("resolvectl default-route vmmesh0 no")).toBeGreaterThan(0);
});

test("a kernel without dummy links gives a veth", async () => {
  const { ran, host } = machine((line) => absent(line) || line.endsWith("type dummy"));
  await routeNames(host, ["cluster.local"]);
  expect(ran).toContain("ip link add vmmesh0 type veth peer name vmmesh0p");
});

test.for([["~."], ["--help"], ["com"], []])("%j is refused before anything is run", async (domains) => {
  const { ran, host } = machine(() => false);
  await expect(routeNames(host, domains)).rejects.toMatchObject({ code: "USAGE" });
  expect(ran).toEqual([]);
});

test("what resolvectl refuses is said in its words", async () => {
  const { host } = machine((line) => line.startsWith("resolvectl dns "));
  await expect(routeNames(host, ["cluster.local"])).rejects.toThrow("resolvectl dns vmmesh0: no such thing");
});

test("a resolved that the operator has stopped is not started by being told", async () => {
  const { ran, host } = machine((line) => line.startsWith("systemctl is-active"));
  await expect(routeNames(host, ["cluster.local"])).rejects.toThrow("systemctl is-active systemd-resolved");
  expect(ran.length).toBe(1);
});
