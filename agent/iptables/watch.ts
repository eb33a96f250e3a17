import { ownerOfChain } from "./parse.ts";
import { CHAIN, HOOKS } from "./rules.ts";

/** Who wrote a generation of the ruleset, as far as the kernel says. */
export interface Writer {
  /** Name of the program whose rules they are, if their chains tell, else of the process that wrote them. */
  readonly program: string;
  /** Of the process that wrote; in a container's own numbers only if the agent is not in one. */
  readonly pid: number | undefined;
}

/**
 * How likely it is that this displaced us: 3 a table of our own deleted, as by who wipes all of nf_tables, 2 a jump put ahead
 * of ours, 1 our hooks or chains changed, 0 elsewhere.
 */
type Weight = 0 | 1 | 2 | 3;

/** What one transaction of somebody meant for us. */
export type Change =
  /** It may have displaced, changed or removed something of ours. `line` is the first of those that weigh most. */
  | {
      readonly kind: "foreign";
      readonly by: Writer;
      readonly line: string;
      readonly weight: Weight;
    }
  /** Our own rules were put (back) in place. */
  | { readonly kind: "ours" }
  /** The kernel dropped events: anything may have happened. */
  | { readonly kind: "lost" };

const EVENT =
  /^(add|create|insert|delete|flush|destroy|replace) (table|chain|rule) (ip6?|inet) (\S+)(?: (\S+))?(.*)$/;
const GENERATION = /^# new generation \d+ by process (\d+) \((.*)\)$/;
const LOST = /lost some netlink events/i;
const IPTABLES_TABLES: readonly string[] = ["nat", "raw", "mangle"];
const OUR_TABLE = /^vmmesh(-fence)?$/;
const OUR_CHAINS: readonly string[] = Object.values(CHAIN);
/** Thousands of rules, rewritten all the time; whether something jumps to them from a hook is what counts. */
const UNREAD = new Set(["kube-proxy", "docker"]);

/**
 * Reads the text of `nft monitor` line by line; a transaction ends with its `# new generation` line (only the text form
 * has it). iptables-legacy causes no events.
 *
 * @returns a function that gives what a line completes, if it completes anything that matters
 */
export function monitorReader(): (line: string) => Change | undefined {
  let touched: { readonly line: string; readonly weight: Weight } | undefined;
  let ours = false;
  let owner: string | undefined;
  return (line) => {
    if (LOST.test(line)) return { kind: "lost" };
    const end = line.startsWith("#") ? GENERATION.exec(line) : null;
    if (end === null) {
      const event = readEvent(line);
      if (event === undefined) return undefined;
      ours ||= event.ours;
      const { weight } = event;
      if (weight !== undefined && (touched === undefined || weight > touched.weight))
        touched = { line: line.trim(), weight };
      owner ??= event.owner;
      return undefined;
    }
    const [, pid = "", comm = ""] = end;
    const change: Change | undefined = ours
      ? { kind: "ours" }
      : touched === undefined
        ? undefined
        : {
            kind: "foreign",
            by: {
              program: owner ?? comm,
              pid: Number(pid) > 0 ? Number(pid) : undefined,
            },
            ...touched,
          };
    touched = undefined;
    ours = false;
    owner = undefined;
    return change;
  };
}

interface Event {
  /** undefined: it does not matter. */
  readonly weight: Weight | undefined;
  /** Only we write this: the jump to our chain put in at the top, or one of our tables made. */
  readonly ours: boolean;
  readonly owner: string | undefined;
}

function readEvent(line: string): Event | undefined {
  const match = EVENT.exec(line);
  if (match === null) return undefined;
  const [, verb = "", object = "", family = "", table = "", chain = "", rest = ""] = match;
  const removes = verb === "delete" || verb === "flush" || verb === "destroy";
  if (OUR_TABLE.test(table)) {
    const whole = object === "table";
    return { weight: whole && removes ? 3 : 1, ours: whole && !removes, owner: undefined };
  }
  if (family === "inet" || !IPTABLES_TABLES.includes(table)) return undefined;
  if (object === "table") return { weight: removes ? 1 : undefined, ours: false, owner: undefined };
  const mine = OUR_CHAINS.includes(chain) || (HOOKS as readonly string[]).includes(chain);
  if (object === "chain") return { weight: removes && mine ? 1 : undefined, ours: false, owner: undefined };
  const target = /\b(?:jump|goto) (\S+)/.exec(rest)?.[1] ?? "";
  // Whose chain is jumped to says who wrote only where the jump is put ahead: who deletes it is somebody else.
  const owner = verb === "insert" ? ownerOfChain(target) : undefined;
  if (mine)
    return {
      weight: owner === undefined ? 1 : 2,
      ours: verb === "insert" && OUR_CHAINS.includes(target),
      owner,
    };
  return {
    weight: UNREAD.has(ownerOfChain(chain) ?? "") ? undefined : 0,
    ours: false,
    // What is put in elsewhere, as in POSTROUTING, is ahead of nothing of ours.
    owner: undefined,
  };
}

/** How often a repair may be asked for; milliseconds. */
export const PACE = {
  apartMs: 100,
  /** So many requests within this time: somebody writes much, as Docker does when it starts, and need not be against us. */
  busy: 20,
  withinMs: 10_000,
  busyMs: 250,
  /** So many repairs may follow each other at once: a reload of firewalld, which wipes table by table, brings up to four. */
  burst: 10,
  /** … and then one in this time, at which the next is earned: a duel costs no more, and who writes now and then never waits. */
  earnMs: 2000,
} as const;

/** Decides when to ask for a repair: the first event at once, a duel slowly, never not at all. Pure but for its memory. */
export class Pace {
  #requests: number[] = [];
  #spare: number = PACE.burst;
  #earnedAt = 0;
  #contested = false;

  /** True from the event that finds no repair to spare until half of a burst is earned again. */
  contested(now: number): boolean {
    this.#earn(now);
    this.#contested &&= this.#spare < PACE.burst / 2;
    return this.#contested;
  }

  /** @returns in how many milliseconds to ask for the repair of an event that came at `now` (monotonic) */
  event(now: number): number {
    this.#earn(now);
    this.#contested ||= this.#spare < 1;
    this.#requests = this.#requests.filter((at) => now - at < PACE.withinMs);
    const last = this.#requests.at(-1) ?? Number.NEGATIVE_INFINITY;
    const apart = this.#requests.length >= PACE.busy ? PACE.busyMs : PACE.apartMs;
    return Math.max(0, last + apart - now, (1 - this.#spare) * PACE.earnMs);
  }

  /** A repair was asked for. */
  requested(now: number): void {
    this.#requests.push(now);
  }

  /** Something of ours was displaced, and has been put right. */
  repaired(now: number): void {
    this.#earn(now);
    this.#spare = Math.max(0, this.#spare - 1);
  }

  #earn(now: number): void {
    this.#spare = Math.min(PACE.burst, this.#spare + (now - this.#earnedAt) / PACE.earnMs);
    this.#earnedAt = now;
  }
}
