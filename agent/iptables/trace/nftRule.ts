import {
  addressType,
  CHANCE,
  change,
  ctState,
  ctStatus,
  masquerade,
  nothing,
  opaque,
  redirect,
  type Step,
  socketOf,
  type Test,
  type Turn,
  test,
  tproxy,
  translate,
  type Verdict,
  verdict,
  type World,
} from "./model.ts";
import {
  addressesOf,
  addressNumber,
  allTri,
  anyTri,
  type Got,
  ITS_SOURCE,
  isAskedOfSource,
  isSpan,
  isUnknown,
  notTri,
  type Packet,
  PROTOCOL_NUMBER,
  prefixSpan,
  protocolNumber,
  type Span,
  span,
  type Tri,
  type Value,
  within,
} from "./packet.ts";

/** JSON of libnftables-json(5). */
export type Json = unknown;
type Bag = Readonly<Record<string, Json>>;
export const bag = (json: Json): Bag =>
  typeof json === "object" && json !== null && !Array.isArray(json) ? (json as Bag) : {};
const list = (json: Json): readonly Json[] => (Array.isArray(json) ? json : [json]);

/** Elements of named sets and maps: `[key, data]`; data is undefined in a set. By name, of one table. */
export type Sets = ReadonlyMap<string, readonly (readonly [Json, Json])[]>;

/** One rule's `expr` as steps. What is not known here is a step of which nobody can say the result. */
export function compileExpressions(expressions: readonly Json[], sets: Sets): Step[] {
  return expressions.flatMap((expression) => {
    const [[name, body] = ["", undefined]] = Object.entries(bag(expression));
    return (STATEMENTS[name] ?? (() => opaque(`what \`${name}\` of nft does`)))(body, sets);
  });
}

type Read = (packet: Packet, world: World) => Got;

const FLAGS: Readonly<Record<string, number>> = {
  fin: 1,
  syn: 2,
  rst: 4,
  psh: 8,
  ack: 16,
  urg: 32,
  ecn: 64,
  cwr: 128,
};

/** A constant. `text`: names of interfaces and conntrack states are never numbers. */
function literal(json: Json, text: boolean): Value | undefined {
  if (typeof json === "number") return Number.isInteger(json) ? span(json) : undefined;
  if (typeof json !== "string") return undefined;
  if (text) return json;
  const address = addressNumber(json);
  if (address !== undefined) return span(address);
  // nft 1.0.6 prints numbers of a type that it does not know as `0x50 [invalid type]`.
  const number = /^(0x[0-9a-f]+|\d+)( \[invalid type\])?$/.exec(json)?.[1];
  if (number !== undefined) return span(BigInt(number));
  const known = PROTOCOL_NUMBER[json] ?? FLAGS[json];
  return known === undefined ? json : span(known);
}

const isText = (json: Json): boolean => {
  const { meta, ct, fib } = bag(json);
  return (
    /^(iifname|oifname|iif|oif|nfproto|pkttype)$/.test(String(bag(meta)["key"])) ||
    /^(state|status|direction)$/.test(String(bag(ct)["key"])) ||
    fib !== undefined
  );
};

const exact = (got: Got): bigint | undefined => (isSpan(got) && got.low === got.high ? got.low : undefined);

const ADDRESS_SIDES: Readonly<Record<string, "from" | "to">> = { saddr: "from", daddr: "to" };
const PORT_SIDES: Readonly<Record<string, "from" | "to">> = { sport: "from", dport: "to" };

/** What the packet itself carries. Of another protocol: it has no such thing. */
function payload({ protocol, field }: Bag): Read {
  const [of, name] = [String(protocol), String(field)];
  const family = of === "ip" ? 4 : of === "ip6" ? 6 : undefined;
  const side = ADDRESS_SIDES[name];
  if (family !== undefined) {
    return (packet) => {
      if (packet.family !== family) return undefined;
      if (side !== undefined) return addressesOf(packet, side);
      if (name === "protocol" || name === "nexthdr") return span(protocolNumber(packet));
      return name === "version" ? span(family) : { unknown: `what \`${of} ${name}\` is` };
    };
  }
  if (of === "icmp" || of === "icmpv6") {
    return (packet) => {
      if (packet.protocol !== "icmp" || packet.family !== (of === "icmp" ? 4 : 6)) return undefined;
      return name === "type" ? "echo-request" : { unknown: `what \`${of} ${name}\` is` };
    };
  }
  if (!["tcp", "udp", "th"].includes(of)) return () => undefined;
  const port = PORT_SIDES[name];
  return (packet) => {
    if (of !== "th" && packet.protocol !== of) return undefined;
    if (packet.protocol === "icmp") return { unknown: "what stands where other protocols have their ports" };
    if (port !== undefined) return packet[port].port;
    return of === "tcp" && name === "flags" ? span(2) : { unknown: `what \`${of} ${name}\` is` };
  };
}

