import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Lab, type Machine, sleep, waitFor } from "../../lab/lab.ts";
import { sh } from "../../lab/sh.ts";

export const PORT = 2222;
/** Of each trial; the shortest that leaves a slow machine time for its checks. */
export const CONFIRM_SECONDS = 4;
/** A timer's accuracy, the undo script itself, and the pause of the one who looks. */
export const SLACK_SECONDS = 1.5;

/** ssh(1) as the operator runs it, from outside the machine. */
export class Operator implements AsyncDisposable {
  readonly #lab: Lab;
  readonly #machine: Machine;
  readonly #keys: string;

  private constructor(lab: Lab, machine: Machine) {
    this.#lab = lab;
    this.#machine = machine;
    this.#keys = mkdtempSync(join(tmpdir(), "vmmesh-ssh-"));
  }

  static async make(lab: Lab, machine: Machine): Promise<Operator> {
    const operator = new Operator(lab, machine);
    await sh(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", `${operator.#keys}/id`]);
    machine.putFile("/root/.ssh/authorized_keys", readFileSync(`${operator.#keys}/id.pub`, "utf8"), 0o600);
    machine.putFile(
      "/etc/systemd/system/sshd-operator.service",
      `[Service]\nExecStartPre=/usr/bin/ssh-keygen -A\nRuntimeDirectory=sshd\nExecStart=/usr/sbin/sshd -D -p ${PORT}\n[Install]\nWantedBy=multi-user.target\n`,
    );
    await machine.exec("systemctl daemon-reload && systemctl enable -q --now sshd-operator.service");
    await waitFor("a first login", async () => ((await operator.login()) ? true : undefined));
    return operator;
  }

  argv(...command: string[]): string[] {
    return [
      "ssh",
      ...["-i", `${this.#keys}/id`, "-p", String(PORT), "-o", "StrictHostKeyChecking=no"],
      ...["-o", `UserKnownHostsFile=${this.#keys}/known`, "-o", "BatchMode=yes", "-o", "ConnectTimeout=1"],
      ...["-o", "LogLevel=ERROR", `root@${this.#machine.ip}`, ...command],
    ];
  }

  /** A new login, from the first packet on. */
  async login(): Promise<boolean> {
    const { code } = await this.#lab.exec(this.argv("true"), { allowFail: true, timeoutMs: 3000 });
    return code === 0;
  }

  /** Logs in again and again. @returns the longest time in ms for which nobody got in */
  watch(): { stop(): Promise<number> } {
    let going = true;
    let last = performance.now();
    let longest = 0;
    const looking = (async () => {
      while (going) {
        if (await this.login()) {
          const now = performance.now();
          longest = Math.max(longest, now - last);
          last = now;
        }
        await sleep(50);
      }
    })();
    return {
      stop: async () => {
        going = false;
        await looking;
        return Math.max(longest, performance.now() - last);
      },
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    rmSync(this.#keys, { recursive: true, force: true });
  }
}

/** A session that lives through everything: `still` says whether what is typed into it still comes back. */
export async function liveSession(lab: Lab, operator: Operator, folder: string) {
  await sh(["mkfifo", `${folder}/type`]);
  // ssh(1) closes what it does not know: the shell has to stay and keep the pipe open.
  const session = lab.spawn("live-session", [
    "sh",
    "-c",
    `exec 3<>${folder}/type; "$@" <${folder}/type`,
    "sh",
    ...operator.argv("exec cat"),
  ]);
  let word = 0;
  return {
    async still(): Promise<boolean> {
      word += 1;
      await sh(["sh", "-c", `echo word-${word}- 1<>${folder}/type`]);
      try {
        await waitFor(
          "the echo",
          async () => (session.log().includes(`word-${word}-`) ? true : undefined),
          5000,
          20,
        );
        return true;
      } catch {
        return false;
      }
    },
    stop: () => session.stop(),
  };
}
