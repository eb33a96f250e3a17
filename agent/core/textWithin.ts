/**
 * What another program sends, as one text, up to a bound on the memory that it takes. Leaving the loop closes the source.
 *
 * @param maxBytes more than this is `tooLong`
 * @throws what `tooLong` makes, and whatever the source throws
 */
export async function textWithin(
  source: AsyncIterable<Uint8Array>,
  maxBytes: number,
  tooLong: () => Error,
): Promise<string> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of source) {
    size += chunk.length;
    if (size > maxBytes) throw tooLong();
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}
