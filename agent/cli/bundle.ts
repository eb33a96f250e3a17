import { writeBundle } from "../mesh/bundle.ts";
import type { Options } from "./commands.ts";
import { openContext, print, say, text, wantsJson } from "./context.ts";
import { bundleFromCluster, tellOutcome } from "./meshBundle.ts";

export async function bundleCreate(options: Options): Promise<number> {
  const context = openContext(options);
  const group = text(options, "workload-group");
  const made = await bundleFromCluster(context, options, {
    hostname: group ?? context.host.net.hostname(),
    ip: text(options, "ip"),
    rehearse: false,
  });
  tellOutcome(made);
  const target = text(options, "o") ?? "";
  const written = await writeBundle(context.host.files, target, made.bundle);
  if (wantsJson(options)) print({ written, tokenExpires: made.bundle.tokenExpires });
  else {
    for (const path of written) say(`- wrote ${path}`);
    print(
      `The token in it works until ${made.bundle.tokenExpires?.toISOString()}: whoever has it can become this workload.\nOn the machine: vmmesh join --bundle ${target}`,
    );
  }
  return 0;
}