const META: Readonly<Record<string, Read>> = {
  mark: ({ mark }) => span(mark),
  l4proto: (packet) => span(protocolNumber(packet)),
  nfproto: ({ family }) => `ipv${family}`,
  protocol: ({ family }) => (family === 4 ? "ip" : "ip6"),
  iifname: (packet) => packet.in,
  oifname: (packet) => packet.out,
  iif: (packet) => packet.in,
  oif: (packet) => packet.out,
  skuid: ({ sender }) => (sender === undefined ? undefined : span(sender.uid)),
  skgid: ({ sender }) => {
    if (sender === undefined) return undefined;
    return sender.gid === undefined
      ? { unknown: `the group of user ${sender.uid} is not known` }
      : span(sender.gid);
  },
};

function conntrack({ key, dir }: Bag): Read {
  const name = String(key);
  if (name === "state") return ctState;
  const [, field] = /^(?:ip6? )?(saddr|daddr)$/.exec(name) ?? [];
  const side = field === undefined ? undefined : ADDRESS_SIDES[field];
  const port = { "proto-src": "from", "proto-dst": "to" }[name] as "from" | "to" | undefined;
  return (packet) => {
    if (packet.tracking !== "tracked" && packet.tracking !== "zoned") return undefined;
    if (name === "mark") return span(packet.ctMark);
    if (name === "direction") return "original";
    if (packet.tracking === "zoned") return { unknown: "what the template of a conntrack zone says" };
    if (dir !== "original") return { unknown: `what \`ct ${name}\` is` };
    if (name.startsWith("ip ") && packet.family !== 4) return undefined;
    if (name.startsWith("ip6 ") && packet.family !== 6) return undefined;
    if (side !== undefined) return addressesOf(packet, side, packet.original);
    if (port !== undefined) return packet.original[port].port;
    return { unknown: `what \`ct ${name}\` is` };
  };
}

/** Of the packet's own socket, or of the listener that will get it; without any the rule ends. (nft_socket.c) */
function socket(key: string): Read {
  return (packet, world) => {
    const { sender } = packet;
    if (sender !== undefined) {
      if (key !== "cgroupv2") return { unknown: `what \`socket ${key}\` of the sender is` };
      return sender.cgroup === undefined
        ? { unknown: "the cgroup of the sender is not known" }
        : `${CGROUP}${sender.cgroup}`;
    }
    const found = socketOf(packet, world);
    if (found === undefined) return undefined;
    if (key === "wildcard") return span(Number(found.wildcard));
    if (key === "transparent" && found.transparent !== undefined) return span(Number(found.transparent));
    return { unknown: `what \`socket ${key}\` of the listener is` };
  };
}

/** @see nft(8), FIB EXPRESSIONS */
function fib({ result, flags }: Bag): Read {
  const asked = list(flags);
  const side = asked.includes("daddr") ? "to" : "from";
  return (packet, world) => {
    if (result === "type" && side === "from" && packet.fromAnywhere) return { unknown: ITS_SOURCE };
    if (result === "type" && !asked.includes("iif") && !asked.includes("oif"))
      return addressType(world, packet.family, packet[side].address);
    // The way back of a packet whose interface was found by the route to its source; lo always answers. (nft_fib_ipv4.c)
    if (String(result).startsWith("oif") && side === "from" && packet.in !== undefined) return packet.in;
    return { unknown: `what \`fib ${asked.join(" . ")} ${String(result)}\` is` };
  };
}

