/**
 * What kube-proxy in iptables mode writes for so many services of one endpoint each, as one text for
 * `iptables-restore --noflush`: five rules a service (pkg/proxy/iptables of Kubernetes: KUBE-SERVICES, KUBE-SVC-*, KUBE-SEP-*).
 *
 * @param count number of rules of the nat table, the two jumps aside
 */
export function kubeProxyRules(count: number): string {
  if (count === 0) return "";
  const services = Array.from({ length: Math.floor(count / 5) }, (_, index) => {
    const name = index.toString(36).toUpperCase().padStart(16, "0");
    const [high, low] = [index >> 8, index & 0xff];
    return {
      svc: `KUBE-SVC-${name}`,
      sep: `KUBE-SEP-${name}`,
      why: `-m comment --comment "default/service-${index}:http`,
      vip: `10.${96 + (high >> 8)}.${high & 0xff}.${low}`,
      pod: `10.${128 + (high >> 8)}.${high & 0xff}.${low}`,
    };
  });
  return [
    "*nat",
    ...["KUBE-SERVICES", "KUBE-MARK-MASQ"].map((chain) => `:${chain} - [0:0]`),
    ...services.flatMap(({ svc, sep }) => [`:${svc} - [0:0]`, `:${sep} - [0:0]`]),
    ...["PREROUTING", "OUTPUT"].map(
      (hook) => `-A ${hook} -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`,
    ),
    ...services.flatMap(({ svc, sep, why, vip, pod }) => [
      `-A KUBE-SERVICES -d ${vip}/32 -p tcp ${why} cluster IP" -m tcp --dport 80 -j ${svc}`,
      `-A ${svc} ! -s 10.244.0.0/16 -d ${vip}/32 -p tcp ${why} cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ`,
      `-A ${svc} ${why} -> ${pod}:8080" -j ${sep}`,
      `-A ${sep} -s ${pod}/32 ${why}" -j KUBE-MARK-MASQ`,
      `-A ${sep} -p tcp ${why}" -m tcp -j DNAT --to-destination ${pod}:8080`,
    ]),
    "COMMIT",
    "",
  ].join("\n");
}
