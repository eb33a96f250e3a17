import { describe, expect, test } from "vitest";
import { VmmeshError } from "../core/errors.ts";
import { parseLabels } from "./labels.ts";

describe("--labels", () => {
  test("keys with and without a prefix, empty values, the later of two", () => {
    const words = ["app=details", "version=v1", "app.kubernetes.io/name=x", "empty=", "version=v2"];
    expect(parseLabels(words)).toEqual({
      app: "details",
      version: "v2",
      "app.kubernetes.io/name": "x",
      empty: "",
    });
  });

  test.for([
    "app",
    "=x",
    "a b=c",
    "a=b c",
    "a=b=c",
    "a/b/c=d",
    "/a=b",
    "-a=b",
    "a=-",
    `a=${"x".repeat(64)}`,
    "a=$(x)",
  ])("refuses `%s`", (word) => {
    expect(() => parseLabels([word])).toThrow(VmmeshError);
    expect(() => parseLabels([word])).toThrow(`--labels ${word} is not a label`);
  });
});
