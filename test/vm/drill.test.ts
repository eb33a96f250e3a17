import { afterAll, beforeAll, expect, test } from "vitest";
import { type Fault, holds } from "../drill/fault.ts";
import { fault as frozen } from "../drill/faults/frozen.ts";
import { fault as killed } from "../drill/faults/killed.ts";
import { fault as rulesFlushed } from "../drill/faults/rules-flushed.ts";
import { Stage } from "../drill/stage.ts";
import { requireRoot } from "../lab/acceptance.ts";

/** Each of these is over in less than 3 s on two cores that do nothing else; 12 s were seen with a load of 29. */
const RECOVERED_WITHIN_MS = 30_000;

/** The drill's own machinery, and the faults that cost seconds. All of them: `npm run drill`. */
let stage: Stage;

beforeAll(async () => {
  requireRoot();
  stage = await Stage.open();
  console.log("versions:", JSON.stringify(await stage.lab.versions()));
});

afterAll(async () => {
  await stage?.close();
});

test.for<Fault>([frozen, killed, rulesFlushed])("$name: every promise holds", async (fault) => {
  const rows = (await fault.run(stage, "quick")).filter(({ side }) => side === "vmmesh");
  console.log(JSON.stringify(rows));
  expect(rows).not.toEqual([]);
  expect(rows.filter((row) => !holds(row) || (row.recoverMs ?? 0) > RECOVERED_WITHIN_MS)).toEqual([]);
});
