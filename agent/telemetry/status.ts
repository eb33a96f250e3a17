import { styleText } from "node:util";
import { formatDuration } from "../core/time.ts";
import type { Condition } from "../health/conditions.ts";
import { printable } from "./printable.ts";

/** A moment as JSON carries it: RFC 3339. */
type Moment = string;

/** Everything `vmmesh status` tells, as the agent gives it over its admin socket (JSON). */
export interface StatusSnapshot {
  readonly version: string;
  readonly startedAt: Moment;
  /** What readiness still waits for; empty is ready. */
  readonly waitingFor: readonly string[];
  readonly identity:
    | {
        readonly spiffe: string;
        readonly notAfter: Moment;
        readonly nextRenewal?: Moment;
        readonly nextCredential: "certificate" | "token" | "command" | "none";
        readonly lastError?: string;
      }
    | undefined;
  readonly controlPlane: {
    /** `host:port` as the certificate names it. */
    readonly name: string;
    /** Present while connected. */
    readonly address?: string;
    /** Of the connection, or of its loss. */
    readonly since?: Moment;
    readonly lastRejection?: string;
    /** When the configuration was saved, while Envoy is served what is on disk. */
    readonly staleSince?: Moment;
    readonly resources: Readonly<Record<string, number>>;
  };
  readonly envoy: { readonly version?: string; readonly state: string };
  readonly capture: {
    readonly inForce: boolean;
    /** `ports 80, 443`, `all ports`. */
    readonly inbound: string;
    readonly outbound: string;
    readonly repairs: number;
    /** Whose tables the rules are in, and why there. */
    readonly backend?: string;
    /** What the fence refused, and let past Envoy as the failure policy allows. */
    readonly counts?: Readonly<
      Record<"refused" | "bypassed", { readonly inbound: number; readonly outbound: number }>
    >;
    /** What becomes of captured connections while Envoy does not answer, where it is not the default. */
    readonly failurePolicy?: readonly string[];
  };
  readonly dns: {
    readonly captured: boolean;
    readonly names: number;
    readonly upstreams: readonly {
      readonly address: string;
      readonly healthy: boolean;
      readonly lastError?: string;
    }[];
  };
  readonly registration: {
    readonly group?: string;
    readonly address?: string;
    /** The address stands among the mesh's endpoints, as far as this machine was told. */
    readonly listed: boolean;
  };
  readonly health:
    | {
        readonly state: "healthy" | "unhealthy" | "unknown";
        readonly message?: string;
        readonly since?: Moment;
      }
    | undefined;
  readonly conditions: readonly (Omit<Condition, "since"> & { readonly since: Moment })[];
}

const WIDTH = 80;
const LABEL = 15;
/** One screen of 24 lines, the prompt included. */
const MAX_LINES = 23;
/** From here on an approaching end of the certificate is worth a colour. */
const EXPIRY_WARNING_MS = 60 * 60 * 1000;

/** A condition's sentence, and its advice, may take this many lines each. */
const MAX_SENTENCE_LINES = 3;

const NONE = { inbound: 0, outbound: 0 } as const;
const NOT_COUNTED = { refused: NONE, bypassed: NONE } as const;

type Tone = "good" | "bad" | "warn" | "plain";
const COLORS = { good: "green", bad: "red", warn: "yellow" } as const;

/**
 * One screen: at most 23 lines of 80 columns, the same words whatever the colours. What is wrong stands last, with what
 * to do about it; if there is more wrong than fits, the last line says how much.
 */
