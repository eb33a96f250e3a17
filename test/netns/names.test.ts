import { test } from "vitest";
import { quick } from "../prove/lane.ts";
import { proof } from "../prove/names.ts";

test("10,000 services: a table of them is small, quick, and no answer waits for it to be built", () =>
  quick(proof));
