import type { Target } from "../target.ts";

export const target: Target = {
  about: "planted: an input that never ends",
  seeds: ["hello"],
  covers: /\/planted\//,
  run(bytes) {
    while (bytes.includes(0xff));
  },
};
