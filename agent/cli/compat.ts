import { VmmeshError } from "../core/errors.ts";
import { RESOLV_CONF } from "../core/paths.ts";
import { canonicalAddress } from "../iptables/compat/address.ts";
import { compatFacts, type GivenFacts } from "../iptables/compat/facts.ts";
import { type FlagSpec, parseCompat } from "../iptables/compat/flags.ts";
import { compatRules } from "../iptables/compat/rules.ts";
import type { Options } from "./commands.ts";
import { list, openContext } from "./context.ts";

/** @throws {VmmeshError} USAGE if what belongs to --compat was typed without it */
export function wantsPeer(options: Options): boolean {
  if (options["compat"] !== undefined) return true;
  const lonely = STAND_INS.find(({ long }) => options[long] !== undefined);
  if (lonely === undefined) return false;
  throw new VmmeshError("USAGE", `--${lonely.long} means something only with --compat istio`, {
    next: "`vmmesh iptables plan --help` lists its options.",
  });
}

/** What stands in for facts of the machine, and may stand among the peer's own flags. */
const STAND_INS: readonly FlagSpec[] = ["family", "ipv6", "dns-server"].map((long) => ({
  long,
  kind: "text",
  default: "",
  meaning: "in the command table",
}));

/**
 * Prints what the peer's istio-iptables would apply, as text for one restore program; reads the machine and changes nothing.
 *
 * @throws {VmmeshError} USAGE, NO_ADDRESS or STATE_UNREADABLE where the peer ends with an error
 */
export async function planOfPeer(options: Options): Promise<number> {
  const { host } = openContext({});
  const config = parseCompat(list(options, "words"), process.env, STAND_INS);
  const given = (long: string): readonly string[] => config.own.get(long) ?? [];
  const oneOf = (long: string, known: readonly [string, string]): boolean | undefined => {
    const word = given(long).at(-1);
    if (word === undefined || known.includes(word)) return word === undefined ? undefined : word === known[0];
    throw new VmmeshError("USAGE", `--${long} is ${known.join(" or ")}, not \`${word}\``, {
      next: "`vmmesh iptables plan --help` lists its options.",
    });
  };
  const ipv6 = oneOf("ipv6", ["true", "false"]);
  const servers = given("dns-server").flatMap((item) => item.split(","));
  const strange = servers.find((server) => server !== "none" && canonicalAddress(server) === undefined);
  if (strange !== undefined)
    throw new VmmeshError("USAGE", `--dns-server is an address or none, not \`${strange}\``, {
      next: "Give the option once for each server.",
    });
  const facts: GivenFacts = {
    ...(ipv6 === undefined ? {} : { ipv6 }),
    ...(servers.length === 0 ? {} : { dnsServers: servers.filter((server) => server !== "none") }),
  };
  const machine = {
    addresses: host.net.addresses().map(({ address }) => address),
    resolvConf: await host.files.readText(RESOLV_CONF),
    passwd: await host.files.readText("/etc/passwd"),
  };
  const family = oneOf("family", ["ipv6", "ipv4"]) === true ? 6 : 4;
  process.stdout.write(compatRules(config, compatFacts(config, machine, facts), family));
  return 0;
}
