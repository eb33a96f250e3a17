import { VmmeshError } from "../core/errors.ts";
import { PORTS } from "../core/paths.ts";
import { isRoutable } from "../dns/routed.ts";
import type { Host } from "../platform/host.ts";

/** resolved takes servers and domains for a link only, and refuses loopback and links that systemd-networkd manages. */
export const LINK = "vmmesh0";
const PEER = "vmmesh0p";
/** A link counts for resolved when it is up and has an address of more than link scope; nobody sends to this one. */
const ADDRESS = "169.254.53.53/32";

/**
 * Has systemd-resolved (246 or later: a server with a port) send the questions below these domains to the agent, and no
 * others. Given again, it replaces what was.
 *
 * @param domains as resolved.conf(5) writes them
 * @throws {VmmeshError} USAGE for a domain that is none, COMMAND_FAILED with what `ip` or `resolvectl` said
 */
export async function routeNames(host: Pick<Host, "run">, domains: readonly string[]): Promise<void> {
  const strange = domains.find((domain) => !isRoutable(domain));
  if (strange !== undefined || domains.length === 0) {
    throw new VmmeshError("USAGE", `not a domain to route: ${JSON.stringify(strange ?? "")}`, {
      next: "Report this: the agent sends only domains of two labels or more.",
    });
  }
  const works = async (argv: readonly [string, ...string[]]): Promise<boolean> =>
    (await host.run({ argv })).code === 0;
  // `resolvectl` would start what the operator has stopped.
  await must(host, ["systemctl", "is-active", "systemd-resolved.service"]);
  if (!(await works(["ip", "link", "show", "dev", LINK]))) {
    // A kernel without the module `dummy` may have `veth`.
    if (!(await works(["ip", "link", "add", LINK, "type", "dummy"])))
      await must(host, ["ip", "link", "add", LINK, "type", "veth", "peer", "name", PEER]);
  }
  if (await works(["ip", "link", "show", "dev", PEER])) await must(host, ["ip", "link", "set", PEER, "up"]);
  await must(host, ["ip", "address", "replace", ADDRESS, "dev", LINK, "scope", "global"]);
  await must(host, ["ip", "link", "set", LINK, "up"]);
  // The server last: until then no question goes this way, and never one that is not ours.
  for (const [setting, ...values] of [
    ["default-route", "no"],
    ["llmnr", "no"],
    ["mdns", "no"],
    ["dnssec", "no"],
    ["dnsovertls", "no"],
    ["domain", ...domains],
    ["dns", `127.0.0.1:${PORTS.dns}`],
  ] as const)
    await must(host, ["resolvectl", setting, LINK, ...values]);
}

/** Takes the link away, and with it all that resolved was told. */
export async function unrouteNames(host: Pick<Host, "run">): Promise<void> {
  await host.run({ argv: ["ip", "link", "delete", "dev", LINK] });
}

async function must(host: Pick<Host, "run">, argv: readonly [string, ...string[]]): Promise<void> {
  const { code, stdout, stderr } = await host.run({ argv });
  if (code === 0) return;
  throw new VmmeshError(
    "COMMAND_FAILED",
    `${argv.slice(0, 3).join(" ")}: ${(stderr.trim() || stdout.trim()).split("\n")[0]}`,
    {
      next: `Is ${LINK} managed by systemd-networkd, or systemd older than 246? \`resolvectl status\` says.`,
    },
  );
}