/** Two numbers into one; anything else is what it was: absent or unknown. */
function combine(parts: readonly Read[], how: (a: bigint, b: bigint) => bigint): Read {
  return (packet, world) => {
    const got = parts.map((part) => part(packet, world));
    const numbers = got.map(exact);
    const [head, ...rest] = numbers.filter((number) => number !== undefined);
    if (head !== undefined && rest.length === numbers.length - 1) return span(rest.reduce(how, head));
    if (got.some((part) => isSpan(part) && part.low !== part.high))
      return { unknown: "what an operation on a value gives that is not known" };
    return got.find(isUnknown) ?? undefined;
  };
}

const BITWISE: Readonly<Record<string, (a: bigint, b: bigint) => bigint>> = {
  "&": (a, b) => a & b,
  "|": (a, b) => a | b,
  "^": (a, b) => a ^ b,
  "<<": (a, b) => a << b,
  ">>": (a, b) => a >> b,
};

function read(json: Json, sets: Sets, text = false): Read {
  const constant = literal(json, text);
  if (constant !== undefined) return () => constant;
  // Flags side by side are one number.
  if (Array.isArray(json))
    return combine(
      json.map((part) => read(part, sets)),
      (a, b) => a | b,
    );
  const [[name, body] = ["", undefined]] = Object.entries(bag(json));
  const bits = BITWISE[name];
  if (bits !== undefined)
    return combine(
      list(body).map((part) => read(part, sets)),
      bits,
    );
  switch (name) {
    case "payload":
      return payload(bag(body));
    case "meta": {
      const key = String(bag(body)["key"]);
      return META[key] ?? (() => ({ unknown: `what \`meta ${key}\` is` }));
    }
    case "ct":
      return conntrack(bag(body));
    case "fib":
      return fib(bag(body));
    case "socket":
      return socket(String(bag(body)["key"]));
    case "concat": {
      const parts = list(body).map((part) => read(part, sets));
      return (packet, world) => {
        const got = parts.map((part) => part(packet, world));
        const bad = got.find(isUnknown);
        if (got.some((part) => part === undefined)) return undefined;
        return bad ?? (got as Value[]);
      };
    }
    case "map":
      return mapped(bag(body), sets);
    case "numgen":
      return () => ({ unknown: CHANCE });
    default:
      return () => ({ unknown: `what \`${name}\` of nft gives` });
  }
}

const elementsOf = (json: Json, sets: Sets): readonly (readonly [Json, Json])[] | undefined => {
  if (typeof json === "string") return json.startsWith("@") ? sets.get(json.slice(1)) : undefined;
  const { set } = bag(json);
  return Array.isArray(set)
    ? set.map((element): [Json, Json] =>
        Array.isArray(element) ? [element[0], element[1]] : [element, undefined],
      )
    : undefined;
};

/** All elements that the key may be: more than one only if the key is unknown. */
function lookup(
  key: Got,
  elements: readonly (readonly [Json, Json])[],
  sets: Sets,
  text: boolean,
): { data: Json[]; because?: string; mayMiss?: true } {
  if (key === undefined) return { data: [] };
  if (isUnknown(key)) {
    // A modulus always gives one of the elements that are there for it.
    const sure = key.unknown === CHANCE || key.unknown.includes("hash");
    return {
      data: elements.map(([, data]) => data),
      because: key.unknown,
      ...(sure ? {} : { mayMiss: true }),
    };
  }
  let fallback: Json;
  const asked: { readonly data: Json; readonly because: string }[] = [];
  for (const [pattern, data] of elements) {
    if (pattern === "*") {
      fallback = data;
      continue;
    }
    const hit = matches(key, pattern, sets, text);
    if (hit === true) {
      fallback = data;
      break;
    }
    if (isUnknown(hit)) {
      if (!isAskedOfSource(hit.unknown))
        return { data: elements.map(([, each]) => each), because: hit.unknown, mayMiss: true };
      asked.push({ data, because: hit.unknown });
    }
  }
  const rest = fallback === undefined ? [] : [fallback];
  if (asked.length === 0) return { data: rest };
  return {
    data: [...asked.map((each) => each.data), ...rest],
    // Which of them it is: no answer to the question of one.
    because: `${ITS_SOURCE}, of these ${asked.map((each) => each.because).join(" or ")}`,
    ...(fallback === undefined ? { mayMiss: true } : {}),
  };
}

