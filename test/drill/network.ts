import type { Lab, Machine } from "../lab/lab.ts";

/** A fault of the network while it lasts; disposing of it ends it. */
export interface Impairment extends AsyncDisposable {
  /** Packets that it has swallowed so far. */
  dropped(): Promise<number>;
}

const TABLE = "inet drill-loss";

/**
 * Swallows packets between machines and the control plane with its DNS server, in both directions, without a word to either
 * side. Packets between machines are bridged and stay untouched.
 * @param percent how many of a hundred, by chance; 100: the cable is cut
 */
export async function losePackets(
  lab: Lab,
  machines: readonly Machine[],
  percent: number,
): Promise<Impairment> {
  const v4 = machines.map(({ ip }) => ip).join(", ");
  const v6 = machines.map(({ ip6 }) => ip6).join(", ");
  const chance = percent >= 100 ? "" : `numgen random mod 100 < ${percent} `;
  const rules = (end: "saddr" | "daddr"): string =>
    `ip ${end} { ${v4} } ${chance}counter name gone drop
     ip6 ${end} { ${v6} } ${chance}counter name gone drop`;
  await lab.exec(["nft", "-f", "-"], {
    input: `table ${TABLE} {
  counter gone { }
  chain in {
    type filter hook input priority -300
    ${rules("saddr")}
  }
  chain out {
    type filter hook output priority -300
    ${rules("daddr")}
  }
}
`,
  });
  return {
    async dropped() {
      const { stdout } = await lab.exec(["nft", "list", "counter", ...TABLE.split(" "), "gone"]);
      return Number(/packets (\d+)/.exec(stdout)?.[1] ?? 0);
    },
    async [Symbol.asyncDispose]() {
      await lab.exec(["nft", "delete", "table", ...TABLE.split(" ")]);
    },
  };
}
