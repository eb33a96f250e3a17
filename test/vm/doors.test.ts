import { cpSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot, startApp } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { ATTEMPTS, asRoot, type Broken, inUnit, outside } from "./attempts.ts";
import { packageFile } from "./package.ts";

let lab: Lab;
let details: Machine;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("details");
  details = await lab.vm("details", { deb: packageFile(), packages: ["polkitd"] });
  await defineWorkload(lab, "details", 9080);
  await startApp(details, 9080);
  cpSync(await istioctlBundle(lab, "details"), `${details.root}/root/bundle`, { recursive: true });
  await details.exec("vmmesh join --bundle /root/bundle");
  // What nobody may read must be there to be read: it is written some seconds after Envoy has accepted its configuration.
  await waitFor("last-good", async () =>
    (await details.exec("test -s /var/lib/vmmesh/last-good", { allowFail: true })).code === 0
      ? true
      : undefined,
  );
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("details");
});

const attemptsOf = (who: Broken) => ATTEMPTS.filter(({ by }) => by === undefined || by === who);

/** `systemd-analyze security`, 0 to 10: as measured with systemd 252, and a tenth more. */
const EXPOSURE: Readonly<Record<string, number>> = {
  "vmmesh-agent": 1.7,
  "vmmesh-envoy": 1.4,
  "vmmesh-envoy-log": 0.5,
  "vmmesh-fence": 9.6,
  "vmmesh-hold": 2.1,
  "vmmesh-nftmon": 1.6,
  "vmmesh-order": 5.9,
  "vmmesh-rules": 5.6,
};

test("no unit is more exposed than it was when its sandbox was made", async () => {
  const units = (await details.exec("cd /usr/lib/systemd/system && ls vmmesh-*.service")).stdout.trim();
  const names = units.split("\n").map((name) => name.replace(".service", ""));
  expect(names.sort()).toEqual(Object.keys(EXPOSURE).sort());
  const numbers = await Promise.all(
    names.map(async (name) => {
      const { stdout } = await details.exec(["systemd-analyze", "security", "--no-pager", `${name}.service`]);
      return [name, Number(/exposure level for \S+: ([\d.]+)/.exec(stdout)?.[1])] as const;
    }),
  );
  console.log(numbers.map(([name, exposure]) => `${name.padEnd(20)}${exposure}`).join("\n"));
  expect(numbers.filter(([name, exposure]) => !(exposure <= (EXPOSURE[name] ?? 0)))).toEqual([]);
});

describe("a shell as the user of a broken part", () => {
  test("root succeeds at each attempt: what is refused below is refused for who asks", async () => {
    const tried = await asRoot(details, ATTEMPTS);
    expect(ATTEMPTS.filter((_, index) => tried[index] !== 0).map(({ what }) => what)).toEqual([]);
  });

  test.for(["agent", "envoy"] as const)("the %s's gets nowhere, in its unit or outside", async (who) => {
    const attempts = attemptsOf(who);
    const unit = await inUnit(details, who, attempts);
    const free = await outside(details, who, attempts);
    const word = (status: number | undefined) => (status === 0 ? "DONE" : "refused");
    const rows = attempts.map(({ what, harmlessOutside = false }, index) => ({
      what,
      inUnit: word(unit[index]),
      outside: harmlessOutside ? "(harmless)" : word(free[index]),
    }));
    console.log(
      [
        `${`as the ${who}'s user`.padEnd(56)}in its unit  outside`,
        ...rows.map((row) => `${row.what.padEnd(56)}${row.inUnit.padEnd(13)}${row.outside}`),
      ].join("\n"),
    );
    expect(rows.filter((row) => row.inUnit === "DONE" || row.outside === "DONE")).toEqual([]);
  });
});