function mapped({ key, data }: Bag, sets: Sets): Read {
  const elements = elementsOf(data, sets);
  const keyOf = read(key, sets);
  if (elements === undefined) return () => ({ unknown: "what a map of nft holds" });
  return (packet, world) => {
    const found = lookup(keyOf(packet, world), elements, sets, isText(key));
    const values = found.data.flatMap((json) => {
      const value = constantOf(json);
      return value === undefined ? [] : [value];
    });
    if (found.because === undefined) return values[0];
    return { unknown: found.because, oneOf: values };
  };
}

function constantOf(json: Json): Value | undefined {
  const { concat, prefix, range } = bag(json);
  if (Array.isArray(concat)) {
    const parts = concat.map(constantOf);
    return parts.every((part) => part !== undefined) ? parts : undefined;
  }
  if (prefix !== undefined || range !== undefined) return spanOf(json);
  return literal(json, false);
}

/** A number, a prefix or a range. */
function spanOf(json: Json): Span | undefined {
  const { prefix, range } = bag(json);
  if (prefix !== undefined) {
    const { addr, len } = bag(prefix);
    return prefixSpan(`${String(addr)}/${String(len)}`);
  }
  if (Array.isArray(range)) {
    const [low, high] = range.map((end) => literal(end, false));
    return isSpan(low) && isSpan(high) ? span(low.low, high.low) : undefined;
  }
  const value = literal(json, false);
  return isSpan(value) ? value : undefined;
}

/** Does a value fall under the right-hand side of a match, or under the key of an element? */
function matches(value: Value, pattern: Json, sets: Sets, text: boolean): Tri {
  const elements = elementsOf(pattern, sets);
  if (elements !== undefined)
    return anyTri(elements.map(([each]) => each === "*" || matches(value, each, sets, text)));
  if (typeof pattern === "string" && pattern.startsWith("@"))
    return { unknown: `what the set ${pattern} holds` };
  const { elem, concat } = bag(pattern);
  if (elem !== undefined) return matches(value, bag(elem)["val"], sets, text);
  if (Array.isArray(value)) {
    const parts = Array.isArray(concat) ? concat : [];
    return (
      parts.length === value.length &&
      allTri(value.map((part, index) => matches(part, parts[index], sets, typeof part === "string")))
    );
  }
  if (typeof value === "string") {
    if (typeof pattern === "boolean") return pattern;
    if (value.startsWith(CGROUP))
      return `${value.slice(CGROUP.length)}/`.startsWith(`${String(pattern).replace(/^\//, "")}/`);
    if (typeof pattern !== "string")
      return { unknown: `whether ${value} matches ${JSON.stringify(pattern)}` };
    return pattern.endsWith("*") ? value.startsWith(pattern.slice(0, -1)) : value === pattern;
  }
  const wanted = spanOf(pattern);
  if (wanted === undefined || !isSpan(value))
    return { unknown: `whether a value matches ${JSON.stringify(pattern)}` };
  return within(value, wanted);
}

const CGROUP = "cgroup:";
const depth = (path: string): number =>
  path
    .replace(CGROUP, "")
    .split("/")
    .filter((part) => part !== "").length;

