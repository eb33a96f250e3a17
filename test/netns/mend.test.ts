import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { loadConfirmed } from "../../agent/iptables/load.ts";
import { removeCapture } from "../../agent/iptables/remove.ts";
import { Lab, REMOTE, SERVICE, UID } from "./lab.ts";

/** The first, quick repair: the shell script that was rendered when the rules were applied. */
let lab: Lab;
beforeEach(async () => {
  lab = await Lab.make();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const apply = async () => lab.apply();
const script = () => `${lab.rulesDir}/confirmed/mend.sh`;
const mend = () => lab.inside(["sh", script()]);
const outputs = async (family: "" | "6" = "") =>
  (await lab.insideShell(`ip${family}tables-nft -t nat -S OUTPUT`))
    .split("\n")
    .filter((line) => line.startsWith("-A"));

const DNAT = `-d ${SERVICE.ip}/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination ${REMOTE.ip}:8080`;

describe("the quick repair", () => {
  beforeEach(async () => {
    await (await apply()).confirm();
  });

  test("writes nothing where all is in place", async () => {
    const before = await lab.firewall();
    const handles = await lab.insideShell("nft -a list table ip nat; nft -a list table ip vmmesh");
    expect(await mend()).toEqual({ code: 0, stdout: "", stderr: "" });
    expect(await lab.insideShell("nft -a list table ip nat; nft -a list table ip vmmesh")).toBe(handles);
    expect(await lab.firewall()).toEqual(before);
  });

  test.for([
    {
      name: "KUBE-SERVICES",
      rules: ["-N KUBE-SERVICES", `-A KUBE-SERVICES ${DNAT}`, "-I OUTPUT 1 -j KUBE-SERVICES"],
    },
    { name: "a person's DNAT", rules: [`-I OUTPUT 1 ${DNAT}`] },
    {
      name: "a chain of a name that says nothing, with a DNAT in it",
      rules: [
        "-N OTHER",
        `-A OTHER ${DNAT}`,
        "-I OUTPUT 1 -m comment --comment 'it says \"-j MARK\"' -j OTHER",
      ],
    },
    { name: "a goto, from where nothing comes back", rules: ["-N OTHER", "-I OUTPUT 1 -g OTHER"] },
    { name: "a RETURN in the hook itself, which ends it", rules: ["-I OUTPUT 1 -p tcp -j RETURN"] },
    {
      name: "a rule whose comment holds our jump, quotes and a command",
      rules: [
        `-I OUTPUT 1 -m comment --comment 'a "x" -j ISTIO_OUTPUT $(touch /tmp/vmmesh-bad) \`b\`' -j ACCEPT`,
      ],
    },
  ])("$name ahead of us goes behind, as it was; said once, with its owner", async ({ rules }) => {
    await lab.insideShell(rules.map((rule) => `iptables-nft -t nat ${rule}`).join("\n"));
    const [foreign] = await outputs();
    expect(foreign).not.toMatch(/ISTIO_OUTPUT$/);
    expect(await mend()).toMatchObject({ code: 0, stderr: "" });
    const now = await outputs();
    expect(now).toHaveLength(2);
    expect(now[0]).toMatch(/-j ISTIO_OUTPUT$/);
    expect(now[1]).toBe(foreign);
    const after = await lab.firewall();
    await mend();
    expect(await lab.firewall()).toEqual(after);
    const { repaired } = await loadConfirmed(lab.host, lab.rulesDir);
    expect(repaired).toHaveLength(1);
    expect(repaired[0]).toContain(`\`${foreign}\` stood ahead of us`);
    expect(await loadConfirmed(lab.host, lab.rulesDir)).toMatchObject({ state: "in place" });
    expect(await lab.host.files.stat("/tmp/vmmesh-bad")).toBeUndefined();
  });

  test.for([
    { name: "iptables -t nat -F", wipe: "iptables-nft -t nat -F" },
    { name: "iptables -t nat -F OUTPUT", wipe: "iptables-nft -t nat -F OUTPUT" },
    {
      name: "iptables and ip6tables -t nat -F and -X",
      wipe: "iptables-nft -t nat -F; iptables-nft -t nat -X; ip6tables-nft -t nat -F; ip6tables-nft -t nat -X",
    },
    { name: "nft delete table", wipe: "nft delete table ip nat; nft delete table ip6 vmmesh" },
    { name: "the fence alone", wipe: "nft delete table inet vmmesh-fence" },
  ])("$name: all is back as it was", async ({ wipe }) => {
    const before = await lab.firewall();
    await lab.insideShell(wipe);
    expect(await mend()).toMatchObject({ code: 0, stderr: "" });
    expect(await lab.firewall()).toEqual(before);
    expect((await loadConfirmed(lab.host, lab.rulesDir)).state).toBe("repaired");
    expect(await lab.firewall()).toEqual(before);
  });

  test("nft flush ruleset: nat, guard and fence at once, the rest by the careful repair", async () => {
    await lab.populate();
    const before = await lab.firewall();
    await lab.insideShell("nft flush ruleset");
    expect(await mend()).toMatchObject({ code: 0, stderr: "" });
    expect(await lab.dial(UID.app, SERVICE.ip, 80)).toBe("ENVOY-OUT");
    expect(await lab.dial(UID.app, SERVICE.ip6, 80)).toBe("ENVOY-OUT");
    expect((await outputs("6"))[0]).toContain("ISTIO_OUTPUT");
    await loadConfirmed(lab.host, lab.rulesDir);
    expect(await lab.firewall()).toEqual(before);
  });

  test("a harmless rule ahead, and chains that hold nothing that diverts, are left where they are", async () => {
    await lab.insideShell(
      "iptables-nft -t nat -N cali-OUTPUT; iptables-nft -t nat -I OUTPUT 1 -j cali-OUTPUT; iptables-nft -t nat -I OUTPUT 1 -m comment --comment ' -j ACCEPT ' -j MARK --set-mark 0x1/0x1",
    );
    const before = await lab.firewall();
    await mend();
    expect(await lab.firewall()).toEqual(before);
  });

  test("started twice at the same time there is still one jump", async () => {
    await lab.insideShell(
      "iptables-nft -t nat -N KUBE-SERVICES; iptables-nft -t nat -I OUTPUT 1 -j KUBE-SERVICES",
    );
    await Promise.all([mend(), mend()]);
    expect((await outputs()).filter((line) => line.endsWith("ISTIO_OUTPUT"))).toHaveLength(1);
  });
});

test("while other rules are on trial it does nothing", async () => {
  await (await apply()).confirm();
  const trial = await apply();
  await lab.insideShell("iptables-nft -t nat -F");
  const before = await lab.firewall();
  expect(await mend()).toMatchObject({ code: 0 });
  expect(await lab.firewall()).toEqual(before);
  await trial.rollBack();
});

test("nothing confirmed, or removed: there is no script to run", async () => {
  const trial = await apply();
  expect(await lab.host.files.stat(script())).toBeUndefined();
  await trial.confirm();
  expect((await lab.host.files.stat(script()))?.kind).toBe("file");
  await removeCapture(lab.host, lab.rulesDir);
  expect(await lab.host.files.stat(script())).toBeUndefined();
});
