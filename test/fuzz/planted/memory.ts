import type { Target } from "../target.ts";

export const target: Target = {
  about: "planted: a few bytes that fill the memory",
  seeds: ["1"],
  covers: /\/planted\//,
  run(bytes) {
    const held: number[][] = [];
    while (bytes[0] === 0x39) held.push(new Array<number>(100_000).fill(held.length));
  },
};
