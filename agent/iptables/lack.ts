/** Something that the rules need and this machine has not. */
export interface Lack {
  readonly sentence: string;
  readonly next: string;
  /** The extension of iptables that is missing, if it is one. */
  readonly extension?: string;
}

/** What of a rule of nft is in a module of its own. @see the kernel's net/netfilter/Kconfig and net/ipv4/netfilter/Kconfig */
const NFT_MODULES: readonly { readonly in: RegExp; readonly part: string; readonly module: string }[] = [
  { in: /\btproxy to\b/, part: "tproxy", module: "nft_tproxy" },
  { in: /\bsocket (transparent|cgroupv2)\b/, part: "socket", module: "nft_socket" },
  { in: /\bfib\b/, part: "fib", module: "nft_fib_ipv4" },
  { in: /\bredirect to\b/, part: "redirect", module: "nft_redir" },
  { in: /\breject with\b/, part: "reject", module: "nft_reject_inet" },
  { in: /\bct\b/, part: "ct", module: "nft_ct" },
  { in: /\btype nat hook\b/, part: "nat", module: "nft_chain_nat" },
];

/**
 * What is missing, by what a program says that refuses the rules. Pure.
 *
 * iptables: the library of an extension (exit code 2), or the kernel's part of it; of that it only warns, and `--test` goes
 * on to exit code 0. nft: the line, and ENOENT or EOPNOTSUPP for it.
 */
export function lackOf(stderr: string): Lack | undefined {
  const library =
    /Couldn't load (?:match|target) `([^']+)'/.exec(stderr)?.[1] ??
    // A target without its library is taken for a chain; its options give it away.
    (/unknown option "--on-port"/.test(stderr) ? "TPROXY" : undefined);
  if (library !== undefined)
    return {
      sentence: `the iptables of this machine has no extension \`${library}\`, which the rules need`,
      next: `Install the whole package \`iptables\`, ${otherwise(library)}`,
      extension: library,
    };
  const kernel = /Extension (\S+) (?:revision \d+ )?(?:is )?not supported, missing kernel module/.exec(
    stderr,
  )?.[1];
  if (kernel !== undefined)
    return { ...moduleLack(kernel, `xt_${kernel}`, otherwise(kernel)), extension: kernel };
  const table = /(?:unable to initialize table|can't initialize ip6?tables table) [`']([^']+)'/.exec(
    stderr,
  )?.[1];
  if (table !== undefined) return moduleLack(`table ${table} of iptables`, `iptable_${table}`, OR_NFTABLES);
  const line =
    /Error: Could not process rule: (?:No such file or directory|Operation not supported)\n(.*)/.exec(
      stderr,
    )?.[1];
  const part = NFT_MODULES.find((it) => line !== undefined && it.in.test(line));
  return part === undefined
    ? undefined
    : moduleLack(part.part, part.module, "or boot a kernel that has it; then run the same command again.");
}

const OR_NFTABLES =
  "or take --backend nftables (VMMESH_BACKEND in sidecar.env), which needs none of iptables.";

/** Capture does without this one extension. */
const otherwise = (extension: string): string =>
  extension === "comment"
    ? "or leave the rules' reasons out: --rule-comments off (VMMESH_RULE_COMMENTS=false in sidecar.env)."
    : OR_NFTABLES;

function moduleLack(what: string, module: string, otherwise: string): Lack {
  return {
    sentence: `this kernel has no \`${what}\`, which the rules need`,
    next: `Load it with \`modprobe ${module}\`, ${otherwise}`,
  };
}
