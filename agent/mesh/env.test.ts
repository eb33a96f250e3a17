import { execFileSync } from "node:child_process";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { isMeshKey, parseEnv, renderEnv } from "./env.ts";

const parsed = (text: string): Record<string, string> => Object.fromEntries(parseEnv(text, "cluster.env"));

describe("parseEnv", () => {
  test.for([
    {
      name: "a line of istioctl",
      text: "CANONICAL_REVISION='latest'\n",
      want: { CANONICAL_REVISION: "latest" },
    },
    { name: "an empty value of istioctl", text: "TRUST_DOMAIN=''\n", want: { TRUST_DOMAIN: "" } },
    { name: "istioctl's quote in a quote", text: `A='it'"'"'s'\n`, want: { A: "it's" } },
    { name: "a person's plain word", text: "A=1", want: { A: "1" } },
    { name: "nothing at all", text: "A=\nB=2\n", want: { A: "", B: "2" } },
    { name: "export, spaces and tabs", text: " \texport A=1\n", want: { A: "1" } },
    { name: "several in a line, with ; and without", text: "A=1 B=2; C=3", want: { A: "1", B: "2", C: "3" } },
    { name: "comments, whole and at the end", text: "# one\nA=1 # two\nB=x#y\n", want: { A: "1", B: "x#y" } },
    { name: "concatenation of all quotes", text: `A=a"b c"'d e'\\ f`, want: { A: "ab cd e f" } },
    {
      name: "escapes in double quotes",
      text: String.raw`A="a\"b\\c\$d\x"`,
      want: { A: String.raw`a"b\c$d\x` },
    },
    { name: "a line continued", text: 'A=1\\\n2\nB="x\\\ny"', want: { A: "12", B: "xy" } },
    { name: "quotes over lines", text: "A='one\ntwo'\nB=3", want: { A: "one\ntwo", B: "3" } },
    { name: "no expansion in single quotes", text: "A='$(reboot) `x` ~'", want: { A: "$(reboot) `x` ~" } },
    { name: "a star is a star in an assignment", text: "A=*", want: { A: "*" } },
    { name: "the later of two wins", text: "A=1\nA=2", want: { A: "2" } },
  ])("$name", ({ text, want }) => {
    expect(parsed(text)).toEqual(want);
  });

  test.for([
    { name: "a command", text: "A=1\nreboot\n", want: "line 2: `reboot` is not an assignment" },
    { name: "a command after an assignment", text: "A=1 reboot", want: "`reboot` is not an assignment" },
    { name: "set -a", text: "set -a", want: "`set` is not an assignment" },
    { name: "a variable", text: "\nA=$HOME", want: "line 2: has an unquoted `$`" },
    { name: "a variable in double quotes", text: 'A="$HOME"', want: "has a `$` in double quotes" },
    { name: "a substitution", text: "A=`hostname`", want: "has an unquoted ``" },
    { name: "a home folder", text: "A=~/x", want: "has an unquoted `~`" },
    { name: "a pipe", text: "A=1|sh", want: "has an unquoted `|`" },
    {
      name: "an open single quote, by the line it began in",
      text: "A=1\nB='x\ny\n",
      want: "line 2: a single quote is never closed",
    },
    { name: "an open double quote", text: 'B="x', want: "a double quote is never closed" },
    { name: "a file from Windows", text: "A=1\r\n", want: "line 1: holds a carriage return" },
    { name: "a NUL byte", text: "A='\0'", want: "holds a NUL byte" },
    { name: "appending", text: "A+=1", want: "is not an assignment" },
    { name: "a quoted name", text: "'A'=1", want: "cannot be quoted" },
  ])("refuses $name", ({ text, want }) => {
    expect(() => parsed(text)).toThrow(want);
    expect(() => parsed(text)).toThrow(/^cluster\.env, line \d+: /);
  });
});

const key = fc.stringMatching(/^[A-Z_][A-Z0-9_]{0,12}$/);
const value = fc.string({ unit: "binary" }).filter((text) => !/[\0\r]/.test(text) && text.isWellFormed());

describe("renderEnv", () => {
  test("what is rendered is read back", () => {
    fc.assert(
      fc.property(fc.dictionary(key, value), (values) => {
        expect(parsed(renderEnv(Object.entries(values), { order: "sorted" }))).toEqual({ ...values });
      }),
    );
  });

  test("a shell that sources it gets the same values and runs nothing", () => {
    const nasty = fc.oneof(
      value,
      fc.constantFrom("$(kill $$)", "`exit 9`", "';exit 9;'", "\\", "\n# x", "a'b\"c$d"),
    );
    // Keys start with X_: a shell gives some other names a meaning of their own.
    fc.assert(
      fc.property(fc.array(nasty, { minLength: 1, maxLength: 8 }), (values) => {
        const entries = values.map((text, index) => [`X_${index}`, text] as const);
        const comments = Object.fromEntries(entries.map(([name, text]) => [name, text]));
        expect(
          sourced(
            renderEnv(entries, { comments }),
            entries.map(([name]) => name),
          ),
        ).toEqual(values);
      }),
      { numRuns: 40 },
    );
  });

  test("comments stand above their key, the header above all", () => {
    expect(
      renderEnv(
        [
          ["B", "2"],
          ["A", "1"],
        ],
        { header: "made by a test\nnow", comments: { A: "the first" } },
      ),
    ).toBe("# made by a test\n# now\n\nB='2'\n# the first\nA='1'\n");
  });

  test.for(["a", "A-B", "A B", "1A", "", "A\nB", "É"])("refuses the key `%s`", (name) => {
    expect(() => renderEnv([[name, ""]])).toThrow("cannot be a key of an environment file");
  });
});

/** What /bin/sh has in its variables after it sourced `text` the way istio-start.sh does. */
function sourced(text: string, names: readonly string[]): string[] {
  const print = names.map((name) => `printf '%s\\0' "$${name}"`).join("\n");
  const output = execFileSync("/bin/sh", ["-ea"], { input: `${text}${print}\n`, env: {}, encoding: "utf8" });
  return output.split("\0").slice(0, -1);
}

describe("keys that the mesh may set", () => {
  test.for([
    ["ISTIO_META_NETWORK", true],
    ["CANONICAL_SERVICE", true],
    ["TRUST_DOMAIN", true],
    ["CLUSTER_MESH_CONFIG_VALUE", true],
    ["NODE_OPTIONS", false],
    ["LD_PRELOAD", false],
    ["PATH", false],
    ["BASH_ENV", false],
    ["IFS", false],
    ["VMMESH_ENVOY", false],
    ["ISTIO_BIN_BASE", false],
    ["ISTIO_AGENT_FLAGS", false],
    ["PROXY_CONFIG", false],
    ["PROXY_UID", false],
    ["istio_meta", false],
  ] as const)("%s: %s", ([name, want]) => {
    expect(isMeshKey(name)).toBe(want);
  });
});