function matchStep({ op, left, right }: Bag, sets: Sets): Step {
  const negated = op === "!=";
  const { ct, payload: field } = bag(left);
  if (bag(ct)["key"] === "status") {
    return test((packet) => {
      if (packet.tracking !== "tracked") return false;
      if (op !== "in" && !negated) return { unknown: "what exactly the conntrack status is" };
      const hit = list(right).some((bit) => ctStatus(packet).includes(String(bit)));
      return hit !== negated;
    });
  }
  const value = read(left, sets);
  const text = isText(left);
  if (op === "in" && bag(field)["field"] === "flags") {
    const wanted = read(right, sets);
    return test((packet, world) => {
      const [have, want] = [exact(value(packet, world)), exact(wanted(packet, world))];
      return have === undefined || want === undefined ? false : (have & want) !== 0n;
    });
  }
  const compare = COMPARE[String(op)];
  const judge = (got: Value, packet: Packet, world: World): Tri => {
    if (compare !== undefined) {
      const [a, b] = [exact(got), exact(read(right, sets)(packet, world))];
      return a === undefined || b === undefined
        ? { unknown: `whether \`${String(op)}\` holds` }
        : compare(a, b);
    }
    if (op === "in") return anyTri(list(right).map((each) => matches(got, each, sets, text)));
    if (Array.isArray(right)) {
      const wanted = read(right, sets)(packet, world);
      return isSpan(wanted) && isSpan(got) ? within(got, wanted) : false;
    }
    const computed = Object.keys(bag(right))[0] ?? "";
    if (["meta", "ct", "payload", "&", "|", "^"].includes(computed)) {
      const wanted = read(right, sets)(packet, world);
      if (isUnknown(wanted)) return wanted;
      return isSpan(wanted) && isSpan(got) ? within(got, wanted) : got === wanted;
    }
    return matches(got, right, sets, text);
  };
  const step: Test = (packet, world) => {
    const got = value(packet, world);
    if (got === undefined) return false;
    if (isUnknown(got)) return got;
    // One that is not as deep in the tree has no part there that could differ. (nft_socket.c: NFT_BREAK)
    if (typeof got === "string" && got.startsWith(CGROUP) && depth(got) < depth(String(right))) return false;
    const tri = judge(got, packet, world);
    return negated ? notTri(tri) : tri;
  };
  return test(step);
}

const COMPARE: Readonly<Record<string, (a: bigint, b: bigint) => boolean>> = {
  "<": (a, b) => a < b,
  ">": (a, b) => a > b,
  "<=": (a, b) => a <= b,
  ">=": (a, b) => a >= b,
};

function verdictOf(json: Json): Verdict | "on" {
  const [[name, body] = ["", undefined]] = Object.entries(bag(json));
  switch (name) {
    case "accept":
    case "drop":
    case "return":
      return { do: name };
    case "jump":
    case "goto":
      return { do: name, chain: String(bag(body)["target"]) };
    default:
      return "on";
  }
}

const ending = (name: string) => (body: Json) => [
  (packet: Packet): readonly Turn[] => [{ packet, does: verdictOf({ [name]: body }) }],
];

/** `dnat` and `snat`: an address, a port, both, or a map that gives them. */
function nat(direction: "source" | "destination") {
  return (body: Json, sets: Sets): Step[] => {
    const { family, addr, port } = bag(body);
    const addressOf = addr === undefined ? undefined : fixedOr(addr, sets);
    const portOf = port === undefined ? undefined : fixedOr(port, sets);
    const translated = translate(direction, (packet, world) => {
      const address = addressOf?.(packet, world);
      const chosenPort = portOf?.(packet, world);
      const addresses = alternatives(address);
      const ports = alternatives(chosenPort);
      if (typeof addresses === "string") return addresses;
      if (typeof ports === "string") return ports;
      const open = [address, chosenPort].find(isUnknown);
      const because = open === undefined ? {} : { because: open.unknown };
      return addresses.flatMap((one) =>
        ports.map((number) => {
          const [host, own] = Array.isArray(one) ? one : [one, undefined];
          const to = own ?? number;
          return {
            address: isSpan(host) ? host.low : undefined,
            port: isSpan(to) ? to : undefined,
            ...because,
          };
        }),
      );
    });
    const wanted = family === "ip" ? 4 : family === "ip6" ? 6 : undefined;
    return [
      test((packet) => wanted === undefined || packet.family === wanted),
      (packet, world) =>
        // A map without an answer ends the rule without a translation. (nft_lookup.c: NFT_BREAK)
        addressOf !== undefined && addressOf(packet, world) === undefined
          ? [{ packet, does: "miss" }]
          : translated(packet, world),
    ];
  };
}

const fixedOr = (json: Json, sets: Sets): Read => {
  const constant = constantOf(json);
  return constant === undefined ? read(json, sets) : () => constant;
};

/** The values that are possible: both ends of a range, every value of a map whose key is not known. */
function alternatives(got: Got): readonly (Value | undefined)[] | string {
  if (isUnknown(got)) return got.oneOf ?? got.unknown;
  if (isSpan(got) && got.low !== got.high) return [span(got.low), span(got.high)];
  return [got];
}

