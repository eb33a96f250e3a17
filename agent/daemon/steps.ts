import type { Paths } from "../core/paths.ts";
import { PORTS } from "../core/paths.ts";
import { UNITS } from "../platform/services.ts";
import type { Owners } from "../platform/users.ts";

/**
 * Everything a join can do, as data: the union of steps and the table of executors (`execute.ts`) are derived from this
 * one interface, so that a new step without an executor does not compile.
 */
export interface StepArgs {
  "make-dir": { readonly path: string; readonly mode: number; readonly owner: keyof Owners };
  /**
   * A new directory of the agent's, whatever was there: an agent that was broken may have left links for root to follow.
   * The agent does not run while root fills it.
   */
  "empty-dir": { readonly path: string };
  "write-file": {
    readonly path: string;
    readonly content: string;
    readonly mode: number;
    readonly owner: keyof Owners;
  };
  link: { readonly path: string; readonly target: string };
  /** Key and CSR are made here, the certificate comes from istiod's CA; the token is used, never stored by this step. */
  enroll: { readonly spiffe: string };
  /** The capabilities that the mode of interception needs, as a drop-in of Envoy's unit; none for REDIRECT. */
  "grant-envoy": { readonly mode: "REDIRECT" | "TPROXY" };
  "start-unit": { readonly unit: string; readonly enable: boolean };
  /** Envoy has its configuration and its listeners answer. */
  "await-ready": { readonly withinMs: number };
  /** Guard, fence and ISTIO_* chains under a timer that takes them out again unless connectivity is confirmed. */
  "install-rules": { readonly confirmWithinMs: number };
}

export type Step = { readonly [K in keyof StepArgs]: { readonly do: K } & StepArgs[K] }[keyof StepArgs];

/** Names a step within one join; the journal finds it again by this. */
export function stepKey(step: Step): string {
  switch (step.do) {
    case "make-dir":
    case "empty-dir":
    case "write-file":
    case "link":
      return `${step.do} ${step.path}`;
    case "start-unit":
      return `${step.do} ${step.unit}`;
    case "enroll":
    case "grant-envoy":
    case "await-ready":
    case "install-rules":
      return step.do;
  }
}

/** What a rendered file is, before it becomes a step. */
export interface RenderedFile {
  readonly path: string;
  readonly content: string;
}

export interface JoinFacts {
  readonly paths: Paths;
  readonly files: readonly RenderedFile[];
  readonly token: string | undefined;
  readonly spiffe: string;
  readonly envoyPath: string;
  readonly interceptionMode: "REDIRECT" | "TPROXY";
  readonly confirmWithinMs: number;
  readonly readyWithinMs: number;
}

/**
 * The steps of a join, in the only order that is safe: identity before Envoy (a wrong token costs nothing yet), Envoy
 * before rules (a redirect to a dead port cuts the machine off), rules before boot enablement (a reboot in the middle
 * of a trial must come back without it).
 */
export function planJoin(facts: JoinFacts): Step[] {
  const { paths } = facts;
  return [
    { do: "make-dir", path: paths.etc, mode: 0o755, owner: "root" },
    ...facts.files.map(
      (file): Step => ({
        do: "write-file",
        path: file.path,
        content: file.content,
        mode: 0o644,
        owner: "root",
      }),
    ),
    { do: "link", path: `${paths.etc}/envoy`, target: facts.envoyPath },
    { do: "empty-dir", path: paths.state },
    ...(facts.token === undefined
      ? []
      : [
          { do: "write-file", path: paths.token, content: facts.token, mode: 0o600, owner: "agent" } as const,
        ]),
    { do: "enroll", spiffe: facts.spiffe },
    { do: "start-unit", unit: UNITS.agent, enable: false },
    { do: "start-unit", unit: UNITS.envoyLog, enable: false },
    { do: "grant-envoy", mode: facts.interceptionMode },
    { do: "start-unit", unit: UNITS.envoy, enable: false },
    { do: "await-ready", withinMs: facts.readyWithinMs },
    { do: "install-rules", confirmWithinMs: facts.confirmWithinMs },
    { do: "start-unit", unit: UNITS.fence, enable: true },
    { do: "start-unit", unit: UNITS.target, enable: true },
  ];
}

/** One line a step, for `--dry-run` and for progress. No secret is in it. */
export function describeStep(step: Step): string {
  switch (step.do) {
    case "make-dir":
      return `make the directory ${step.path} (${step.mode.toString(8)}, ${step.owner})`;
    case "empty-dir":
      return `make an empty directory ${step.path} for the agent alone`;
    case "write-file":
      return `write ${step.path} (${step.mode.toString(8)}, ${step.owner}, ${step.content.length} bytes)`;
    case "link":
      return `link ${step.path} → ${step.target}`;
    case "enroll":
      return `make a key, ask istiod's CA for a certificate as ${step.spiffe}`;
    case "grant-envoy":
      return step.mode === "TPROXY"
        ? "let Envoy, which is not root, have the transparent listener that TPROXY needs"
        : "leave Envoy without any capability";
    case "start-unit":
      return `start ${step.unit}${step.enable ? " and enable it at boot" : ""}`;
    case "await-ready":
      return `wait until Envoy answers on ${PORTS.readiness} (at most ${step.withinMs / 1000} s)`;
    case "install-rules":
      return `install the rules; they go out again by themselves unless connectivity is confirmed within ${step.confirmWithinMs / 1000} s`;
  }
}
