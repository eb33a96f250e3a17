import { VmmeshError } from "../../../agent/core/errors.ts";
import { parseEnv, renderEnv } from "../../../agent/mesh/env.ts";
import { type Target, unlessRefused } from "../target.ts";

const isMalformed = (thrown: unknown): boolean =>
  thrown instanceof VmmeshError && thrown.code === "ENV_FILE_MALFORMED";

export const target: Target = {
  about: "an environment file is refused with its line, or means what it means after it was written again",
  seeds: [
    "# comment\nA='b'\nexport B=\"c d\" C=e\\ f\n",
    "ISTIO_META='{\"a\":1}'\nX='it'\"'\"'s'\n",
    "P=10.0.0.0/8,::1\\\n,x;Q=\n",
  ],
  words: ["export ", "='", `'"'"'`, "\\\n", "A=", "$(", "`", "~", "\r\n", "#"],
  run(bytes) {
    const text = Buffer.from(bytes).toString();
    const values = unlessRefused(() => parseEnv(text, "cluster.env"), isMalformed);
    if (values === undefined) return;
    const upper = [...values].filter(([key]) => /^[A-Z0-9_]+$/.test(key));
    const again = parseEnv(renderEnv(upper), "again");
    if (JSON.stringify([...again]) !== JSON.stringify(upper))
      throw new Error("it changed when it was written again");
  },
};
