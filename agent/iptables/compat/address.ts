import { ipv4Bytes, ipv6Bytes } from "../../core/net.ts";

/** An IP prefix as Go's netip prints it: host bits stay, IPv6 is in RFC 5952's form. */
export interface Prefix {
  readonly family: 4 | 6;
  readonly text: string;
  readonly bits: number;
  /** Its address is one of 127.0.0.0/8 or ::1. */
  readonly loopback: boolean;
}

/** Undefined where Go's netip.ParsePrefix fails: no length, a zone, leading zeros. */
export function parsePrefix(text: string): Prefix | undefined {
  const cut = text.lastIndexOf("/");
  const address = canonicalAddress(text.slice(0, Math.max(cut, 0)));
  const digits = text.slice(cut + 1);
  if (cut < 0 || address === undefined || address.text.includes("%")) return undefined;
  const bits = Number(digits);
  if (!/^(0|[1-9]\d{0,2})$/.test(digits) || bits > (address.family === 4 ? 32 : 128)) return undefined;
  return {
    family: address.family,
    text: `${address.text}/${digits}`,
    bits,
    loopback: /^(::ffff:)?127\.|^::1$/.test(address.text),
  };
}

/** An address as Go's netip prints it, with its zone (`fe80::1%eth0`); undefined where it fails to parse. */
export function canonicalAddress(text: string): { family: 4 | 6; text: string } | undefined {
  if (ipv4Bytes(text) !== undefined) return { family: 4, text };
  const [bare = "", zone] = splitOnce(text, "%");
  // A dotted quad may only stand for the last 32 bits.
  if (zone === "" || /\..*:/.test(bare)) return undefined;
  const bytes = ipv6Bytes(bare);
  if (bytes === undefined) return undefined;
  const mapped =
    bytes.subarray(0, 10).every((byte) => byte === 0) && bytes[10] === 0xff && bytes[11] === 0xff;
  // Go refuses a zone on what is IPv4 inside.
  if (mapped && zone !== undefined) return undefined;
  const written = mapped ? `::ffff:${bytes.subarray(12).join(".")}` : compressed(bytes);
  return { family: 6, text: zone === undefined ? written : `${written}%${zone}` };
}

/** RFC 5952: the first of the longest runs of two or more zero groups becomes `::`. */
function compressed(bytes: Uint8Array): string {
  const groups = Array.from({ length: 8 }, (_, index) =>
    (((bytes[2 * index] ?? 0) << 8) | (bytes[2 * index + 1] ?? 0)).toString(16),
  );
  let best = { start: 0, length: 1 };
  for (let start = 0; start < 8; start++) {
    const end = groups.findIndex((group, index) => index >= start && group !== "0");
    const length = (end < 0 ? 8 : end) - start;
    if (length > best.length) best = { start, length };
  }
  if (best.length < 2) return groups.join(":");
  return `${groups.slice(0, best.start).join(":")}::${groups.slice(best.start + best.length).join(":")}`;
}

function splitOnce(text: string, at: string): [string, string | undefined] {
  const cut = text.indexOf(at);
  return cut < 0 ? [text, undefined] : [text.slice(0, cut), text.slice(cut + 1)];
}
