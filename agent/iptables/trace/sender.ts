import { VmmeshError } from "../../core/errors.ts";
import { type Reads, tryRun } from "../read.ts";
import type { Sender } from "./packet.ts";

/**
 * Who a rule sees behind the name of a user, a number, or a systemd unit.
 *
 * @throws {VmmeshError} USAGE if there is no such user or unit
 */
export async function resolveSender(host: Reads, who: string): Promise<Sender> {
  const isUnit = /\.(service|scope|slice|socket)$/.test(who);
  if (!isUnit) {
    const user = await findUser(host, who);
    if (user !== undefined) return user;
    if (/^\d{1,10}$/.test(who)) return { uid: Number(who), gid: undefined, cgroup: undefined };
  }
  const unit = await findUnit(host, isUnit ? who : `${who}.service`);
  if (unit !== undefined) return unit;
  throw new VmmeshError(
    "USAGE",
    `--as: there is no ${isUnit ? "" : "user and no "}unit called \`${who}\` on this machine`,
    { next: "Give a user's name, a numeric user id, or a unit such as nginx.service." },
  );
}

async function findUser(host: Reads, name: string): Promise<Sender | undefined> {
  const result = await tryRun(host, { argv: ["getent", "passwd", name] });
  const [, , uid, gid] = (result?.stdout ?? "").trim().split(":");
  if (result?.code !== 0 || uid === undefined || gid === undefined) return undefined;
  return { uid: Number(uid), gid: Number(gid), cgroup: undefined };
}

/** Of the running main process if there is one, else what the unit says of itself. */
async function findUnit(host: Reads, unit: string): Promise<Sender | undefined> {
  const properties = ["LoadState", "MainPID", "User", "ControlGroup"].flatMap((name) => ["-p", name]);
  const result = await tryRun(host, { argv: ["systemctl", "show", ...properties, "--", unit] });
  const shown = new Map(
    (result?.stdout ?? "").split("\n").map((line): [string, string] => {
      const at = line.indexOf("=");
      return [line.slice(0, at), line.slice(at + 1)];
    }),
  );
  if (shown.get("LoadState") !== "loaded") return undefined;
  const cgroup = (shown.get("ControlGroup") ?? "").replace(/^\//, "") || undefined;
  const status = await host.files.readText(`/proc/${shown.get("MainPID") ?? "0"}/status`);
  // The fourth number is the one that sockets are made with. (proc(5): real, effective, saved, file system)
  const id = (name: string): string | undefined =>
    new RegExp(`^${name}:(?:\\s+\\d+){3}\\s+(\\d+)`, "m").exec(status ?? "")?.[1];
  const [uid, gid] = [id("Uid"), id("Gid")];
  if (uid !== undefined && gid !== undefined) return { uid: Number(uid), gid: Number(gid), cgroup };
  const user = await findUser(host, shown.get("User") || "root");
  return user === undefined ? undefined : { ...user, cgroup };
}
