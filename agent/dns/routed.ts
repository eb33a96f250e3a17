import { ROUTE_SUFFIX } from "./loop.ts";
import type { DnsTable } from "./table.ts";

/** systemd-resolved takes 1024 domains for one link (LINK_SEARCH_DOMAINS_MAX); one is `ROUTE_DOMAIN`. */
const MAX_DOMAINS = 1023;
const LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?";
/** Two labels at least: neither everything (`~.`) nor a top-level domain is ours to answer. */
const DOMAIN = new RegExp(`^~?(?=.{1,253}$)(?:${LABEL}\\.)+${LABEL}$`);

/** Below it are the questions that say whether the route stands. */
export const ROUTE_DOMAIN = `~${ROUTE_SUFFIX.slice(1, -1)}`;

/** Whether systemd-resolved may be given this domain: as resolved.conf(5) writes it, `~` for "routes only". */
export function isRoutable(domain: string): boolean {
  return DOMAIN.test(domain);
}

/**
 * The domains whose questions systemd-resolved is to send to us, at most 1023, sorted behind the first ones: a pod's
 * search list, which gives the short names, then every name of the table outside of it. Where these are too many, names
 * that share most of their end are given as one domain: what below it is not the mesh's we forward.
 *
 * @param proxyDomain `svc.cluster.local`
 */
export function routedDomains(
  table: DnsTable | undefined,
  proxyDomain: string,
  namespace: string,
  max: number = MAX_DOMAINS,
): string[] {
  const cluster = proxyDomain.slice(proxyDomain.indexOf(".") + 1);
  const search = [`${namespace}.${proxyDomain}`, proxyDomain, cluster];
  const names = [...(table?.names.keys() ?? [])]
    .map((name) => name.replace(/^\*\./, "").replace(/\.$/, ""))
    .filter((name) => name !== cluster && !name.endsWith(`.${cluster}`))
    .map((name) => `~${name}`)
    .filter(isRoutable);
  let routes = withoutCovered(names);
  for (let labels = deepest(routes) - 1; labels >= 2 && search.length + routes.length > max; labels -= 1)
    routes = withoutCovered(routes.map((name) => `~${name.slice(1).split(".").slice(-labels).join(".")}`));
  return [...search, ...routes.sort()].slice(0, max);
}

function deepest(routes: readonly string[]): number {
  return Math.max(0, ...routes.map((name) => name.split(".").length));
}

/** Each once, and none below another. */
function withoutCovered(routes: readonly string[]): string[] {
  const all = new Set(routes);
  return [...all].filter((route) => {
    const labels = route.slice(1).split(".");
    return !labels.some((_, index) => index > 0 && all.has(`~${labels.slice(index).join(".")}`));
  });
}
