import { VmmeshError } from "../core/errors.ts";
import { USERS } from "../core/paths.ts";
import type { Host, Owner } from "./host.ts";

/** Who owns what. The agent's group is also the one that may connect to its sockets. */
export interface Owners {
  readonly root: Owner;
  readonly agent: Owner;
  readonly envoy: Owner;
}

/**
 * Ids for machines without our package (the demo's namespaces): above Debian's dynamic system range, below `nobody`,
 * in nobody's allocation (Debian policy 9.2.2). One group for both: a process started by uid has no further groups.
 */
const WITHOUT_PACKAGE = { agent: { uid: 64_990, gid: 64_990 }, envoy: { uid: 64_991, gid: 64_990 } };

/** (uid_t) -1, which means "leave it" to chown(2) and is nobody's. */
const NO_ID = 2 ** 32 - 1;

/**
 * A user's or a group's number, by NSS. A number stands for itself, as for iptables.
 *
 * @throws {VmmeshError} USAGE naming what does not exist
 */
export async function idOf(host: Pick<Host, "run">, kind: "user" | "group", name: string): Promise<number> {
  if (/^\d{1,10}$/.test(name) && Number(name) < NO_ID) return Number(name);
  // A name that begins with a dash would be an option.
  const { code, stdout } = await host.run({
    argv: ["getent", "--", kind === "user" ? "passwd" : "group", name],
  });
  const [, , id] = stdout.trim().split(":");
  if (code === 0 && id !== undefined) return Number(id);
  throw new VmmeshError("USAGE", `there is no ${kind} \`${name}\` on this machine`, {
    next: `Make it first, or give another: \`getent ${kind === "user" ? "passwd" : "group"}\` lists them.`,
  });
}

/**
 * Looks the two system users up by NSS, as every other program does.
 *
 * @param packaged false: fall back to fixed numeric ids where the users do not exist
 * @throws {VmmeshError} STATE_UNREADABLE if a user is missing on a machine that should have it
 */
export async function readOwners(host: Pick<Host, "run">, packaged: boolean): Promise<Owners> {
  const find = async (name: string, fallback: Owner): Promise<Owner> => {
    const { code, stdout } = await host.run({ argv: ["getent", "passwd", name] });
    const [, , uid, gid] = stdout.trim().split(":");
    if (code === 0 && uid !== undefined && gid !== undefined) return { uid: Number(uid), gid: Number(gid) };
    if (!packaged) return fallback;
    throw new VmmeshError("STATE_UNREADABLE", `the system user \`${name}\` does not exist`, {
      next: "Run `systemd-sysusers /usr/lib/sysusers.d/vmmesh.conf`, or install the vmmesh package again.",
    });
  };
  return {
    root: { uid: 0, gid: 0 },
    agent: await find(USERS.agent, WITHOUT_PACKAGE.agent),
    envoy: await find(USERS.envoy, WITHOUT_PACKAGE.envoy),
  };
}
