import { KubeClient, refuseShortToken } from "../kube/client.ts";
import type { Options } from "./commands.ts";
import { number, openContext, print, text } from "./context.ts";
import { kubeAccess } from "./kubeAccess.ts";

/** One TokenRequest, its token alone on stdout: for a program of `--credential-exec`. */
export async function tokenCreate(options: Options): Promise<number> {
  const seconds = number(options, "token-duration");
  refuseShortToken(seconds);
  await using client = new KubeClient(await kubeAccess(openContext(options).host, options));
  const { token } = await client.requestToken({
    namespace: text(options, "namespace") ?? "",
    serviceAccount: text(options, "service-account") ?? "",
    audience: text(options, "audience") ?? "",
    seconds,
  });
  print(token);
  return 0;
}
