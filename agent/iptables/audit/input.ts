import type { ParsedRule, ParsedTable } from "../parse.ts";
import type { Evidence } from "./evidence.ts";

/**
 * What filter INPUT does to a new TCP connection from outside to `port`. A match that is not understood makes a rule a
 * "may": it is passed over, and the answer is "unknown" if it could have decided.
 */
export function inputVerdict(
  input: Evidence["input"],
  port: number,
  redirectedFrom: number | undefined,
): "accepted" | "denied" | "unknown" {
  let unsure = false;
  const walk = (chain: string, depth: number): "accepted" | "denied" | "return" => {
    for (const rule of input.chains.get(chain) ?? []) {
      const matched = matchesNewTcp(rule, port, redirectedFrom);
      if (matched === "no") continue;
      const target = rule.target ?? "";
      const end =
        target === "ACCEPT" ? "accepted" : target === "DROP" || target === "REJECT" ? "denied" : undefined;
      if (matched === "may") {
        if (end !== undefined) unsure = true;
        continue;
      }
      if (end !== undefined) return end;
      if (target === "RETURN") return "return";
      if (depth < 8 && input.chains.has(target)) {
        const inner = walk(target, depth + 1);
        if (inner !== "return") return inner;
      }
    }
    return "return";
  };
  const verdict = walk("INPUT", 0);
  if (unsure) return "unknown";
  if (verdict !== "return") return verdict;
  return input.policy === "DROP" ? "denied" : "accepted";
}

function matchesNewTcp(
  { words }: ParsedRule,
  port: number,
  redirectedFrom: number | undefined,
): "yes" | "no" | "may" {
  let answer: "yes" | "may" = "yes";
  for (let at = 2; at < words.length; at += 1) {
    const value = words[at + 1] ?? "";
    const negated = words[at - 1] === "!";
    const holds = (fact: boolean): boolean => fact !== negated;
    switch (words[at]) {
      case "!":
      case "--comment":
      case "-m":
      case "--reject-with":
        if (words[at] !== "!") at += 1;
        break;
      case "-j":
      case "-g":
        return answer;
      case "-p":
        if (!holds(value === "tcp" || value === "all")) return "no";
        at += 1;
        break;
      case "-i":
        // From outside: not lo; any other name may be the interface meant.
        if (value === "lo") {
          if (!holds(false)) return "no";
        } else answer = "may";
        at += 1;
        break;
      case "--dport":
      case "--dports":
        if (!holds(inPorts(value, port))) return "no";
        at += 1;
        break;
      case "--ctstate":
      case "--state": {
        const states = value.split(",");
        if (!holds(states.includes("NEW") || (redirectedFrom !== undefined && states.includes("DNAT"))))
          return "no";
        at += 1;
        break;
      }
      case "--ctorigdstport":
        if (!holds(inPorts(value, redirectedFrom ?? port))) return "no";
        at += 1;
        break;
      case "--dst-type":
        if (!holds(value === "LOCAL")) return "no";
        at += 1;
        break;
      case "--tcp-flags":
        at += 2;
        break;
      default:
        answer = "may";
    }
  }
  return answer;
}

function inPorts(list: string, port: number): boolean {
  return list.split(",").some((item) => {
    const [from, to] = item.split(":").map(Number);
    return from !== undefined && port >= from && port <= (to ?? from);
  });
}

/** Table filter of one save, for `inputVerdict`. */
export function inputOf(tables: readonly ParsedTable[]): Evidence["input"] {
  const filter = tables.find(({ name }) => name === "filter");
  const chains = new Map<string, ParsedRule[]>();
  for (const chain of filter?.chains.keys() ?? []) chains.set(chain, []);
  for (const rule of filter?.rules ?? []) chains.get(rule.chain)?.push(rule);
  return { policy: filter?.chains.get("INPUT") ?? "ACCEPT", chains };
}
