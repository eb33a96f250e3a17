/** Units of time in milliseconds. Every duration in vmmesh is a number of milliseconds whose name ends in `Ms`. */
export const SECOND_MS = 1000;
export const MINUTE_MS = 60 * SECOND_MS;
export const HOUR_MS = 60 * MINUTE_MS;
export const DAY_MS = 24 * HOUR_MS;

/** `93784000` → `1d2h3m4s`; the two largest units are kept. Negative durations carry a minus sign. */
export function formatDuration(ms: number): string {
  if (ms < 0) return `-${formatDuration(-ms)}`;
  if (ms < SECOND_MS) return `${Math.round(ms)}ms`;
  const units: [string, number][] = [
    ["d", DAY_MS],
    ["h", HOUR_MS],
    ["m", MINUTE_MS],
    ["s", SECOND_MS],
  ];
  const parts: string[] = [];
  let rest = Math.floor(ms / SECOND_MS) * SECOND_MS;
  for (const [name, size] of units) {
    const count = Math.floor(rest / size);
    if (count > 0) parts.push(`${count}${name}`);
    rest -= count * size;
  }
  return parts.slice(0, 2).join("");
}

/**
 * Milliseconds in a protobuf-JSON (`3.5s`) or Go (`1h5m`) duration.
 * @returns undefined if the text is neither
 */
export function parseDuration(text: string): number | undefined {
  const sizes: Record<string, number> = { h: HOUR_MS, m: MINUTE_MS, s: SECOND_MS, ms: 1 };
  if (!/^(\d+(\.\d+)?(h|ms|m|s))+$/.test(text)) return undefined;
  let total = 0;
  for (const [, count, unit] of text.matchAll(/(\d+(?:\.\d+)?)(h|ms|m|s)/g)) {
    total += Number(count) * (sizes[unit ?? ""] ?? 0);
  }
  return total;
}
