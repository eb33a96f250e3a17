import type { Lab, Machine } from "../lab/lab.ts";
import { KUBE_BIN } from "../lab/parts.ts";
import type { Seen } from "./stage.ts";

/** What an Envoy answers by itself that knows no endpoint to send to. */
const NOWHERE = "status 503: no healthy upstream";

/** Watches for machines that istiod withdraws: it deletes the WorkloadEntry that it made when the machine registered. */
export class Withdrawals implements AsyncDisposable {
  readonly #watch: ReturnType<Lab["spawn"]>;
  /** The log goes on where another watch has ended. */
  readonly #from: number;

  constructor(lab: Lab) {
    this.#watch = lab.spawn("drill-entries", [
      ...[`${KUBE_BIN}/kubectl`, "--kubeconfig", lab.kubeconfig("admin"), "get", "workloadentries"],
      ...["-n", "default", "--watch-only", "--output-watch-events", "--no-headers"],
    ]);
    this.#from = this.#watch.log().length;
  }

  /** How often since the beginning. */
  of({ name }: Machine): number {
    return [
      ...this.#watch
        .log()
        .slice(this.#from)
        .matchAll(new RegExp(`^DELETED +${name}-`, "gm")),
    ].length;
  }

  /** What was lost because the others knew no such machine: the client's own Envoy says so of each request. */
  allow(machine: Machine, seen: Seen): { readonly allowed: number; readonly because: string } {
    const times = this.of(machine);
    return times === 0
      ? { allowed: 0, because: "istiod has not withdrawn the machine" }
      : {
          allowed: seen.reasons[NOWHERE] ?? 0,
          because:
            "istiod withdraws a machine that it has not heard of for PILOT_WORKLOAD_ENTRY_GRACE_PERIOD, 10 s, and these the client's Envoy had nowhere to send",
        };
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#watch.stop();
  }
}
