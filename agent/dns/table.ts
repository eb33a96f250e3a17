import { ipFamily } from "../core/net.ts";

/** One host of the mesh as the control plane describes it (NameInfo of Istio's name table, ch. 6.2 of the VM protocol). */
export interface NameEntry {
  readonly ips: readonly string[];
  /** `Kubernetes`, `External`, … */
  readonly registry: string;
  readonly shortname: string;
  readonly namespace: string;
  readonly altHosts: readonly string[];
}

/** The addresses of one name, split by family. */
export interface Addresses {
  readonly v4: readonly string[];
  readonly v6: readonly string[];
}

/** Names in lower case with the trailing dot; a wildcard is stored literally (`*.example.com.`). */
export interface DnsTable {
  readonly names: ReadonlyMap<string, Addresses>;
}

export interface TableOptions {
  /** `svc.cluster.local`: hosts below it also get their short names. */
  readonly proxyDomain: string;
  /** Namespace of this workload: only its services are found by the bare short name. */
  readonly namespace: string;
}

/**
 * The table to answer from. A host's own name always wins over a name derived from another host; entries without a
 * usable address are left out, so that they are forwarded instead of answered with nothing.
 */
export function buildTable(
  entries: Iterable<readonly [host: string, entry: NameEntry]>,
  options: TableOptions,
): DnsTable {
  const steps = tableInSteps(entries, options);
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value;
  }
}

/** The same, with a pause after each host: tens of thousands at once would keep every question waiting. */
export function* tableInSteps(
  entries: Iterable<readonly [host: string, entry: NameEntry]>,
  options: TableOptions,
): Generator<undefined, DnsTable> {
  const names = new Map<string, Addresses>();
  const derived: [string, Addresses][] = [];
  for (const [host, entry] of entries) {
    yield;
    const own = ownName(host, entry);
    const addresses = byFamily(entry.ips);
    if (own === undefined || addresses === undefined) continue;
    names.set(own, addresses);
    for (const name of derivedNames(host, entry, options)) derived.push([name, addresses]);
  }
  for (const [name, addresses] of derived) {
    yield;
    if (!names.has(name)) names.set(name, addresses);
  }
  return { names };
}

/** undefined if there is no usable one. */
function byFamily(ips: readonly string[]): Addresses | undefined {
  const v4: string[] = [];
  const v6: string[] = [];
  for (const ip of ips) {
    const family = ipFamily(ip);
    if (family === 4) v4.push(ip);
    else if (family === 6) v6.push(ip);
  }
  return v4.length + v6.length === 0 ? undefined : { v4, v6 };
}

/** A Kubernetes host that already ends in a dot gets no name, as in Istio. */
function ownName(host: string, entry: NameEntry): string | undefined {
  if (!host.endsWith(".")) return `${host.toLowerCase()}.`;
  return entry.registry === "Kubernetes" ? undefined : host.toLowerCase();
}

function derivedNames(host: string, entry: NameEntry, options: TableOptions): string[] {
  const domain = options.proxyDomain.toLowerCase();
  if (entry.registry !== "Kubernetes" || domain === "" || !host.toLowerCase().endsWith(`.${domain}`))
    return [];
  const names = entry.altHosts.map((alt) => (alt.endsWith(".") ? alt : `${alt}.`));
  // Hosts of a multi-cluster service have neither (ch. 6.4).
  if (entry.shortname !== "" && entry.namespace !== "") {
    const inNamespace = `${entry.shortname}.${entry.namespace}.`;
    names.push(inNamespace, `${inNamespace}${domain.split(".")[0] ?? ""}.`);
    if (entry.namespace === options.namespace) names.push(`${entry.shortname}.`);
  }
  return names.map((name) => name.toLowerCase());
}

/** What a name leads to: the addresses, and the mesh's name for it if the resolver's search list was in the way. */
export interface Found {
  readonly addresses: Addresses;
  /** Target of the CNAME to answer with. */
  readonly alias?: string;
}

/**
 * Looks a name up: exactly, then as `name + search domain` for every search domain, then by wildcards, the nearest
 * first (`*.b.c.` before `*.c.` for `a.b.c.`).
 *
 * Search domains are taken off the question instead of being put on every name: the table stays small, and a
 * resolv.conf that changes needs no new table.
 *
 * @param name lower case, trailing dot
 * @param search domains of resolv.conf, with or without the trailing dot
 */
export function lookUp(table: DnsTable, name: string, search: readonly string[]): Found | undefined {
  const asked: { name: string; alias?: string }[] = [{ name }];
  for (const domain of search) {
    const suffix = `.${domain.toLowerCase().replace(/\.$/, "")}.`;
    if (suffix === ".." || !name.endsWith(suffix)) continue;
    const alias = name.slice(0, 1 - suffix.length);
    asked.push({ name: alias, alias });
  }
  for (const namesFor of [(it: string) => [it], wildcardsOf]) {
    let nearest: (Found & { depth: number }) | undefined;
    for (const { name: wanted, ...alias } of asked) {
      const hit = firstOf(table, namesFor(wanted));
      if (hit !== undefined && (nearest === undefined || hit.depth < nearest.depth))
        nearest = { ...hit, ...alias };
    }
    if (nearest !== undefined) {
      const { depth: _, ...found } = nearest;
      return found;
    }
  }
  return undefined;
}

function firstOf(
  table: DnsTable,
  names: readonly string[],
): { addresses: Addresses; depth: number } | undefined {
  for (const [depth, name] of names.entries()) {
    const addresses = table.names.get(name);
    if (addresses !== undefined) return { addresses, depth };
  }
  return undefined;
}

function wildcardsOf(name: string): string[] {
  const labels = name.split(".").slice(0, -1);
  return labels.slice(1).map((_, index) => `*.${labels.slice(index + 1).join(".")}.`);
}
