import { expect, test } from "vitest";
import { TYPE_URL } from "../proto/discovery.ts";
import { Refusals } from "./refusals.ts";

const LDS = TYPE_URL.listener;
// With the form of words that Envoy 1.36 and 1.40 were seen to have for clusters.
const REASON = "Error adding/updating listener(s) 0.0.0.0_8080: Didn't find a registered implementation";

type Answer = readonly [names: readonly string[], reason?: string];

test.for<{ name: string; answers: readonly Answer[]; whole?: boolean; stands: readonly string[] }>([
  { name: "an ACK is none", answers: [[["a"]]], stands: [] },
  { name: "a NACK stands", answers: [[["a"], "a: no"]], stands: ["a: no"] },
  {
    name: "the ACK of something else does not end it",
    answers: [[["a"], "a: no"], [["b"]]],
    stands: ["a: no"],
  },
  { name: "the ACK of the same ends it", answers: [[["a"], "a: no"], [["a"]]], stands: [] },
  {
    name: "what came beside the one that is named is not refused",
    answers: [[["0.0.0.0_80", "0.0.0.0_8080"], REASON], [["0.0.0.0_8080"]]],
    stands: [],
  },
  {
    name: "two in one response are two: both have to be accepted",
    answers: [[["a", "b"], "a: no, b: no"], [["a"]]],
    stands: ["a: no, b: no"],
  },
  { name: "words without a name: the next ACK ends it", answers: [[["a"], "no"], [["b"]]], stands: [] },
  {
    name: "another reason takes the place of the first",
    answers: [
      [["a"], "a: no"],
      [["a"], "a: never"],
    ],
    stands: ["a: never"],
  },
  {
    name: "state of the world: what is not in the next whole response is no more",
    answers: [[["a", "b"], "a: no"], [["b"]]],
    whole: true,
    stands: [],
  },
])("$name", ({ answers, whole = false, stands }) => {
  const refusals = new Refusals();
  for (const [names, reason] of answers) refusals.answered(LDS, names, whole, reason);
  expect(refusals.list()).toEqual(stands.map((reason) => ({ typeUrl: LDS, reason })));
});

test("types do not answer for each other", () => {
  const refusals = new Refusals();
  refusals.answered(LDS, ["a"], false, "a: no");
  refusals.answered(TYPE_URL.cluster, ["a"], false, undefined);
  expect(refusals.list()).toHaveLength(1);
});

test("what Envoy does not want any more is not refused; nor is anything when it wants nothing of the type", () => {
  const refusals = new Refusals();
  refusals.answered(LDS, ["a", "b"], false, "a: no, b: no");
  refusals.unwanted(LDS, ["a"], true);
  expect(refusals.list()).toHaveLength(1);
  refusals.unwanted(LDS, ["b"], true);
  expect(refusals.list()).toEqual([]);
  refusals.answered(LDS, ["c"], false, "no name in it");
  refusals.unwanted(LDS, ["d"], true);
  expect(refusals.list()).toHaveLength(1);
  refusals.unwanted(LDS, ["c"], false);
  expect(refusals.list()).toEqual([]);
});
