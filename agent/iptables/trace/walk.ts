import {
  type Base,
  CHANCE,
  type Chain,
  chainKey,
  type HookName,
  type Route,
  type Ruleset,
  socketOf,
  type TraceRule,
  type Turn,
  type Verdict,
  type World,
} from "./model.ts";
import { isAskedOfSource, type Packet, type Span } from "./packet.ts";

/** One rule that did something with the packet. */
export interface Hop {
  readonly hook: HookName;
  readonly chain: Chain;
  /** undefined: the chain's policy. */
  readonly rule: TraceRule | undefined;
  readonly before: Packet;
  readonly after: Packet;
  readonly does: "on" | Verdict;
}

export type End =
  /** Handed to whoever listens there; `listener` undefined: nobody does. */
  | { readonly kind: "delivered"; readonly port: Span; readonly listener: string | undefined }
  | { readonly kind: "leaves"; readonly device: string }
  | { readonly kind: "dropped" | "rejected" | "queued"; readonly at: Hop }
  /** By routing, before or between the hooks. */
  | { readonly kind: "unroutable"; readonly why: string };

/** One way that the packet may take, from its beginning to its end. */
export interface Way {
  readonly packet: Packet;
  readonly hops: readonly Hop[];
  readonly end: End;
  /** What would have to be known to choose between this way and the others. */
  readonly because: readonly string[];
  readonly assumed: readonly Assumption[];
}

/** One of several possibilities was followed: `choice` says which. */
export interface Assumption {
  readonly why: string;
  /** Two that have the same are the same question: in one place of one rule, or of the sender in any. */
  readonly question: string;
  readonly choice: number;
  /** How many choices there were; undefined: nobody can say. */
  readonly of: number | undefined;
}

interface State {
  readonly packet: Packet;
  readonly hops: readonly Hop[];
  readonly because: readonly Assumption[];
}
interface Ended extends State {
  readonly end: "through" | End;
}

const MAX_WAYS = 64;
/** Of a packet that stands for those of every sender. */
const MAX_KINDS = 128;
const MAX_DEPTH = 32;
/** Characters of a reason: a set may have thousands of networks. */
const MAX_TOLD = 200;

/** All ways of a packet that this machine's own process sends. Pure. */
export function walkOut(rules: Ruleset, world: World, packet: Packet): Way[] {
  return hook(rules, world, "output", [start(packet)]).flatMap((state) => {
    if (state.end !== "through") return [way(state, state.end)];
    const { packet: now } = state;
    const route =
      now.routed === undefined
        ? { type: kindOf(world, now), device: now.out ?? "", source: undefined }
        : routeOut(world, now);
    const bad = unroutable(route);
    if (bad !== undefined || route === undefined) return [way(state, bad ?? unknownRoute)];
    return leave(rules, world, { ...state, packet: { ...now, out: route.device } }, route);
  });
}

/** All ways of a packet that arrives from the network at `packet.in`. Pure. */
export function walkIn(rules: Ruleset, world: World, packet: Packet, forwards: boolean): Way[] {
  return hook(rules, world, "ingress", [start(packet)]).flatMap((state) =>
    state.end === "through"
      ? hook(rules, world, "prerouting", [state]).flatMap((after) =>
          after.end === "through" ? arrive(rules, world, after, forwards) : [way(after, after.end)],
        )
      : [way(state, state.end)],
  );
}

/** All ways of a packet for this machine through INPUT alone; its port has been settled before. Pure. */
export function walkInput(rules: Ruleset, world: World, packet: Packet): Way[] {
  return hook(rules, world, "input", [start(packet)]).map((state) =>
    way(state, state.end === "through" ? deliver(world, state.packet) : state.end),
  );
}

const start = (packet: Packet): State => ({ packet, hops: [], because: [] });
const way = ({ packet, hops, because }: State, end: End): Way => ({
  packet,
  hops,
  because: [...new Set(because.map(({ why }) => why))],
  assumed: because,
  end,
});
const unknownRoute: End = { kind: "unroutable", why: "the kernel's route is not known" };

/**
 * A changed destination or mark is routed anew, but only behind the chains that look for it: those of type route (mangle
 * OUTPUT is one), and nat for the destination. What a filter chain changes stays without effect. Without a route the packet
 * ends there: a source on loopback cannot leave the machine. (ip_route_me_harder)
 */
