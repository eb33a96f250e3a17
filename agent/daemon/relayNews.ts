import { messageOf } from "../core/errors.ts";
import type { Conditions } from "../health/conditions.ts";
import type { Clock } from "../platform/host.ts";
import type { Logger } from "../telemetry/log.ts";
import type { Metrics } from "../telemetry/metrics.ts";
import type { RelayEvent } from "../xds/relay.ts";

/** What a machine is without when its Envoy lacks one of Istio's own extensions (ch. 10 of the VM protocol). */
const STRIPPED_LOSS: Readonly<Record<string, string>> = {
  "istio.alpn": "HTTP policy on undeclared ports",
  "istio.metadata_exchange": "peer labels",
  "istio.stats": "custom dimensions of istio_requests_total",
};

export interface RelayNewsDeps {
  readonly clock: Pick<Clock, "now">;
  readonly metrics: Pick<
    Metrics,
    | "envoyConnectionTerminations"
    | "istiodConnectionFailures"
    | "istiodConnectionTerminations"
    | "xdsConnected"
    | "xdsReconnects"
    | "xdsRejections"
    | "xdsStale"
    | "xdsStripped"
  >;
  readonly conditions: Pick<Conditions, "raise" | "clear">;
  readonly log: Pick<Logger, "debug" | "info" | "warning">;
}

/** What the relay tells, as conditions, metrics and lines of the journal; and what others ask of it. */
export class RelayNews {
  readonly #deps: RelayNewsDeps;
  #lastRejection: string | undefined;
  #identityRefused = false;
  #reached = 0;
  #lostAt: Date | undefined;

  constructor(deps: RelayNewsDeps) {
    this.#deps = deps;
    this.#lostAt = deps.clock.now();
  }

  /** Type and words of what was refused last, also when it no longer stands. */
  get lastRejection(): string | undefined {
    return this.#lastRejection;
  }
  /** Whether the control plane judged our identity when it was tried last. */
  get identityRefused(): boolean {
    return this.#identityRefused;
  }
  /** How often the control plane was reached. */
  get reached(): number {
    return this.#reached;
  }
  /** Since when no control plane is there; undefined: it is. */
  get lostAt(): Date | undefined {
    return this.#lostAt;
  }

  take(event: RelayEvent): void {
    const { clock, metrics, conditions, log } = this.#deps;
    switch (event.kind) {
      case "connected":
        metrics.xdsConnected.set(1);
        this.#lostAt = undefined;
        this.#identityRefused = false;
        this.#reached += 1;
        conditions.clear("control-plane-unreachable");
        log.info(`connected to istiod at ${event.address}`);
        return;
      case "disconnected":
        metrics.xdsConnected.set(0);
        metrics.xdsReconnects.inc();
        metrics.istiodConnectionTerminations.inc({ type: "error" });
        this.#lostAt = clock.now();
        log.info(`istiod at ${event.address} is gone: ${event.reason}`);
        return;
      case "unreachable":
        metrics.istiodConnectionFailures.inc();
        this.#identityRefused =
          event.error.code === "CERT_WRONG_ROOT" || event.error.code === "IDENTITY_REFUSED";
        conditions.raise(
          "control-plane-unreachable",
          "warning",
          `no control plane: ${event.error.message}; Envoy goes on with what it has`,
          event.error.next ?? "vmmesh keeps trying.",
        );
        log.debug("next attempt", {
          in_ms: Math.round(event.retryInMs),
          cause: messageOf(event.error.cause),
        });
        return;
      case "rejected":
        metrics.xdsRejections.inc({ type: shortType(event.typeUrl) });
        this.#lastRejection = `${shortType(event.typeUrl)}: ${event.reason}`;
        return;
      case "refusals": {
        const [first, ...more] = event.standing;
        if (first === undefined) conditions.clear("configuration-rejected");
        else
          conditions.raise(
            "configuration-rejected",
            "error",
            `what the control plane sent was refused and is not in force: ${shortType(first.typeUrl)}: ${first.reason}${more.length === 0 ? "" : ` (and ${more.length} more)`}`,
            "Another configuration, or an Envoy that can load this one (--envoy); it is over by itself when it is accepted or taken back.",
          );
        return;
      }
      case "stripped":
        metrics.xdsStripped.reset();
        for (const name of event.names) metrics.xdsStripped.set({ name }, 1);
        if (event.names.length === 0) conditions.clear("extensions-stripped");
        else
          conditions.raise(
            "extensions-stripped",
            "warning",
            `not in this Envoy, so taken out: ${event.names.join(", ")}; lost with them: ${event.names.map((name) => STRIPPED_LOSS[name] ?? name).join(", ")}`,
            "Mutual TLS and identities are whole. Declare the protocol of ports; for Istio's telemetry run the Envoy of your Istio release (--envoy).",
          );
        return;
      case "restored":
        metrics.xdsStale.set(1);
        conditions.raise(
          "configuration-stale",
          "warning",
          `no control plane answers: Envoy has the configuration that was saved at ${event.savedAt.toISOString()}`,
          "A policy that has changed since does not apply before the control plane is back.",
        );
        return;
      case "fresh":
        metrics.xdsStale.set(0);
        conditions.clear("configuration-stale");
        conditions.clear("last-good-failed");
        return;
      case "last-good-ended":
        metrics.xdsStale.set(0);
        conditions.clear("configuration-stale");
        log.warning("the certificate of the saved configuration has ended: it is not served any more");
        return;
      case "last-good-failed":
        conditions.raise(
          "last-good-failed",
          "warning",
          `a start without a control plane finds no configuration: ${event.error.message}`,
          event.error.next ?? "Look for free space below /var/lib/vmmesh.",
        );
        return;
      case "last-good-saved":
        conditions.clear("last-good-failed");
        return;
      case "reopened":
        log.info(`istiod has not sent ${event.missing.join(", ")}: asking anew`);
        return;
      case "node-changed":
        metrics.xdsStale.set(0);
        conditions.clear("configuration-stale");
        log.info("Envoy has another node now: asking istiod anew in its name");
        return;
      case "envoy-connected":
        log.info("Envoy is connected", { streams: event.streams });
        return;
      case "envoy-gone":
        metrics.envoyConnectionTerminations.inc({ type: "cancelled" });
        log.info("Envoy is gone", { streams: event.streams });
        return;
    }
  }
}

/** `type.googleapis.com/envoy.config.cluster.v3.Cluster` → `Cluster`. */
export function shortType(typeUrl: string): string {
  return typeUrl.slice(typeUrl.lastIndexOf(".") + 1);
}
