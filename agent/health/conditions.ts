/**
 * What is wrong right now, in words. A room raises a condition by its stable id and clears it when it is over;
 * `vmmesh status`, the metrics and the journal all read the same list.
 */
export interface Condition {
  /** Stable, kebab-case: `control-plane-unreachable`. */
  readonly id: string;
  readonly severity: "warning" | "error";
  /** One sentence that names the thing and the reason. */
  readonly message: string;
  /** What the operator can do, one sentence. */
  readonly next: string;
  readonly since: Date;
}

export class Conditions {
  readonly #raised = new Map<string, Condition>();
  readonly #now: () => Date;
  readonly #onChange: (condition: Condition, raised: boolean) => void;

  constructor(now: () => Date, onChange: (condition: Condition, raised: boolean) => void = () => undefined) {
    this.#now = now;
    this.#onChange = onChange;
  }

  raise(id: string, severity: Condition["severity"], message: string, next: string): void {
    const before = this.#raised.get(id);
    if (before !== undefined && before.message === message) return;
    const condition = { id, severity, message, next, since: before?.since ?? this.#now() };
    this.#raised.set(id, condition);
    this.#onChange(condition, true);
  }

  clear(id: string): void {
    const before = this.#raised.get(id);
    if (before === undefined) return;
    this.#raised.delete(id);
    this.#onChange(before, false);
  }

  list(): Condition[] {
    return [...this.#raised.values()].sort((a, b) => a.id.localeCompare(b.id));
  }
}