function reroute(world: World, before: Packet, after: Ended, by: "route" | "nat"): Ended {
  const { to, from, mark } = after.packet;
  const moved = to.address !== before.to.address || (by === "route" && mark !== before.mark);
  if (!moved || after.end !== "through") return after;
  const packet = { ...after.packet, routed: { to: to.address, from: from.address, mark } };
  return { ...after, packet, end: unroutable(routeOut(world, packet)) ?? "through" };
}

/** By which it leaves after it was routed anew. */
function routeOut(world: World, { family, routed, sender }: Packet): Route | undefined {
  return routed === undefined
    ? undefined
    : world.route({ family, ...routed, ...(sender === undefined ? {} : { uid: sender.uid }) });
}

function kindOf(world: World, packet: Packet): string {
  return world.route({ family: packet.family, to: packet.to.address })?.type ?? "unicast";
}

function unroutable(route: Route | undefined): End | undefined {
  if (route === undefined) return undefined;
  if (route.refused !== undefined) return { kind: "unroutable", why: route.refused };
  return /^(blackhole|unreachable|prohibit|throw)$/.test(route.type)
    ? { kind: "unroutable", why: `the route is of type ${route.type}` }
    : undefined;
}

/** Through POSTROUTING, then onto the wire, or by lo into the machine again. */
function leave(rules: Ruleset, world: World, from: State, route: Route): Way[] {
  return hook(rules, world, "postrouting", [from]).flatMap((state) => {
    if (state.end !== "through") return [way(state, state.end)];
    if (route.type !== "local" && route.device !== "lo") {
      return hook(rules, world, "egress", [state]).map((after) =>
        way(after, after.end === "through" ? { kind: "leaves", device: route.device } : after.end),
      );
    }
    // lo takes the socket off the packet and keeps mark and conntrack entry. (loopback_xmit)
    const { packet } = state;
    const looped: State = {
      ...state,
      packet: { ...packet, in: "lo", out: undefined, sender: undefined, confirmed: true },
    };
    return hook(rules, world, "ingress", [looped]).flatMap((entered) =>
      entered.end === "through"
        ? hook(rules, world, "prerouting", [entered]).flatMap((after) =>
            after.end === "through" ? arrive(rules, world, after, true) : [way(after, after.end)],
          )
        : [way(entered, entered.end)],
    );
  });
}

/** After PREROUTING: into the machine, or on to somebody else. */
function arrive(rules: Ruleset, world: World, state: State, forwards: boolean): Way[] {
  const { packet } = state;
  const by = { to: packet.to.address, from: packet.from.address, mark: packet.mark };
  // lo keeps the route that led there.
  const looped = packet.in === "lo";
  const route = looped
    ? { type: "local", device: "lo", source: undefined }
    : world.route({ family: packet.family, ...by, in: packet.in ?? "" });
  const bad = unroutable(route);
  if (bad !== undefined || route === undefined) return [way(state, bad ?? unknownRoute)];
  if (route.type === "local") {
    const entering = looped ? state : { ...state, packet: { ...packet, routed: by } };
    return hook(rules, world, "input", [entering]).map((after) =>
      way(after, after.end === "through" ? deliver(world, after.packet) : after.end),
    );
  }
  // The socket on it is not for another machine. (ip_forward.c)
  if (packet.proxied !== undefined)
    return [
      way(state, {
        kind: "unroutable",
        why: "TPROXY has given it to a listener, and no route for its mark delivers it here",
      }),
    ];
  if (!forwards)
    return [way(state, { kind: "unroutable", why: "it is for another machine, and ip_forward is off" })];
  const forwarded: State = { ...state, packet: { ...packet, out: route.device } };
  return hook(rules, world, "forward", [forwarded]).flatMap((after) =>
    after.end === "through" ? leave(rules, world, after, route) : [way(after, after.end)],
  );
}

function deliver(world: World, packet: Packet): End {
  const { port } = packet.proxied ?? packet.to;
  const listener = packet.protocol === "icmp" ? "the kernel itself" : socketOf(packet, world)?.name;
  return { kind: "delivered", port, listener };
}

/** What the kernel calls at one priority: a chain, conntrack, or all nat chains of the hook. */
interface Slot {
  readonly priority: number;
  /** undefined: of conntrack and nat. */
  readonly table: string | undefined;
  readonly label: string;
  run(states: readonly State[]): Ended[];
}

const NAT_PRIORITY: Readonly<Partial<Record<HookName, number>>> = {
  prerouting: -100,
  output: -100,
  input: 100,
  postrouting: 100,
};

