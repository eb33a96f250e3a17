const BLOCK = 512;
/** Type flags of a regular file in POSIX.1 ustar; NUL is that of older tars. */
const REGULAR = new Set(["0", "\0"]);

/** Is there a ustar header at the start? */
export function isTar(data: Uint8Array): boolean {
  return data.length >= BLOCK && Buffer.from(data.subarray(257, 262)).toString("latin1") === "ustar";
}

/**
 * The regular files of a tar archive by their base name; folders, links and extended headers are passed over.
 * Names longer than a ustar header (100 bytes) are not needed: a bundle's are short.
 *
 * @returns undefined if the archive is cut off or its sizes make no sense
 */
export function untar(data: Uint8Array): Map<string, Uint8Array> | undefined {
  const files = new Map<string, Uint8Array>();
  let at = 0;
  while (at + BLOCK <= data.length) {
    const header = Buffer.from(data.subarray(at, at + BLOCK)).toString("latin1");
    if (/^\0*$/.test(header)) return files;
    const sizeText = header.slice(124, 136).replace(/[\0 ]+$/, "");
    if (!/^[0-7]+$/.test(sizeText)) return undefined;
    const size = Number.parseInt(sizeText, 8);
    const start = at + BLOCK;
    if (start + size > data.length) return undefined;
    const path = header.slice(0, 100).split("\0", 1)[0] ?? "";
    const name = path.slice(path.lastIndexOf("/") + 1);
    if (REGULAR.has(header.slice(156, 157)) && name !== "")
      files.set(name, data.subarray(start, start + size));
    at = start + Math.ceil(size / BLOCK) * BLOCK;
  }
  return files;
}
