import { VmmeshError } from "../core/errors.ts";
import type { Host } from "./host.ts";

/**
 * Name and cgroup of a service, also while it does not run: systemd makes the path from the slice (systemd.slice(5)).
 *
 * @throws {VmmeshError} USAGE for what is no service, or none that systemd has loaded
 */
export async function serviceCgroup(
  host: Pick<Host, "run"> & { readonly files: Pick<Host["files"], "stat"> },
  name: string,
): Promise<{ readonly unit: string; readonly path: string }> {
  const wrong = (why: string, next: string): VmmeshError =>
    new VmmeshError("USAGE", `unit \`${name}\` ${why}`, { next });
  if (!/^[A-Za-z0-9@][A-Za-z0-9:_.@-]*$/.test(name))
    throw wrong("is not a name that can be matched", "Give a service whose name needs no escapes.");
  const suffix = /\.(slice|scope|socket|timer|target|path|mount|automount|swap|device)$/.exec(name)?.[1];
  if (suffix !== undefined)
    throw wrong(
      `is a ${suffix}: capture follows services`,
      "Name the services in it: `systemctl list-units --type=service`.",
    );
  if ((await host.files.stat("/sys/fs/cgroup/cgroup.controllers")) === undefined)
    throw wrong(
      "cannot be followed: this machine has no unified cgroup hierarchy",
      "Boot with systemd.unified_cgroup_hierarchy=1, or choose by user instead.",
    );
  const { stdout } = await host.run({
    argv: ["systemctl", "show", "-p", "Id", "-p", "LoadState", "-p", "Slice", "--", name],
  });
  const fields = new Map(
    stdout.split("\n").map((line) => [line.split("=", 1)[0], line.slice(line.indexOf("=") + 1)]),
  );
  const id = fields.get("Id");
  if (fields.get("LoadState") !== "loaded" || id === undefined)
    throw wrong(
      "is not loaded by systemd",
      `See \`systemctl list-unit-files --type=service\`; for a new one, \`systemctl daemon-reload\` first.`,
    );
  return { unit: id, path: `${slicePath(fields.get("Slice") || "system.slice")}${id}` };
}

/** `a-b.slice` → `a.slice/a-b.slice/`; the root slice is nothing. */
export function slicePath(slice: string): string {
  if (slice === "-.slice") return "";
  const parts = slice.replace(/\.slice$/, "").split("-");
  return parts.map((_, index) => `${parts.slice(0, index + 1).join("-")}.slice/`).join("");
}