/** @see nf_nat_core.c: all nat chains of a hook are called at one priority, in the order of their own, until one translates. */
function hook(rules: Ruleset, world: World, name: HookName, states: readonly State[]): Ended[] {
  const bases = rules.bases.filter(
    (base) =>
      base.hook === name &&
      (base.device === undefined ||
        states.some(({ packet }) => packet.in === base.device || packet.out === base.device)),
  );
  const nat = bases.filter(({ type }) => type === "nat");
  const natPriority = NAT_PRIORITY[name];
  const slots: Slot[] = bases
    .filter(({ type }) => type !== "nat")
    .map((base) => ({
      priority: base.priority,
      table: base.chain.table,
      label: labelOf(base),
      run: (current) =>
        current.flatMap((state) =>
          runBase(rules, world, base, state).map((after) =>
            base.type === "route" ? reroute(world, state.packet, after, "route") : after,
          ),
        ),
    }));
  if (name === "output" || name === "prerouting")
    slots.push({
      priority: -200,
      table: undefined,
      label: "conntrack",
      run: (current) => current.map(tracked),
    });
  if (nat.length > 0 && natPriority !== undefined)
    slots.push({
      priority: natPriority,
      table: undefined,
      label: "nat",
      run: (current) => current.flatMap((state) => runNat(rules, world, name, nat, state)),
    });
  return inOrder(
    slots,
    states.map((state) => ({ ...state, end: "through" })),
    "chains",
  );
}

const labelOf = ({ chain }: Base): string => `${chain.table} ${chain.name}`;

const tracked = (state: State): Ended => ({
  ...state,
  end: "through",
  packet: state.packet.tracking === "untracked" ? state.packet : { ...state.packet, tracking: "tracked" },
});

function runNat(rules: Ruleset, world: World, name: HookName, nat: readonly Base[], state: State): Ended[] {
  const direction = name === "output" || name === "prerouting" ? "destination" : "source";
  if (state.packet.tracking !== "tracked" || state.packet.settled[direction])
    return [{ ...state, end: "through" }];
  const slots = nat.map((base) => ({
    priority: base.priority,
    table: base.chain.table,
    label: labelOf(base),
    run: (current: readonly State[]) =>
      current.flatMap((each): Ended[] =>
        each.packet.settled[direction] ? [{ ...each, end: "through" }] : runBase(rules, world, base, each),
      ),
  }));
  return inOrder(slots, [{ ...state, end: "through" }], "nat chains").map((ended) => {
    const routed = name === "output" ? reroute(world, state.packet, ended, "nat") : ended;
    const { packet } = routed;
    return { ...routed, packet: { ...packet, settled: { ...packet.settled, [direction]: true } } };
  });
}

/**
 * Runs slots by priority. Of equal ones the last registered goes first (nf_hook_entries_grow): within a table that is the
 * last listed; of different tables nobody can see it, so every order is followed.
 */
function inOrder(slots: readonly Slot[], from: readonly Ended[], what: string): Ended[] {
  let current = [...from];
  const priorities = [...new Set(slots.map(({ priority }) => priority))].sort((a, b) => a - b);
  for (const priority of priorities) {
    const equal = slots.filter((slot) => slot.priority === priority);
    const through = (states: readonly Ended[], slot: Slot): Ended[] => [
      ...states.filter(({ end }) => end !== "through"),
      ...slot.run(states.filter(({ end }) => end === "through")),
    ];
    const why = `${equal.map(({ label }) => label).join(" and ")} are ${what} of equal priority (${priority}): which was registered last, and so runs first, cannot be seen`;
    const tables = [...Map.groupBy(equal, (slot) => slot.table ?? slot.label).values()];
    const all = orders(tables.map((of) => of.toReversed()))
      .map((order) => order.flat())
      .map((order) => order.reduce(through, current));
    // Orders that lead to the same are one choice.
    const outcomes = [...Map.groupBy(all, statesKey).values()].flatMap(([first]) => (first ? [first] : []));
    const results =
      outcomes.length === 1
        ? outcomes.flat()
        : outcomes.flatMap((states, choice) =>
            states.map((state) => ({
              ...state,
              because: [...state.because, { why, question: why, choice, of: outcomes.length }],
            })),
          );
    current = merged(results);
  }
  return current;
}

const statesKey = (states: readonly Ended[]): string => [...new Set(states.map(stateKey))].sort().join("\n");

/** Every order of up to three, else there and back. */
function orders<T>(of: readonly T[]): T[][] {
  if (of.length > 3) return [[...of], [...of].reverse()];
  if (of.length < 2) return [[...of]];
  return of.flatMap((first) => orders(of.filter((each) => each !== first)).map((rest) => [first, ...rest]));
}

