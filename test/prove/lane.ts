import { expect } from "vitest";
import { requireRoot } from "../lab/acceptance.ts";
import type { Proof, ProofRow } from "./proof.ts";

/** A proof as a test: at the scale that a lane can afford, every row is told and holds. */
export async function quick(proof: Proof): Promise<readonly ProofRow[]> {
  requireRoot();
  const rows = await proof.run("quick");
  for (const { what, value, unit, bound } of rows) console.log(`${what}: ${value} ${unit} ${bound}`);
  expect(rows.filter(({ holds }) => !holds)).toEqual([]);
  return rows;
}
