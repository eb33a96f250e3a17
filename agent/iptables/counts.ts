import type { Host } from "../platform/host.ts";
import { FENCE_TABLE, HELD_TABLE } from "./nft.ts";
import { tryRun } from "./read.ts";

/** First segments of connections since the fence was loaded last. */
export interface FenceCounts {
  /** Refused where the failure policy is closed. */
  readonly refused: { readonly inbound: number; readonly outbound: number };
  /** Gone past Envoy where it is open. */
  readonly bypassed: { readonly inbound: number; readonly outbound: number };
}

const COUNTER = /counter (refused|bypassed)_(input|output) \{\s*packets (\d+)/g;

/** @returns undefined where no fence can be read: there is none, or only root may */
export async function readFenceCounts(host: Pick<Host, "run">): Promise<FenceCounts | undefined> {
  const [fence, held] = await Promise.all(
    [FENCE_TABLE, HELD_TABLE].map((table) =>
      tryRun(host, { argv: ["nft", "list", "counters", "table", ...table.split(" ")] }),
    ),
  );
  if (fence?.code !== 0) return undefined;
  return parseFenceCounts(`${fence.stdout}${held?.code === 0 ? held.stdout : ""}`);
}

/** The text of `nft list counters`; the same counter of several tables is added up. Pure. */
export function parseFenceCounts(text: string): FenceCounts {
  const found = [...text.matchAll(COUNTER)];
  const sum = (name: string, hook: string): number =>
    found
      .filter((match) => match[1] === name && match[2] === hook)
      .reduce((total, match) => total + Number(match[3]), 0);
  const both = (name: string) => ({ inbound: sum(name, "input"), outbound: sum(name, "output") });
  return { refused: both("refused"), bypassed: both("bypassed") };
}