function runBase(rules: Ruleset, world: World, base: Base, state: State): Ended[] {
  return runChain(rules, world, base.hook, base.chain, state, 0).map((ended) => {
    if (ended.end !== "through" || base.policy === "accept") return ended;
    if (ended.accepted) return ended;
    const at: Hop = {
      hook: base.hook,
      chain: base.chain,
      rule: undefined,
      before: ended.packet,
      after: ended.packet,
      does: { do: "drop" },
    };
    return { ...ended, hops: [...ended.hops, at], end: { kind: "dropped", at } };
  });
}

interface ChainEnd extends Ended {
  /** A verdict, not the end of the chain. */
  readonly accepted: boolean;
}

function runChain(
  rules: Ruleset,
  world: World,
  name: HookName,
  chain: Chain,
  state: State,
  depth: number,
): ChainEnd[] {
  const done: ChainEnd[] = [];
  let going: State[] = [state];
  for (const rule of chain.rules) {
    if (going.length === 0) break;
    const next: State[] = [];
    for (const each of going) {
      for (const turn of runRule(rule, each.packet, world)) {
        if (turn.because.some((one) => each.because.some((two) => denies(one, two)))) continue;
        const because = [...each.because, ...turn.because];
        if (turn.does === "miss" && turn.packet === each.packet) {
          next.push({ ...each, because });
          continue;
        }
        const then = turn.does === "miss" ? "on" : turn.does;
        const hop: Hop = { hook: name, chain, rule, before: each.packet, after: turn.packet, does: then };
        const quiet = then === "on" && turn.packet === each.packet;
        const after: State = { packet: turn.packet, hops: quiet ? each.hops : [...each.hops, hop], because };
        if (then === "on") next.push(after);
        else if (then.do === "return") done.push({ ...after, end: "through", accepted: false });
        else if (then.do === "jump" || then.do === "goto") {
          const target = rules.chains.get(chainKey(chain.table, then.chain));
          const inner: ChainEnd[] =
            target === undefined || depth >= MAX_DEPTH
              ? [{ ...after, end: "through", accepted: false }]
              : runChain(rules, world, name, target, after, depth + 1);
          for (const end of inner) {
            if (then.do === "jump" && end.end === "through" && !end.accepted) next.push(end);
            else done.push(end);
          }
        } else done.push({ ...after, ...ended(then.do, hop, world) });
      }
    }
    going = next.length > 1 ? merged(next) : next;
  }
  return [...done, ...going.map((each): ChainEnd => ({ ...each, end: "through", accepted: false }))];
}

function ended(
  what: "accept" | "drop" | "reject" | "queue",
  at: Hop,
  world: World,
): Pick<ChainEnd, "end" | "accepted"> {
  if (what === "accept") return { end: "through", accepted: true };
  const heard = what === "reject" && !isLost(at, world);
  const kind = heard ? "rejected" : what === "queue" ? "queued" : "dropped";
  return { end: { kind, at }, accepted: true };
}

/**
 * A refusal that nobody hears (IPv4, measured): by ICMP, where a mark has made a foreign address local, the kernel answers from
 * that address and then finds that it is not its own (icmp.c). A mark that nothing was routed by yet makes nothing local.
 */
function isLost({ does, after: { family, to, routed } }: Hop, world: World): boolean {
  if (family !== 4 || typeof does !== "object" || does.do !== "reject" || does.with.startsWith("tcp"))
    return false;
  const isLocal = (mark: bigint): boolean => world.route({ family, to: to.address, mark })?.type === "local";
  return routed !== undefined && routed.mark !== 0n && isLocal(routed.mark) && !isLocal(0n);
}

interface RuleTurn {
  readonly packet: Packet;
  readonly does: Turn["does"];
  readonly because: readonly Assumption[];
}

function assumption(because: string, rule: TraceRule, step: number, choice: number, of: number): Assumption {
  const question = isAskedOfSource(because) ? because : `${step} ${because} (in \`${rule.text}\`)`;
  const short = because.length > MAX_TOLD ? `${because.slice(0, MAX_TOLD)}…` : because;
  return { why: `${short} (in \`${rule.text}\`)`, question, choice, of };
}