const STATEMENTS: Readonly<Record<string, (body: Json, sets: Sets) => Step | Step[]>> = {
  match: (body, sets) => matchStep(bag(body), sets),
  counter: () => nothing,
  log: () => nothing,
  limit: () => opaque("how many packets came before"),
  quota: () => opaque("how many packets came before"),
  /** `add` and `update` put an element into a set; the rule goes on. */
  set: () => nothing,
  map: () => nothing,
  "ct helper": () => nothing,
  "ct timeout": () => nothing,
  "ct expectation": () => nothing,
  accept: ending("accept"),
  drop: ending("drop"),
  return: ending("return"),
  jump: ending("jump"),
  goto: ending("goto"),
  continue: () => nothing,
  queue: () => verdict({ do: "queue" }),
  reject: (body) => {
    const { type, expr } = bag(body);
    const refuse = verdict({ do: "reject", with: [type ?? "icmpx", expr].filter(Boolean).join(" ") });
    // nft 1.0.6 leaves out the match that the kind of refusal implies.
    if (type === "tcp reset") return [test(({ protocol }) => protocol === "tcp"), refuse];
    const only = type === "icmp" ? 4 : type === "icmpv6" ? 6 : undefined;
    return only === undefined ? refuse : [test(({ family }) => family === only), refuse];
  },
  vmap: (body, sets) => {
    const { key, data } = bag(body);
    const elements = elementsOf(data, sets);
    if (elements === undefined) return opaque("what a verdict map of nft holds");
    const keyOf = read(key, sets);
    return (packet, world) => {
      const found = lookup(keyOf(packet, world), elements, sets, isText(key));
      const because = found.because === undefined ? {} : { because: found.because };
      const turns: Turn[] = found.data.map((each) => ({ packet, does: verdictOf(each), ...because }));
      return found.data.length === 0 || found.mayMiss
        ? [...turns, { packet, does: "miss", ...because }]
        : turns;
    };
  },
  mangle: (body, sets) => {
    const { key, value } = bag(body);
    const meta = String(bag(bag(key)["meta"])["key"]);
    const ct = String(bag(bag(key)["ct"])["key"]);
    const wanted = read(value, sets);
    if (ct === "zone")
      return change((packet) => (packet.tracking === "not yet" ? { ...packet, tracking: "zoned" } : packet));
    const field = meta === "mark" ? "mark" : ct === "mark" ? "ctMark" : undefined;
    if (field === undefined)
      return /^(nftrace|priority|secmark|pkttype|label)$/.test(`${meta}`) || ct === "label"
        ? nothing
        : opaque(`what setting ${JSON.stringify(key)} does`);
    return (packet, world) => {
      const got = wanted(packet, world);
      // Without a value the rule ends here. (NFT_BREAK)
      if (got === undefined) return [{ packet, does: "miss" }];
      const number = exact(got);
      if (number === undefined)
        return opaque(isUnknown(got) ? got.unknown : `which ${field} is set`)(packet, world);
      if (field === "ctMark" && packet.tracking !== "tracked") return [{ packet, does: "on" }];
      return [{ packet: { ...packet, [field]: number }, does: "on" }];
    };
  },
  notrack: () =>
    change((packet) => (packet.tracking === "not yet" ? { ...packet, tracking: "untracked" } : packet)),
  dnat: nat("destination"),
  snat: nat("source"),
  masquerade: () => masquerade,
  redirect: (body, sets) => {
    const { port } = bag(body);
    if (port === undefined) return redirect(undefined);
    const portOf = fixedOr(port, sets);
    return (packet, world) => {
      const got = portOf(packet, world);
      if (got === undefined) return [{ packet, does: "miss" }];
      return isSpan(got) && got.low === got.high
        ? redirect(got)(packet, world)
        : opaque("which port is redirected to")(packet, world);
    };
  },
  /** Gives no verdict of its own with a listener: the rule goes on with the statement behind it. (nft_tproxy.c) */
  tproxy: (body) => {
    const { addr, port, family } = bag(body);
    const to = port === undefined ? span(0) : spanOf(port);
    if (to === undefined) return opaque("which port tproxy means");
    const only = family === "ip" ? 4 : family === "ip6" ? 6 : undefined;
    return [
      test((packet) => packet.protocol !== "icmp" && (only === undefined || only === packet.family)),
      tproxy(typeof addr === "string" ? addressNumber(addr) : undefined, to, "miss", (packet) => ({
        packet,
        does: "on",
      })),
    ];
  },
};
