import { existsSync, readFileSync } from "node:fs";

/** The deb that the lanes install. @throws {Error} if it was not built */
export function packageFile(): string {
  const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as {
    version: string;
  };
  const path = new URL(`../../dist/vmmesh_${version}_amd64.deb`, import.meta.url).pathname;
  if (!existsSync(path)) throw new Error("there is no package to install: run `npm run package` first");
  return path;
}
