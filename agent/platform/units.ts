import { VmmeshError } from "../core/errors.ts";
import type { Host } from "./host.ts";

/** Where the processes of a unit are. */
export interface UnitPlace {
  readonly unit: string;
  /** Below the root of the unified hierarchy. */
  readonly path: string;
  /** Of a slice: the services that systemd would start in it. */
  readonly services?: readonly string[];
}

/**
 * Name and cgroup of a service or slice, also while it does not run: systemd makes the path from the slice
 * (systemd.slice(5)).
 *
 * @throws {VmmeshError} USAGE for what is neither, or nothing that systemd has loaded
 */
export async function unitPlace(
  host: Pick<Host, "run"> & { readonly files: Pick<Host["files"], "stat"> },
  name: string,
): Promise<UnitPlace> {
  const wrong = (why: string, next: string): VmmeshError =>
    new VmmeshError("USAGE", `unit \`${name}\` ${why}`, { next });
  if (!/^[A-Za-z0-9@][A-Za-z0-9:_.@-]*$/.test(name))
    throw wrong("is not a name that can be matched", "Give a service or slice whose name needs no escapes.");
  const suffix = /\.(scope|socket|timer|target|path|mount|automount|swap|device)$/.exec(name)?.[1];
  if (suffix !== undefined)
    throw wrong(
      `is a ${suffix}: capture follows services and slices`,
      "Name the service itself: `systemctl list-units --type=service`.",
    );
  if ((await host.files.stat("/sys/fs/cgroup/cgroup.controllers")) === undefined)
    throw wrong(
      "cannot be followed: this machine has no unified cgroup hierarchy",
      "Boot with systemd.unified_cgroup_hierarchy=1, or choose by user instead.",
    );
  const [found] = await show(host, [name]);
  // A slice needs no file: systemd makes it for the first unit that names it.
  const slice = name.endsWith(".slice");
  const services = slice ? await servicesIn(host, name) : undefined;
  if (found?.state !== "loaded" || services?.length === 0)
    throw wrong(
      slice ? "has no service in it" : "is not loaded by systemd",
      `See \`systemctl list-unit-files --type=service\`; for a new one, \`systemctl daemon-reload\` first.`,
    );
  if (services !== undefined) return { unit: name, path: slicePath(name).slice(0, -1), services };
  return { unit: found.id, path: `${slicePath(found.slice || "system.slice")}${found.id}` };
}

interface Shown {
  readonly id: string;
  readonly state: string;
  readonly slice: string;
}

/** Loads what is not loaded yet. */
async function show(host: Pick<Host, "run">, names: readonly string[]): Promise<Shown[]> {
  const { stdout } = await host.run({
    argv: ["systemctl", "show", "-p", "Id", "-p", "LoadState", "-p", "Slice", "--", ...names],
  });
  return stdout.split("\n\n").flatMap((block) => {
    const value = (key: string): string => new RegExp(`^${key}=(.*)$`, "m").exec(block)?.[1] ?? "";
    return value("Id") === "" ? [] : [{ id: value("Id"), state: value("LoadState"), slice: value("Slice") }];
  });
}

/** Services that run, and those that are installed; a template has no instance to ask for. */
async function servicesIn(host: Pick<Host, "run">, slice: string): Promise<string[]> {
  const names = async (what: string): Promise<string[]> => {
    const { stdout } = await host.run({
      argv: ["systemctl", what, "--type=service", "--all", "--plain", "--no-legend", "--no-pager"],
    });
    return stdout.split("\n").flatMap((line) => /^(\S+\.service)\s/.exec(`${line} `)?.[1] ?? []);
  };
  const known = [...(await names("list-units")), ...(await names("list-unit-files"))];
  const asked = [...new Set(known)].filter((name) => !name.includes("@."));
  const root = slicePath(slice);
  return (asked.length === 0 ? [] : await show(host, asked))
    .filter((unit) => unit.state === "loaded" && slicePath(unit.slice || "system.slice").startsWith(root))
    .map(({ id }) => id)
    .sort();
}

/** `a-b.slice` → `a.slice/a-b.slice/`; the root slice is nothing. */
export function slicePath(slice: string): string {
  if (slice === "-.slice") return "";
  const parts = slice.replace(/\.slice$/, "").split("-");
  return parts.map((_, index) => `${parts.slice(0, index + 1).join("-")}.slice/`).join("");
}
