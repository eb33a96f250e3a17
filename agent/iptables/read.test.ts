import { describe, expect, test } from "vitest";
import { MACHINE, WISH } from "../../test/fakes/capture.ts";
import { MemoryFiles } from "../../test/fakes/files.ts";
import type { Command, CommandResult } from "../platform/host.ts";
import { planCapture } from "./plan.ts";
import { readTable } from "./read.ts";

/** A kernel whose one table has these rules, as `iptables -S` prints them. */
function withRules(rules: readonly string[]) {
  const run = async ({ argv }: Command): Promise<CommandResult> => {
    const chains = argv.slice(argv.indexOf("read-chains") + 4);
    const answers = chains.map((chain) => {
      const own = rules.filter((rule) => rule.startsWith(`-A ${chain} `));
      return `${own.join("\n")}\0${own.length === 0 ? 1 : 0}\0`;
    });
    return { code: 0, stdout: answers.join(""), stderr: "" };
  };
  return { files: new MemoryFiles(), run };
}

const JUMP = { raw: "-A OUTPUT -p udp -j ISTIO_OUTPUT_DNS", nat: "-A OUTPUT -j ISTIO_OUTPUT" };
const TO_CALICO = '-A OUTPUT -m comment --comment "cali:tVnHkvAo15HuiPy0" -j cali-OUTPUT';
const CLEARS = "-A cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000";
const TO_HOST_ENDPOINT = "-A cali-OUTPUT -j cali-to-host-endpoint";
const ACCEPTED = "-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT";

/** Who keeps a packet from us in OUTPUT, if anybody, and by which rule. */
async function ahead(table: "raw" | "nat", rules: readonly string[]) {
  const plan = planCapture({ ...WISH, dns: { servers: ["10.0.0.2"] } }, MACHINE);
  const family = plan.families.find((it) => it.family === 4);
  if (family === undefined) throw new Error("the plan has no IPv4");
  const seen = await readTable(withRules([...rules, JUMP[table]]), plan, family, table);
  return seen.ahead.find(({ hook }) => hook === "OUTPUT");
}

const calico = async (table: "raw" | "nat", ...rules: string[]): Promise<string | undefined> =>
  (await ahead(table, [TO_CALICO, ...rules]))?.by;

describe("Calico's rules of table raw ahead of ours", () => {
  test("accept only what its own policy has marked, and without one nothing is", async () => {
    expect(await calico("raw", CLEARS, TO_HOST_ENDPOINT, ACCEPTED)).toBeUndefined();
  });

  test.for([
    { name: "the mark is not cleared before", rules: [ACCEPTED] },
    {
      name: "a policy sets the mark",
      rules: [
        CLEARS,
        TO_HOST_ENDPOINT,
        ACCEPTED,
        "-A cali-to-host-endpoint -p udp -j MARK --set-xmark 0x10000/0x10000",
      ],
    },
    {
      name: "some packets go around the rule that clears it",
      rules: [
        "-A cali-OUTPUT -j cali-clears",
        ACCEPTED,
        "-A cali-clears -o eth0 -j RETURN",
        "-A cali-clears -j MARK --set-xmark 0x0/0xf0000",
      ],
    },
    {
      name: "some packets do not come to the chain that clears it",
      rules: ["-A cali-OUTPUT -o eth0 -j cali-clears", ACCEPTED, "-A cali-clears -j MARK --set-xmark 0x0"],
    },
    {
      name: "a question is accepted as it is",
      rules: [CLEARS, "-A cali-OUTPUT -p udp --dport 53 -j ACCEPT"],
    },
  ])("keep a question from us where $name", async ({ rules }) => {
    expect(await calico("raw", ...rules)).toBe("calico");
  });

  test("drop what they would drop behind us, too", async () => {
    const drops = "-A cali-OUTPUT -m rpfilter --validmark --invert -j DROP";
    expect(await calico("raw", drops)).toBeUndefined();
    expect(await calico("nat", drops)).toBe("calico");
  });
});

test.for(["-A OUTPUT -p tcp -j RETURN", "-A OUTPUT -p tcp -g MORE"])(
  "%s in the hook itself ends it: there is no chain to come back to",
  async (line) => {
    expect(await ahead("nat", [line])).toMatchObject({ line });
    expect(await ahead("nat", ["-A OUTPUT -j OTHER", line.replace("OUTPUT", "OTHER")])).toBeUndefined();
  },
);
