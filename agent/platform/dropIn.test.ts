import { expect, test } from "vitest";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { setDropIn } from "./dropIn.ts";

const FOLDER = "/etc/systemd/system/app.service.d";
const OURS = `${FOLDER}/50-vmmesh.conf`;

test("written once, said once, and gone with its folder", async () => {
  const files = new MemoryFiles();
  expect(await setDropIn(files, OURS, undefined)).toBe(false);
  expect([await setDropIn(files, OURS, "[Service]\n"), await setDropIn(files, OURS, "[Service]\n")]).toEqual([
    true,
    false,
  ]);
  expect(await files.readText(OURS)).toBe("[Service]\n");
  expect(await setDropIn(files, OURS, undefined)).toBe(true);
  expect(await files.stat(FOLDER)).toBeUndefined();
});

test("a folder in which somebody else keeps a drop-in stays", async () => {
  const files = new MemoryFiles({ [`${FOLDER}/theirs.conf`]: "[Unit]\n" });
  await setDropIn(files, OURS, "[Service]\n");
  await setDropIn(files, OURS, undefined);
  expect(await files.list(FOLDER)).toEqual(["theirs.conf"]);
});
