/**
 * Every failure that a person may see: one stable code, one exit status, one sentence of what to do next.
 * The codes are documented in README.md; a test holds the two lists equal.
 */
export const ERROR_CODES = {
  // 1: our own fault
  INTERNAL: 1,
  // 2: what was typed or given is wrong
  USAGE: 2,
  PORT_WITHOUT_PROTOCOL: 2,
  BUNDLE_MALFORMED: 2,
  ENV_FILE_MALFORMED: 2,
  CONFIG_MALFORMED: 2,
  NOT_JOINED: 2,
  // 3: this machine cannot do it
  NOT_ROOT: 3,
  NO_SYSTEMD: 3,
  ENVOY_MISSING: 3,
  ENVOY_TOO_OLD: 3,
  COMMAND_FAILED: 3,
  COMMAND_MISSING: 3,
  NO_ADDRESS: 3,
  STATE_UNREADABLE: 3,
  STATE_UNWRITABLE: 3,
  UNIT_FAILED: 3,
  // 4: the mesh refuses or cannot be reached
  ISTIOD_UNREACHABLE: 4,
  ISTIOD_UNTRUSTED: 4,
  IDENTITY_REFUSED: 4,
  TOKEN_EXPIRED: 4,
  TOKEN_AUDIENCE: 4,
  TOKEN_UNREADABLE: 4,
  CERT_NOT_VALID: 4,
  CERT_WRONG_ROOT: 4,
  CLOCK_OFF: 4,
  NOT_READY: 4,
  // 5: the Kubernetes API refuses or cannot be reached
  KUBECONFIG_MISSING: 5,
  KUBECONFIG_MALFORMED: 5,
  KUBE_UNREACHABLE: 5,
  KUBE_FORBIDDEN: 5,
  KUBE_NOT_FOUND: 5,
  KUBE_CONFLICT: 5,
  KUBE_FAILED: 5,
  // 6: somebody else is at it
  BUSY: 6,
  ALREADY_JOINED: 6,
  // 7: the firewall
  RULES_REJECTED: 7,
  RULES_NOT_CONFIRMED: 7,
  RULES_PRIVILEGE: 7,
} as const;

export type ErrorCode = keyof typeof ERROR_CODES;

/** What a person is told beside the sentence itself. */
export interface ErrorDetails {
  /** One sentence: the command to run or the thing to change. */
  readonly next?: string;
  readonly cause?: unknown;
}

/** The one error class of vmmesh. `message` names the thing that failed; `next` says what to do about it. */
export class VmmeshError extends Error {
  override readonly name = "VmmeshError";
  readonly code: ErrorCode;
  readonly next: string | undefined;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    this.next = details.next;
  }

  /** Process exit status, 1 to 7; what each number means is in README.md. */
  get exitCode(): number {
    return ERROR_CODES[this.code];
  }

  /** Anything thrown, as one of ours: an unknown error becomes INTERNAL and keeps its cause. */
  static from(thrown: unknown): VmmeshError {
    if (thrown instanceof VmmeshError) return thrown;
    const unwritable = unwritableFile(thrown);
    if (unwritable !== undefined) return unwritable;
    return new VmmeshError("INTERNAL", messageOf(thrown), {
      cause: thrown,
      next: "This is a fault in vmmesh: run the command again with --log-level debug and report its output.",
    });
  }
}

/** What a machine, not vmmesh, is to blame for, by errno(3). */
const UNWRITABLE: Readonly<Record<string, string>> = {
  EROFS: "its file system is read-only",
  ENOSPC: "its file system is full",
  EDQUOT: "the quota of its file system is used up",
  EIO: "its disk answers with an error",
};

function unwritableFile(thrown: unknown): VmmeshError | undefined {
  const { code = "", path } = thrown instanceof Error ? (thrown as NodeJS.ErrnoException) : {};
  const why = UNWRITABLE[code];
  if (why === undefined) return undefined;
  const what = path ?? "a file";
  return new VmmeshError("STATE_UNWRITABLE", `${what} cannot be written: ${why}`, {
    cause: thrown,
    next: `Look at \`findmnt -T ${path ?? "/var/lib"}\` and \`df\`, mend it, and run the same command again.`,
  });
}

/** The sentence in anything thrown, without a stack. */
export function messageOf(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}

/** The message and those of its causes, outermost first, each once. */
export function causesOf(thrown: unknown): string[] {
  const seen = new Set<string>();
  for (let at: unknown = thrown; at !== undefined && at !== null && seen.size < 8; at = (at as Error).cause) {
    seen.add(messageOf(at));
    if (!(at instanceof Error)) break;
  }
  return [...seen];
}

/**
 * Three lines for a terminal: what failed, because of what, and what to do next.
 *
 * @example
 * vmmesh: RULES_REJECTED: the kernel refused rule `-A NOPE -j RETURN` (line 2)
 *   because: iptables-restore v1.8.9: line 2 failed
 *   next:    Run `vmmesh iptables audit` …
 */
export function describeError(thrown: unknown): string {
  const error = VmmeshError.from(thrown);
  const [, ...because] = causesOf(error);
  const lines = [`vmmesh: ${error.code}: ${error.message}`];
  for (const reason of because) lines.push(`  because: ${reason}`);
  if (error.next !== undefined) lines.push(`  next:    ${error.next}`);
  return lines.join("\n");
}
