import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { Exposition } from "./exposition.ts";

function joined(bodies: readonly string[], options: { cut?: number; openMetrics?: boolean } = {}): string {
  const exposition = new Exposition();
  let out = "";
  for (const body of bodies) {
    const part = exposition.part(options.openMetrics ?? false);
    const bytes = Buffer.from(body);
    const cut = options.cut ?? bytes.length + 1;
    for (let at = 0; at < bytes.length; at += cut) out += part.push(bytes.subarray(at, at + cut)).join("");
    out += part.end().join("");
  }
  return out;
}

describe("Exposition", () => {
  test.for([
    {
      name: "a family that two bodies announce is announced once",
      bodies: [
        "# HELP a x\n# TYPE a counter\na 1\n",
        '# HELP a y\n# TYPE a gauge\na{b="2"} 2\n# TYPE c gauge\nc 3\n',
      ],
      want: '# HELP a x\n# TYPE a counter\na 1\na{b="2"} 2\n# TYPE c gauge\nc 3\n',
    },
    {
      name: "# EOF ends nothing but its own body",
      bodies: ["a 1\n# EOF\n", "b 2\n# EOF"],
      want: "a 1\nb 2\n",
    },
    { name: "a missing last line break is added", bodies: ["a 1", "b 2"], want: "a 1\nb 2\n" },
    {
      name: "other comments and empty lines pass",
      bodies: ["# hello there\n\na 1\n"],
      want: "# hello there\n\na 1\n",
    },
    { name: "an empty body is nothing", bodies: ["", "a 1\n", ""], want: "a 1\n" },
    { name: "a # inside a line is no comment", bodies: ['a{b="# TYPE x"} 1\n'], want: 'a{b="# TYPE x"} 1\n' },
  ])("$name", ({ bodies, want }) => {
    expect(joined(bodies)).toBe(want);
  });

  test("the result does not depend on how the stream is cut", () => {
    const line = fc.constantFrom(
      "# TYPE a counter",
      "# TYPE b gauge",
      "# HELP a é",
      "# EOF",
      "a 1",
      'b{c="#"} 2',
      "",
      "# note",
    );
    fc.assert(
      fc.property(
        fc.array(
          fc.array(line).map((lines) => lines.join("\n")),
          { maxLength: 4 },
        ),
        fc.integer({ min: 1, max: 9 }),
        (bodies, cut) => {
          expect(joined(bodies, { cut })).toBe(joined(bodies));
        },
      ),
    );
  });

  test("OpenMetrics becomes plain text", () => {
    const body = [
      "# TYPE req counter",
      "# UNIT req requests",
      'req_total{path="a b"} 5 # {trace="x"} 1 1520879607.789',
      "# TYPE build info",
      "build_info 1",
      "# TYPE t gauge",
      't{x="}"} 2 1520879607.789',
      "t 3",
      "# EOF",
    ].join("\n");
    expect(joined([body], { openMetrics: true })).toBe(
      '# TYPE req_total counter\n# UNIT req requests\nreq_total{path="a b"} 5\nbuild_info 1\n# TYPE t gauge\nt{x="}"} 2 1520879607789\nt 3\n',
    );
  });

  test("a line without end is refused", () => {
    const part = new Exposition().part(false);
    expect(() => part.push(Buffer.alloc(1024 * 1024 + 1, 97))).toThrow("longer than 1 MiB");
  });
});
