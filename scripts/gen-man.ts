import { writeFileSync } from "node:fs";
import { manPage } from "../agent/cli/man.ts";
import { VERSION } from "../agent/core/version.ts";

writeFileSync(new URL("../packaging/man/vmmesh.1", import.meta.url), manPage(VERSION));