export function renderStatus(
  status: StatusSnapshot,
  options: { readonly color: boolean; readonly now: Date },
): string {
  const paint = (text: string, tone: Tone): string =>
    options.color && tone !== "plain" ? styleText(COLORS[tone], text, { validateStream: false }) : text;
  const lines: string[] = [];
  const row = (label: string, text: string, tone: Tone = "plain"): void => {
    lines.push(label.padEnd(LABEL) + paint(clip(text, WIDTH - LABEL), tone));
  };
  const ago = (moment: Moment | undefined): string =>
    moment === undefined
      ? ""
      : ` for ${formatDuration(Math.max(0, options.now.getTime() - Date.parse(moment)))}`;
  const until = (moment: Moment): string => formatDuration(Date.parse(moment) - options.now.getTime());

  const ready = status.waitingFor.length === 0;
  row(
    "vmmesh",
    `${status.version}, up${ago(status.startedAt)}, ${ready ? "ready" : `waiting for ${status.waitingFor.join(", ")}`}`,
    ready ? "good" : "warn",
  );

  const { identity } = status;
  if (identity === undefined) row("identity", "none yet", "bad");
  else {
    const left = Date.parse(identity.notAfter) - options.now.getTime();
    row("identity", identity.spiffe);
    const renewal = identity.nextRenewal === undefined ? "" : `, renewal in ${until(identity.nextRenewal)}`;
    const by =
      identity.nextCredential === "none" ? ", NO credential for it" : ` by ${identity.nextCredential}`;
    row(
      "",
      left > 0
        ? `valid for ${formatDuration(left)}${renewal}${by}`
        : `ended ${formatDuration(-left)} ago${renewal}${by}`,
      left <= 0 ? "bad" : left < EXPIRY_WARNING_MS || identity.nextCredential === "none" ? "warn" : "good",
    );
    if (identity.lastError !== undefined) row("", `last try: ${identity.lastError}`, "warn");
  }

  const { controlPlane } = status;
  const connected = controlPlane.address !== undefined;
  row(
    "control plane",
    connected
      ? `connected to ${controlPlane.address}${ago(controlPlane.since)}`
      : `not connected${ago(controlPlane.since)}`,
    connected ? "good" : "bad",
  );
  const resources = Object.entries(controlPlane.resources).map(([type, count]) => `${count} ${type}`);
  row("", `${controlPlane.name}${resources.length === 0 ? "" : `: ${resources.join(", ")}`}`);
  if (controlPlane.staleSince !== undefined)
    row("", `configuration on disk, saved at ${controlPlane.staleSince}: stale`, "warn");
  if (controlPlane.lastRejection !== undefined)
    row("", `Envoy refused: ${controlPlane.lastRejection}`, "warn");

  const { envoy, capture, dns, registration, health } = status;
  row(
    "envoy",
    `${envoy.state}${envoy.version === undefined ? "" : `, ${envoy.version}`}`,
    envoy.state === "live" ? "good" : "bad",
  );
  row(
    "capture",
    capture.inForce
      ? `in force: in ${capture.inbound}; out ${capture.outbound}${capture.repairs === 0 ? "" : `; repaired ${capture.repairs}×`}`
      : "not in force",
    capture.inForce ? "good" : "bad",
  );
  if (capture.inForce && capture.backend !== undefined) row("", `by ${capture.backend}`);
  if (capture.failurePolicy !== undefined && capture.failurePolicy.length > 0)
    row("", `without Envoy: ${capture.failurePolicy.join(", ")}`);
  const { refused, bypassed } = capture.counts ?? NOT_COUNTED;
  if (refused.inbound + refused.outbound + bypassed.inbound + bypassed.outbound > 0)
    row(
      "",
      `fence: ${refused.inbound} in, ${refused.outbound} out refused; ${bypassed.inbound} in, ${bypassed.outbound} out past Envoy`,
    );
  const sick = dns.upstreams.filter((server) => !server.healthy);
  const servers = dns.upstreams.map(
    (server) => `${server.address}${server.healthy ? "" : ` (${server.lastError ?? "silent"})`}`,
  );
  row(
    "dns",
    dns.captured ? `${dns.names} names of the mesh; the rest to ${servers.join(", ")}` : "not captured",
    sick.length > 0 ? "warn" : "plain",
  );
  row(
    "registration",
    registration.group === undefined
      ? "none: this machine registers no workload"
      : `${registration.group}${registration.address === undefined ? "" : ` as ${registration.address}`}${registration.listed ? ", listed" : ""}`,
  );
  row(
    "health",
    health === undefined
      ? "no probe: always healthy"
      : `${health.state}${ago(health.since)}${health.message === undefined ? "" : `: ${health.message}`}`,
    health === undefined
      ? "plain"
      : health.state === "healthy"
        ? "good"
        : health.state === "unhealthy"
          ? "bad"
          : "warn",
  );

  lines.push("");
  if (status.conditions.length === 0) lines.push("Nothing is wrong.");
  const bySeverity = status.conditions.toSorted(
    (a, b) => a.severity.localeCompare(b.severity) || a.id.localeCompare(b.id),
  );
  let shown = 0;
  for (const condition of bySeverity) {
    const tone = condition.severity === "error" ? "bad" : "warn";
    const head = `${condition.severity} ${condition.id}${ago(condition.since)}: ${condition.message}`;
    const block = [
      ...wrapped(head, "", MAX_SENTENCE_LINES).map((line) => paint(line, tone)),
      ...wrapped(condition.next, "  → ", MAX_SENTENCE_LINES),
    ];
    const room = MAX_LINES - lines.length - (shown + 1 < bySeverity.length ? 1 : 0);
    if (block.length > room) break;
    lines.push(...block);
    shown += 1;
  }
  if (shown < bySeverity.length) lines.push(`… and ${bySeverity.length - shown} more: vmmesh status --json`);
  return `${lines.join("\n")}\n`;
}

/** A sentence over at most `most` lines of the screen, broken between words; what is over is cut off. */
function wrapped(text: string, lead: string, most: number): string[] {
  const lines: string[] = [];
  let rest = clip(text, Number.POSITIVE_INFINITY);
  let indent = lead;
  while (rest !== "" && lines.length < most - 1) {
    const room = WIDTH - indent.length;
    const space = rest.length <= room ? room : rest.lastIndexOf(" ", room);
    const end = space > 0 ? space : room;
    lines.push(indent + rest.slice(0, end));
    rest = rest.slice(end).trimStart();
    indent = "    ";
  }
  if (rest !== "") lines.push(clip(indent + rest, WIDTH));
  return lines;
}

/** One printable line of at most `width` columns. */
function clip(text: string, width: number): string {
  const line = printable(text);
  return line.length <= width ? line : `${line.slice(0, width - 1)}…`;
}