/** All steps of one rule, one after the other, until one misses or decides. */
function runRule(rule: TraceRule, packet: Packet, world: World): RuleTurn[] {
  let going: RuleTurn[] = [{ packet, does: "on", because: [] }];
  const done: RuleTurn[] = [];
  for (const [step, take] of rule.steps.entries()) {
    const next: RuleTurn[] = [];
    for (const at of going) {
      const turns = take(at.packet, world);
      for (const [choice, turn] of turns.entries()) {
        const because =
          turn.because === undefined
            ? at.because
            : [...at.because, assumption(turn.because, rule, step, choice, turns.length)];
        (turn.does === "on" ? next : done).push({ ...turn, because });
      }
    }
    going = next;
  }
  return [...done, ...going];
}

/** The same sender cannot be both. Chance is another one each time. */
const denies = (one: Assumption, two: Assumption): boolean =>
  one.question === two.question && one.choice !== two.choice && isAskedOfSource(one.question);

/** Ways that have become the same are one again, and nothing that only one of them assumed matters any more. */
function merged<S extends State>(states: readonly S[]): S[] {
  if (states.some(({ packet }) => packet.fromAnywhere)) return cut(folded(states), MAX_KINDS);
  const by = new Map<string, S>();
  for (const state of states) {
    const key = stateKey(state);
    const other = by.get(key);
    by.set(
      key,
      other === undefined
        ? state
        : {
            ...other,
            because: other.because.filter((one) => state.because.some((two) => sameAssumption(one, two))),
          },
    );
  }
  return cut([...by.values()], MAX_WAYS);
}

/**
 * Of a packet that stands for many it matters who goes which way: ways are one again only where every choice at the last
 * question led to the same.
 */
function folded<S extends State>(states: readonly S[]): readonly S[] {
  const groups = Map.groupBy(states, (state) => {
    const last = state.because.at(-1);
    return JSON.stringify([stateKey(state), state.because.slice(0, -1), last?.question]);
  });
  const next = [...groups.values()].flatMap((group) => {
    const choices = new Map(group.map((state) => [state.because.at(-1)?.choice, state]));
    const [first] = group;
    if (first === undefined || choices.size !== first.because.at(-1)?.of) return [...choices.values()];
    return [{ ...first, because: first.because.slice(0, -1) }];
  });
  return next.length < states.length ? folded(next) : states;
}

function cut<S extends State>(all: readonly S[], most: number): S[] {
  if (all.length <= most) return [...all];
  const why = `there are more than ${most} ways, and only as many were followed`;
  return all.slice(0, most).map((state) => ({
    ...state,
    because: [...state.because, { why, question: why, choice: 0, of: undefined }],
  }));
}

const sameAssumption = (one: Assumption, two: Assumption): boolean =>
  one.question === two.question && one.choice === two.choice;

function stateKey(state: State & { readonly end?: "through" | End }): string {
  return JSON.stringify([packetKey(state.packet), state.end === undefined ? "" : endKey(state.end)]);
}

const packetKey = (packet: Packet): string =>
  JSON.stringify(packet, (_, value) => (typeof value === "bigint" ? value.toString() : value));

function endKey(end: "through" | End): string {
  if (end === "through") return end;
  switch (end.kind) {
    case "delivered":
      return `delivered ${end.port.low} ${end.listener ?? "-"}`;
    case "leaves":
      return `leaves ${end.device}`;
    case "unroutable":
      return `unroutable ${end.why}`;
    default:
      return end.kind;
  }
}

/** They leave alike, and chance alone decides to which of a balancer's targets. @param groups of `sameEnd` */
export function isBalanced(groups: readonly (readonly Way[])[]): boolean {
  const all = groups.flat();
  const [first] = all;
  return (
    groups.length > 1 &&
    all.every(
      ({ end, packet, because }) =>
        end.kind === "leaves" &&
        first?.end.kind === "leaves" &&
        end.device === first.end.device &&
        packet.translated.destination &&
        packet.from.address === first.packet.from.address &&
        because.every((why) => why.startsWith(CHANCE)),
    )
  );
}

/** Ways that were given up because there are too many. */
export const isCut = (group: readonly Way[]): boolean =>
  group.some(({ because }) => because.some((why) => why.startsWith("there are more than")));

/** Ways with the same end, as far as the sender and the receiver can tell. */
export function sameEnd(ways: readonly Way[]): Way[][] {
  const by = new Map<string, Way[]>();
  for (const each of ways) {
    const { to, from, translated } = each.packet;
    const reached = each.end.kind === "delivered" || each.end.kind === "leaves";
    const key = [
      endKey(each.end),
      ...(reached ? [to.address, to.port.low, translated.source ? from.address : ""] : []),
    ].join(" ");
    by.set(key, [...(by.get(key) ?? []), each]);
  }
  return [...by.values()];
}
