import { type KubeAccess, loadKubeconfig } from "../kube/kubeconfig.ts";
import type { Options } from "./commands.ts";
import { type Context, say, text } from "./context.ts";

/** The kubeconfig that --kubeconfig and --context mean; its warnings are told. @throws {VmmeshError} KUBECONFIG_* */
export async function kubeAccess(host: Context["host"], options: Options): Promise<KubeAccess> {
  const path = text(options, "kubeconfig");
  const context = text(options, "context");
  const access = await loadKubeconfig(host, {
    ...(path === undefined ? {} : { path }),
    ...(context === undefined ? {} : { context }),
    env: process.env,
    home: process.env["HOME"] ?? "/root",
    uid: process.getuid?.() ?? 0,
  });
  for (const warning of access.warnings) say(`warning: ${warning}`);
  return access;
}
