import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { ISTIO_BIN } from "../lab/parts.ts";
import { type Output, sh } from "../lab/sh.ts";

export const PILOT_AGENT = `${ISTIO_BIN}/pilot-agent`;
/** Addresses beside loopback and link-local ones. */
export const ADDRESSES = { 4: "10.9.0.1/24", 6: "fd00:9::1/64" } as const;
/** Who calls from outside. */
export const CALLERS = { 4: "10.9.0.2/24", 6: "fd00:9::2/64" } as const;
export const PASSWD =
  "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\nistio-proxy:x:998:997::/:/bin/sh\n";
const GROUP = "root:x:0:\nftp:x:21:\njava:x:203:\n";
const PATH = process.env["PATH"] ?? "/usr/sbin:/usr/bin:/sbin:/bin";

/** Documents for iptables-restore and ip6tables-restore; undefined: the program ended with an error. */
export type Documents = { readonly 4: string; readonly 6: string } | undefined;

/**
 * A network namespace with its own addresses, resolv.conf, passwd and group: what the peer looks at. The other end of its
 * only link is in the namespace `outside`.
 */
export class PeerMachine implements AsyncDisposable {
  readonly name: string;
  readonly families: readonly (4 | 6)[];
  #resolvConf = "";

  private constructor(name: string, families: readonly (4 | 6)[]) {
    this.name = name;
    this.families = families;
  }

  static async make(name: string, families: readonly (4 | 6)[]): Promise<PeerMachine> {
    const machine = new PeerMachine(`vmpar-${name}-${process.pid}`, families);
    mkdirSync(machine.#etc, { recursive: true });
    writeFileSync(`${machine.#etc}/passwd`, PASSWD);
    writeFileSync(`${machine.#etc}/group`, GROUP);
    machine.resolve([]);
    for (const name of [machine.name, machine.outside]) await sh(["ip", "netns", "add", name]);
    const ip = (...words: string[]): Promise<Output> => sh(["ip", "-n", machine.name, ...words]);
    await ip("link", "set", "lo", "up");
    await ip(
      ...["link", "add", "inside", "type", "veth", "peer", "name", "outside", "netns", machine.outside],
    );
    for (const [name, end, addresses] of [
      [machine.name, "inside", ADDRESSES],
      [machine.outside, "outside", CALLERS],
    ] as const) {
      await sh(["ip", "-n", name, "link", "set", end, "up"]);
      for (const family of families)
        await sh([
          ...["ip", "-n", name, "addr", "add", addresses[family], "dev", end],
          ...(family === 6 ? ["nodad"] : []),
        ]);
    }
    return machine;
  }

  /** Name of the namespace of who calls from outside. */
  get outside(): string {
    return `${this.name}-out`;
  }

  get #etc(): string {
    return `/etc/netns/${this.name}`;
  }

  get resolvConf(): string {
    return this.#resolvConf;
  }

  get addresses(): readonly string[] {
    return [
      "127.0.0.1",
      "::1",
      "fe80::1",
      ...this.families.map((family) => ADDRESSES[family].split("/")[0] ?? ""),
    ];
  }

  resolve(servers: readonly string[]): void {
    this.#resolvConf = servers.map((server) => `nameserver ${server}\n`).join("");
    writeFileSync(`${this.#etc}/resolv.conf`, this.#resolvConf);
  }

  /** Runs argv in here with this environment, PATH added. */
  exec(argv: readonly string[], env: Readonly<Record<string, string>> = {}, input?: string): Promise<Output> {
    const words = Object.entries({ PATH, ...env }).map(([name, value]) => `${name}=${value}`);
    return sh(["ip", "netns", "exec", this.name, "env", "-i", ...words, ...argv], {
      allowFail: true,
      // Beside 50,000 foreign rules it cleans up for a quarter of a minute.
      timeoutMs: 120_000,
      ...(input === undefined ? {} : { input }),
    });
  }

  /** What the peer says that it would apply. @throws {Error} if it fails without a word about why */
  async dryRun(argv: readonly string[], env: Readonly<Record<string, string>>): Promise<Documents> {
    const { code, stdout, stderr } = await this.exec(
      [PILOT_AGENT, "istio-iptables", "--dry-run", ...argv],
      env,
    );
    if (code !== 0) {
      if (/\terror\t/.test(`${stdout}${stderr}`)) return undefined;
      throw new Error(`the peer ended with ${code}:\n${stdout}\n${stderr}`);
    }
    const found = { 4: "", 6: "" };
    for (const [, program, text = ""] of stdout.matchAll(
      /Running iptables restore with: (ip6?tables)-restore and the following input:\n(.*?)\n(?=\d{4}-\d\d-\d\dT\S+\t)/gs,
    ))
      found[program === "iptables" ? 4 : 6] = `${text}\n`;
    return found;
  }

  /** Tables in force that hold a rule, as the kernel has them: the peer's look at the machine leaves empty ones behind. */
  async rules(): Promise<string> {
    const saved = await Promise.all(
      ["iptables-nft-save", "ip6tables-nft-save"].map((program) => this.exec([program])),
    );
    return saved
      .map(({ stdout }) => stdout.replace(/^#.*\n?/gm, ""))
      .flatMap((text) => text.split(/^(?=\*)/m))
      .filter((table) => /^-A /m.test(table))
      .map((table) => table.trimEnd())
      .join("\n");
  }

  /** Lays the rules and routes that another has for marked packets: the peer's program adds them itself, beside its rules. */
  async routeLike(other: PeerMachine): Promise<void> {
    for (const family of this.families) {
      const ip = async (machine: PeerMachine, ...words: string[]): Promise<string> =>
        (await sh(["ip", "-n", machine.name, `-${family}`, ...words], { allowFail: true })).stdout;
      for (const [, selector = "", table = ""] of (await ip(other, "rule")).matchAll(
        /from all (fwmark \S+ lookup (\S+))/g,
      )) {
        await ip(this, "rule", "add", ...selector.split(" "));
        if (/^local default dev lo /m.test(await ip(other, "route", "show", "table", table)))
          await ip(this, "route", "add", "local", "default", "dev", "lo", "table", table);
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const name of [this.name, this.outside]) await sh(["ip", "netns", "del", name], { allowFail: true });
    rmSync(this.#etc, { recursive: true, force: true });
  }
}
