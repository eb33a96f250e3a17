import { UNITS } from "../../platform/services.ts";
import { HELD_TABLE } from "../nft.ts";
import type { CapturePlan } from "../plan.ts";
import type { Evidence, Surroundings } from "./evidence.ts";
import { type Finding, finding, when } from "./finding.ts";

/** Units that put our rules right, or hold them, at boot. */
const OURS_AT_BOOT: readonly string[] = [UNITS.fence, UNITS.repairRun];
const LISTENER = UNITS.monitor;
/** So many repairs in ten minutes are no accident. */
const FLAPPING = 3;

/** Files that decide whether another program wipes tables that are not its own (firewall.md 1.2; their manual pages). */
export const RIVAL_CONFIG = [
  "/etc/nftables.conf",
  "/etc/sysconfig/nftables.conf",
  "/etc/iptables/rules.v4",
  "/etc/iptables/rules.v6",
  "/etc/sysconfig/iptables",
  "/etc/sysconfig/ip6tables",
  "/etc/default/netfilter-persistent",
  "/etc/default/ufw",
  "/etc/ufw/ufw.conf",
  "/etc/firewalld/direct.xml",
  "/etc/firewalld/firewalld.conf",
] as const;
/** Units whose start, reload or stop may do it. */
export const RIVAL_UNITS = [
  "nftables.service",
  "netfilter-persistent.service",
  "iptables.service",
  "ip6tables.service",
  "firewalld.service",
  "ufw.service",
  "ferm.service",
  "shorewall.service",
  "csf.service",
] as const;
/** Ours, asked for in the same question. */
export const OUR_UNITS = [LISTENER, ...OURS_AT_BOOT] as const;

interface Wiper {
  readonly unit: string;
  readonly why: string;
}

/** The machine's target runs, and nobody holds the second fence. */
export function heldFindings({ around, baseChains }: Evidence, plan: CapturePlan): Finding[] {
  const missing =
    plan.fence.length > 0 &&
    plan.units === undefined &&
    around.units.some(({ id, active }) => id === LISTENER && active) &&
    !baseChains.some(({ table }) => table === HELD_TABLE);
  return when(missing ? [`there is no table ${HELD_TABLE}`] : [], (lines) =>
    finding(
      "FW048",
      "medium",
      "the second fence, which stands through `nft flush ruleset`, is not held",
      lines,
      "Its process has ended, or was never started; until it runs, a wipe of the whole ruleset opens the mesh until the repair.",
      `systemctl restart ${UNITS.hold}`,
    ),
  );
}

/** Other programs that take our rules away, have taken them, or will at boot. */
export function rivalFindings(evidence: Evidence, plan: CapturePlan): Finding[] {
  const { around } = evidence;
  const running = new Set(
    around.units.filter(({ active, enabled }) => active || enabled).map(({ id }) => id),
  );
  const wipers = [
    ...wipersOf(around).filter(({ unit }) => running.has(unit)),
    ...["ferm.service", "shorewall.service", "csf.service"]
      .filter((unit) => running.has(unit))
      .map((unit) => ({ unit, why: "it writes every table anew" })),
  ];
  // Where the kernel tells of every change, a wipe is mended at once and the guard captures meanwhile.
  const heard = plan.backend !== "legacy" && around.units.some(({ id, active }) => id === LISTENER && active);
  const late = wipers.filter(
    ({ unit }) =>
      around.units.some(({ id, enabled }) => id === unit && enabled) &&
      !around.units.some(({ id, after }) => OURS_AT_BOOT.includes(id) && after.includes(unit)),
  );
  const [first] = late;
  return [
    ...when(
      wipers.map(({ unit, why }) => `${unit}: ${why}`),
      (lines) =>
        finding(
          "FW030",
          heard ? "low" : "high",
          heard
            ? "another program wipes tables when it starts or reloads; they are put right at once"
            : "another program wipes tables when it starts or reloads",
          lines,
          "Let it load its own tables only, or start vmmesh's listener for changes.",
          heard ? "" : `systemctl start ${LISTENER}`,
        ),
    ),
    ...(first === undefined
      ? []
      : [
          finding(
            "FW032",
            heard ? "low" : "medium",
            "at boot our rules may be loaded first and wiped then",
            late.map(({ unit }) => `neither ${OURS_AT_BOOT.join(" nor ")} is ordered after ${unit}`),
            "Order ours after it.",
            `install -d /etc/systemd/system/${UNITS.repairRun}.d && printf '[Unit]\\nAfter=${late.map(({ unit }) => unit).join(" ")}\\n' >/etc/systemd/system/${UNITS.repairRun}.d/after.conf && systemctl daemon-reload`,
          ),
        ]),
    ...(around.repairs.length < FLAPPING
      ? []
      : [
          finding(
            "FW033",
            "high",
            `our rules had to be put right ${around.repairs.length} times within ten minutes`,
            [...new Set(around.repairs.flat())],
            "Find out why the program that is named writes its rules again and again.",
            "journalctl -u vmmesh-agent -u vmmesh-rules --since -10min",
          ),
        ]),
  ];
}

function wipersOf({ config, firewalldVersion }: Surroundings): Wiper[] {
  const found: Wiper[] = [];
  const flushes = (["/etc/nftables.conf", "/etc/sysconfig/nftables.conf"] as const).find((file) =>
    /^\s*flush ruleset/m.test(config[file] ?? ""),
  );
  if (flushes !== undefined) found.push({ unit: "nftables.service", why: `${flushes} says flush ruleset` });
  if (!/^\s*IPTABLES_RESTORE_NOFLUSH=["']?yes/m.test(config["/etc/default/netfilter-persistent"] ?? "")) {
    for (const [unit, files] of [
      ["netfilter-persistent.service", ["/etc/iptables/rules.v4", "/etc/iptables/rules.v6"]],
      ["iptables.service", ["/etc/sysconfig/iptables"]],
      ["ip6tables.service", ["/etc/sysconfig/ip6tables"]],
    ] as const) {
      for (const file of files) {
        const tables = [...(config[file] ?? "").matchAll(/^\*(nat|mangle|raw)\s*$/gm)].map(
          ([, name]) => name,
        );
        if (tables.length > 0)
          found.push({ unit, why: `${file} replaces the whole of ${tables.join(", ")}` });
      }
    }
  }
  if (
    /^\s*MANAGE_BUILTINS=["']?yes/m.test(config["/etc/default/ufw"] ?? "") &&
    /^\s*ENABLED=["']?yes/m.test(config["/etc/ufw/ufw.conf"] ?? "")
  )
    found.push({ unit: "ufw.service", why: "/etc/default/ufw says MANAGE_BUILTINS=yes" });
  const why = firewalldWipes(config, firewalldVersion);
  if (why !== undefined) found.push({ unit: "firewalld.service", why });
  return found;
}

/** Since 2.0.0 firewalld leaves iptables alone, unless it has rules of its own there. */
function firewalldWipes(config: Surroundings["config"], version: string | undefined): string | undefined {
  const major = Number(version?.split(".")[0] ?? Number.NaN);
  if (major < 2) return `version ${version} flushes every iptables table when it starts, reloads and stops`;
  if (/<(rule|chain|passthrough)\b/.test(config["/etc/firewalld/direct.xml"] ?? ""))
    return "/etc/firewalld/direct.xml has rules: with them it flushes the iptables tables";
  if (/^\s*FirewallBackend=iptables/m.test(config["/etc/firewalld/firewalld.conf"] ?? ""))
    return "/etc/firewalld/firewalld.conf says FirewallBackend=iptables";
  return undefined;
}
