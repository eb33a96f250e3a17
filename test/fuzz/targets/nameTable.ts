import { answer } from "../../../agent/dns/answer.ts";
import { buildTable } from "../../../agent/dns/table.ts";
import { readNameTable } from "../../../agent/proto/istio.ts";
import { encode } from "../../controlplane/protos.ts";
import { type Target, unlessRefused } from "../target.ts";
import { isMalformed, mutateMessage } from "../wire.ts";

const encoded = encode("istio.networking.nds.v1.NameTable", {
  table: {
    "a.shop.svc.cluster.local": {
      ips: ["10.0.0.1", "::1"],
      registry: "Kubernetes",
      shortname: "a",
      namespace: "shop",
      alt_hosts: ["a-0.a.shop.svc.cluster.local"],
    },
    "*.example.com": { ips: ["192.0.2.1"], registry: "External" },
  },
});

export const target: Target = {
  about: "a name table is refused, or each of its names is answered with addresses of the family asked for",
  seeds: [encoded],
  words: ["cluster.local", "Kubernetes", "10.0.0.1", "::ffff:1.2.3.4", "*."],
  mutate: mutateMessage,
  run(bytes) {
    const entries = unlessRefused(() => [...readNameTable(bytes)], isMalformed);
    if (entries === undefined) return;
    const table = buildTable(entries, { proxyDomain: "svc.cluster.local", namespace: "shop" });
    for (const name of table.names.keys()) {
      const said = [1, 28].map((type) =>
        answer(table, { name, type, class: 1 }, ["shop.svc.cluster.local", "local."]),
      );
      const [v4, v6] = said.map((each) => (each === "forward" ? undefined : each.addresses));
      if (v4 === undefined || v6 === undefined || v4.length + v6.length === 0)
        throw new Error(`${JSON.stringify(name)} is in the table and has no answer`);
      if (v4.some((it) => it.includes(":")) || v6.some((it) => !it.includes(":")))
        throw new Error(`${JSON.stringify(name)} is answered with another family`);
    }
  },
};
