import type { Files } from "./host.ts";

/**
 * Writes a drop-in of a unit, or takes it away (`text` undefined) with its folder, unless somebody else keeps one there. The
 * manager has to read its units again if anything changed.
 *
 * @param path `/etc/systemd/system/UNIT.d/NAME.conf` @see systemd.unit(5)
 * @returns whether anything changed
 */
export async function setDropIn(files: Files, path: string, text: string | undefined): Promise<boolean> {
  if ((await files.readText(path)) === text) return false;
  const folder = path.slice(0, path.lastIndexOf("/"));
  if (text !== undefined) {
    if ((await files.stat(folder)) === undefined) await files.makeDir(folder, { mode: 0o755 });
    await files.writeAtomic(path, text, { mode: 0o644 });
    return true;
  }
  await files.remove(path);
  if ((await files.list(folder))?.length === 0) await files.remove(folder);
  return true;
}
