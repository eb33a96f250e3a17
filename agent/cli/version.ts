import { VERSION } from "../core/version.ts";

export async function version(): Promise<number> {
  process.stdout.write(`vmmesh ${VERSION}\n`);
  return 0;
}
