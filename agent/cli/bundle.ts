import { writeBundle } from "../mesh/bundle.ts";
import type { Options } from "./commands.ts";
import { flag, openContext, print, say, text, wantsJson } from "./context.ts";
import { bundleFromCluster, tellOutcome } from "./meshBundle.ts";

export async function bundleCreate(options: Options): Promise<number> {
  const context = openContext(options);
  const group = text(options, "workload-group");
  const secret = flag(options, "one-time")
    ? `vmmesh-join-${Buffer.from(context.host.random(6)).toString("hex")}`
    : undefined;
  const made = await bundleFromCluster(context, options, {
    hostname: group ?? context.host.net.hostname(),
    ip: text(options, "ip"),
    rehearse: false,
    ...(secret === undefined ? {} : { bindTokenTo: secret }),
  });
  tellOutcome(made);
  const target = text(options, "o") ?? "";
  const written = await writeBundle(context.host.files, target, made.bundle);
  const revoke =
    secret === undefined
      ? undefined
      : `kubectl -n ${text(options, "namespace") ?? ""} delete secret ${secret}`;
  if (wantsJson(options)) {
    print({ written, tokenExpires: made.bundle.tokenExpires, ...(revoke === undefined ? {} : { revoke }) });
    return 0;
  }
  for (const path of written) say(`- wrote ${path}`);
  print(
    [
      `The token in it works until ${made.bundle.tokenExpires?.toISOString()}: whoever has it can become this workload.`,
      `On the machine: vmmesh join --bundle ${target}`,
      ...(revoke === undefined
        ? []
        : [`When it has joined, or at any time to take the token back: ${revoke}`]),
    ].join("\n"),
  );
  return 0;
}
