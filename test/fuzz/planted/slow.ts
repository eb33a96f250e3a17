import type { Target } from "../target.ts";

export const target: Target = {
  about: "planted: a search that begins anew at each place",
  seeds: ["("],
  covers: /\/planted\//,
  run(bytes) {
    Buffer.from(bytes)
      .toString("latin1")
      .match(/\([^\]]*\]/g);
  },
};
