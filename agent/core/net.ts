/** An IP prefix in canonical text. */
export interface Cidr {
  readonly family: 4 | 6;
  readonly address: string;
  readonly bits: number;
}

/** 4, 6, or undefined if `text` is not an IP address. Zone ids (`fe80::1%eth0`) are refused. */
export function ipFamily(text: string): 4 | 6 | undefined {
  if (ipv4Bytes(text) !== undefined) return 4;
  return ipv6Bytes(text) === undefined ? undefined : 6;
}

/** 4 bytes of a dotted quad; leading zeros are refused because tools disagree on their base. */
export function ipv4Bytes(text: string): Uint8Array | undefined {
  const parts = text.split(".");
  if (parts.length !== 4) return undefined;
  const bytes = parts.map((part) => (/^(0|[1-9]\d{0,2})$/.test(part) ? Number(part) : 256));
  return bytes.every((byte) => byte <= 255) ? Uint8Array.from(bytes) : undefined;
}

/** 16 bytes of an IPv6 address in any of RFC 4291's forms. */
export function ipv6Bytes(text: string): Uint8Array | undefined {
  if (!/^[0-9a-fA-F:.]+$/.test(text) || !text.includes(":")) return undefined;
  const halves = text.split("::");
  if (halves.length > 2) return undefined;
  const groups = halves.map((half) => (half === "" ? [] : half.split(":")));
  const bytesOf = (parts: readonly string[]): number[] | undefined => {
    const bytes: number[] = [];
    for (const [index, part] of parts.entries()) {
      if (part.includes(".")) {
        const tail = ipv4Bytes(part);
        if (tail === undefined || index !== parts.length - 1) return undefined;
        bytes.push(...tail);
      } else {
        if (!/^[0-9a-fA-F]{1,4}$/.test(part)) return undefined;
        const value = Number.parseInt(part, 16);
        bytes.push(value >> 8, value & 0xff);
      }
    }
    return bytes;
  };
  const head = bytesOf(groups[0] ?? []);
  const tail = bytesOf(groups[1] ?? []);
  if (head === undefined || tail === undefined) return undefined;
  if (halves.length === 1) return head.length === 16 ? Uint8Array.from(head) : undefined;
  const gap = 16 - head.length - tail.length;
  return gap < 2 ? undefined : Uint8Array.from([...head, ...new Array<number>(gap).fill(0), ...tail]);
}

/** `10.0.0.0/8`, `::1/128` or a single address; undefined if it is none of them. Host bits may be set, as iptables allows. */
export function parseCidr(text: string): Cidr | undefined {
  const [address = "", bitsText, ...rest] = text.trim().split("/");
  const family = ipFamily(address);
  if (family === undefined || rest.length > 0) return undefined;
  const most = family === 4 ? 32 : 128;
  if (bitsText === undefined) return { family, address, bits: most };
  if (!/^(0|[1-9]\d{0,2})$/.test(bitsText) || Number(bitsText) > most) return undefined;
  return { family, address, bits: Number(bitsText) };
}

/** Why no packet can be of this network, as the end of "`10.0.0.0/33` …"; undefined: it is one as `parseCidr` takes it. */
export function whyNotCidr(text: string): string | undefined {
  const cidr = parseCidr(text);
  if (cidr === undefined) return "is not an IP prefix";
  const bytes = cidr.family === 6 && cidr.bits >= 96 ? ipv6Bytes(cidr.address) : undefined;
  // ::ffff:0:0/96 is how sockets name IPv4 (RFC 4291, 2.5.5.2): what they send is IPv4.
  if (bytes === undefined || !bytes.every((byte, at) => at >= 12 || byte === (at < 10 ? 0 : 0xff)))
    return undefined;
  return `is IPv4 in IPv6's notation, which no packet carries: write it as ${bytes.slice(12).join(".")}/${cidr.bits - 96}`;
}

/** Is every address of `inner` one of `outer`? Host bits do not count. */
export function coversCidr(outer: Cidr, inner: Cidr): boolean {
  if (outer.family !== inner.family || outer.bits > inner.bits) return false;
  const bytes = outer.family === 4 ? ipv4Bytes : ipv6Bytes;
  const [one, other] = [bytes(outer.address), bytes(inner.address)];
  return (
    one?.every((byte, index) => {
      const mask = (0xff00 >> Math.min(8, Math.max(0, outer.bits - index * 8))) & 0xff;
      return ((byte ^ (other?.[index] ?? 0)) & mask) === 0;
    }) ?? false
  );
}

/** `host:port`, `[v6]:port`; undefined if the port is missing or out of 1–65535. */
export function parseHostPort(text: string): { host: string; port: number } | undefined {
  const match = /^(?:\[([^\]]+)\]|([^:]+)):(\d{1,5})$/.exec(text);
  if (match === null) return undefined;
  const port = Number(match[3]);
  const host = match[1] ?? match[2] ?? "";
  return port >= 1 && port <= 65535 ? { host, port } : undefined;
}

/** An address or prefix as it stands before `:PORT`: IPv6 in brackets, everything else as it is. */
export function bracketed(host: string): string {
  return host.includes(":") ? `[${host}]` : host;
}

/**
 * Loopback and link-local addresses never leave the machine, so they can be nobody's registered address. Nor can those of
 * ::/96 (RFC 4291, 2.5.5.1): Istio's Envoy binds ::6, which our own rules put on lo.
 */
export function isRoutable(address: string): boolean {
  const v4 = ipv4Bytes(address);
  if (v4 !== undefined) return v4[0] !== 127 && v4[0] !== 0 && !(v4[0] === 169 && v4[1] === 254);
  const v6 = ipv6Bytes(address);
  if (v6 === undefined) return false;
  const linkLocal = v6[0] === 0xfe && ((v6[1] ?? 0) & 0xc0) === 0x80;
  const reserved = v6.subarray(0, 12).every((byte) => byte === 0);
  return !linkLocal && !reserved;
}
