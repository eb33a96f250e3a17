import { VmmeshError } from "../core/errors.ts";
import { bracketed, coversCidr, parseCidr } from "../core/net.ts";

/** What happens to a connection that Envoy should carry while Envoy does not answer: it is refused, or it goes direct. */
export type Failure = "open" | "closed";

/** One line of the failure policy. */
export interface PolicyRule {
  readonly direction: "inbound" | "outbound";
  /** Destination; `*`: every one that is captured. Inbound it is this machine, hence always `*`. */
  readonly to: string;
  /** undefined: every port that is captured. */
  readonly port: number | undefined;
  readonly failure: Failure;
}

const RULE = /^(inbound|outbound):(\*|\[[^\]]*\]|[^:[\]]+)(?::([^:]+))?=(open|closed)$/;
const PORT = /^[1-9]\d{0,4}$/;

/**
 * `outbound:10.0.0.0/8:443=closed`, `outbound:[fd00::/8]=open`, `outbound:*=closed`, `inbound:8080=open`, `inbound:*=open`.
 *
 * @throws {VmmeshError} USAGE if it is none of them
 */
export function parsePolicyRule(text: string): PolicyRule {
  const wrong = (why: string): VmmeshError =>
    new VmmeshError("USAGE", `\`${text}\` is no failure policy: ${why}`, {
      next: "Write it like outbound:10.0.0.0/8:443=closed, outbound:*=closed or inbound:8080=open.",
    });
  const match = RULE.exec(text.trim());
  if (match === null) throw wrong("it is not DIRECTION:DESTINATION[:PORT]=open|closed");
  const [, direction, place = "", portText, failure] = match;
  const portOf = (word: string): number => {
    const port = PORT.test(word) ? Number(word) : 0;
    if (port < 1 || port > 65_535) throw wrong(`${word} is not a port`);
    return port;
  };
  const verdict: Failure = failure === "open" ? "open" : "closed";
  if (direction === "inbound") {
    if (portText !== undefined) throw wrong("inbound names a port or *, the destination is this machine");
    return {
      direction,
      to: "*",
      port: place === "*" ? undefined : portOf(place),
      failure: verdict,
    };
  }
  const to = place.replace(/^\[(.*)\]$/, "$1");
  const cidr = parseCidr(to);
  if (to !== "*" && cidr === undefined) throw wrong(`${to} is not an IP address or prefix`);
  return {
    direction: "outbound",
    to: cidr === undefined ? "*" : `${cidr.address}/${cidr.bits}`,
    port: portText === undefined ? undefined : portOf(portText),
    failure: verdict,
  };
}

/** As `parsePolicyRule` reads it. */
export function formatPolicyRule({ direction, to, port, failure }: PolicyRule): string {
  if (direction === "inbound") return `inbound:${port ?? "*"}=${failure}`;
  return `outbound:${bracketed(to)}${port === undefined ? "" : `:${port}`}=${failure}`;
}

/** Do both speak of the same connections? */
export function samePlace(a: PolicyRule, b: PolicyRule): boolean {
  return a.direction === b.direction && a.port === b.port && sameNetwork(a.to, b.to);
}

/** Two destinations (`*` or a prefix) are the same, host bits aside. */
export function sameNetwork(a: string, b: string): boolean {
  return inside(a, b) && inside(b, a);
}

/** Is destination `inner` (`*` or a prefix) wholly part of `outer`? */
export function inside(inner: string, outer: string): boolean {
  if (outer === "*") return true;
  const [within, around] = [parseCidr(inner), parseCidr(outer)];
  return within !== undefined && around !== undefined && coversCidr(around, within);
}

/** The most specific first: by the length of the prefix, then one with a port before one without. */
export function bySpecificity(a: PolicyRule, b: PolicyRule): number {
  const bits = ({ to }: PolicyRule): number => parseCidr(to)?.bits ?? -1;
  const withPort = ({ port }: PolicyRule): number => (port === undefined ? 0 : 1);
  return bits(b) - bits(a) || withPort(b) - withPort(a);
}
