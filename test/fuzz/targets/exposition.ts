import { Exposition } from "../../../agent/telemetry/exposition.ts";
import type { Target } from "../target.ts";

/** Two bodies, each in two pieces. */
function joined(first: Uint8Array, second: Uint8Array, openMetrics: boolean, cut: number): string {
  const exposition = new Exposition();
  return [first, second]
    .flatMap((body) => {
      const part = exposition.part(openMetrics);
      const [head, tail] = [body.subarray(0, cut), body.subarray(cut)].map((it) => Buffer.from(it));
      return [
        ...(head === undefined ? [] : part.push(head)),
        ...(tail === undefined ? [] : part.push(tail)),
        ...part.end(),
      ];
    })
    .map((piece) => piece.toString("latin1"))
    .join("");
}

const ANNOUNCES = /^#[ \t]+(TYPE|HELP|UNIT)[ \t]+([^ \t]+)/;

export const target: Target = {
  about: "wherever a body is cut it comes out the same, no family is announced twice, nothing ends the whole",
  seeds: [
    '# HELP a_total b\n# TYPE a_total counter\na_total{x="y"} 1\n',
    '# TYPE a counter\na_total{x="1"} 2 1.5 # {id="7"} 0.5 1.5\na_created 1\n# UNIT a s\n# EOF\n',
    '# TYPE h histogram\nh_bucket{le="+Inf"} 3\nh_sum 4\nh_count 3',
  ],
  words: ["# TYPE ", "# HELP ", "# EOF\n", "\n#", " # {", "} 1 1e3\n", "{", '\\"', "\r\n"],
  run(bytes) {
    for (const openMetrics of [false, true]) {
      const whole = joined(bytes, bytes, openMetrics, bytes.length);
      for (const cut of [0, 1, bytes.length >> 1, bytes.length - 1])
        if (joined(bytes, bytes, openMetrics, cut) !== whole)
          throw new Error(`cut at ${cut} it comes out differently`);
      if (whole !== "" && !whole.endsWith("\n")) throw new Error("its last line has no end");
      const seen = new Set<string>();
      for (const line of whole.split("\n")) {
        if (/^#[ \t]+EOF[ \t]*$/.test(line)) throw new Error("an end is left in the middle");
        const [, keyword, family] = ANNOUNCES.exec(line) ?? [];
        if (keyword === undefined) continue;
        if (seen.has(`${keyword} ${family}`)) throw new Error(`announced twice: ${line}`);
        seen.add(`${keyword} ${family}`);
      }
    }
  },
};
