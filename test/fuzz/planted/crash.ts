import type { Target } from "../target.ts";

export const target: Target = {
  about: "planted: a crash behind four comparisons",
  seeds: ["hello"],
  covers: /\/planted\//,
  run(bytes) {
    if (bytes[0] !== 0x46) return;
    if (bytes[1] !== 0x55) return;
    if (bytes[2] !== 0x5a) return;
    if (bytes[3] === 0x5a) throw new TypeError("found");
  },
};
