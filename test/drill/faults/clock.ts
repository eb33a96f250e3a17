import { writeFileSync } from "node:fs";
import { messageOf } from "../../../agent/core/errors.ts";
import { type Machine, sleep, waitFor } from "../../lab/lab.ts";
import { sh } from "../../lab/sh.ts";
import { putToken, tokenFor } from "../credentials.ts";
import type { Fault, Row } from "../fault.ts";
import { HANDSHAKE_RATE, underLoad } from "../measure.ts";
import { type Span, type Stage, statusOf, type Target } from "../stage.ts";

const SHIM = "/opt/drill-clock.so";
const shiftOf = ({ unit }: Shifted): string => `/opt/drill-clock-${unit}`;
const DAY_SEC = 86_400;
/** The agent looks at the clock every 15 s. */
const TOLD_WITHIN_MS = 30_000;

interface Shifted {
  readonly name: string;
  readonly unit: string;
  /** What the shifted process takes for the time, in ms since the epoch. */
  clock(target: Target): Promise<number>;
}

const OURS: Readonly<Record<"agent" | "envoy", Shifted>> = {
  agent: {
    name: "the agent",
    unit: "vmmesh-agent",
    async clock({ machine }) {
      // It says how long its certificate lives on, by its clock.
      const [{ identity }, { stdout }] = await Promise.all([
        statusOf(machine),
        machine.exec(
          "curl -sf http://127.0.0.1:15020/stats/prometheus | grep ^istio_agent_cert_expiry_seconds",
        ),
      ]);
      return Date.parse(identity?.notAfter ?? "") - Number(stdout.trim().split(" ").at(-1)) * 1000;
    },
  },
  envoy: {
    name: "Envoy",
    unit: "vmmesh-envoy",
    async clock({ machine }) {
      const { stdout } = await machine.exec(
        "curl -si --unix-socket /run/vmmesh-envoy/admin.sock http://envoy/ready",
      );
      return Date.parse(/^date: (.*)$/im.exec(stdout)?.[1] ?? "");
    },
  },
};

export const fault: Fault = {
  name: "clock",
  about: "the clock of a process is a day ahead, a day behind, and right again",
  async run(stage, scale) {
    const target = stage.vmmesh;
    const { machine } = target;
    const source = new URL("../clock.c", import.meta.url).pathname;
    await sh(["cc", "-shared", "-fPIC", "-O2", "-o", `${machine.root}${SHIM}`, source]);
    await putToken(target, tokenFor(stage, target));
    const rows: Row[] = [];
    try {
      for (const shifted of [OURS.agent, OURS.envoy]) {
        await wear(target, shifted);
        await stage.well(target);
        for (const days of [1, -1])
          rows.push(...(await shift(stage, target, shifted, days, scale === "full" ? 60_000 : 10_000)));
      }
    } finally {
      for (const { unit } of Object.values(OURS))
        await machine.exec(`rm -rf /run/systemd/system/${unit}.service.d`);
      await machine.exec("systemctl daemon-reload; systemctl restart vmmesh-agent vmmesh-envoy");
      await stage.well(target);
    }
    return rows;
  },
};

/** Starts the unit anew with the shim, by the right time still. */
async function wear({ machine }: Target, shifted: Shifted): Promise<void> {
  const { unit } = shifted;
  machine.putFile(shiftOf(shifted), shiftBytes(0));
  const environment = `LD_PRELOAD=${SHIM} DRILL_CLOCK=${shiftOf(shifted)}`;
  machine.putFile(
    `/run/systemd/system/${unit}.service.d/drill-clock.conf`,
    `[Service]\nEnvironment=${environment}\n`,
  );
  await machine.exec(`systemctl daemon-reload; systemctl restart ${unit}`);
}

/** In place: the file is part of the memory of those that wear the shim. */
function setShift(machine: Machine, shifted: Shifted, seconds: number): void {
  writeFileSync(`${machine.root}${shiftOf(shifted)}`, shiftBytes(seconds), { flag: "r+" });
}

function shiftBytes(seconds: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigInt64LE(BigInt(seconds));
  return bytes;
}

async function shift(
  stage: Stage,
  target: Target,
  shifted: Shifted,
  days: number,
  ms: number,
): Promise<Row[]> {
  const { machine } = target;
  let off: Span = [0, 0];
  const said = new Set<string>();
  const unmet: string[] = [];
  /** Our agent looks at its own clock: of Envoy's alone it knows nothing. */
  const expectTold = async (isWrong: boolean): Promise<void> => {
    if (shifted !== OURS.agent) return;
    await waitFor(
      `status to ${isWrong ? "tell" : "forget"} the wrong clock`,
      async () => {
        const { conditions } = await statusOf(machine);
        return conditions.some(({ id }) => id === "clock-wrong") === isWrong ? true : undefined;
      },
      TOLD_WITHIN_MS,
    ).catch((thrown: unknown) => unmet.push(messageOf(thrown)));
  };
  const offBy = async (): Promise<number> =>
    Math.round(((await shifted.clock(target)) - Date.now()) / (DAY_SEC * 1000));
  const set = async (to: number): Promise<void> => {
    setShift(machine, shifted, to * DAY_SEC);
    await waitFor(
      `the clock of ${shifted.name}`,
      async () => ((await offBy()) === to ? true : undefined),
      20_000,
    );
  };
  const faulty = async (): Promise<string> => {
    const from = Date.now();
    await set(days);
    // All that it has asked for anew with the wrong time is part of it.
    await stage.lab.restartIstiod();
    await sleep(Math.max(0, from + ms - Date.now()));
    await expectTold(true);
    for (const { message } of (await statusOf(machine)).conditions) said.add(message);
    await set(0);
    await expectTold(false);
    off = [from, Date.now()];
    return `${shifted.name} said itself that it was ${Math.abs(days)} day ${days > 0 ? "ahead" : "behind"}, for ${Math.round((off[1] - from) / 1000)} s, with istiod restarted meanwhile`;
  };
  const name = `clock: ${shifted.name} ${days > 0 ? "+" : "-"}1 day`;
  return underLoad(stage, name, [target], faulty, {
    handshakeRate: HANDSHAKE_RATE,
    allowance: (_target, seen) =>
      shifted === OURS.envoy
        ? {
            allowed: seen.underWayDuring([off]),
            because: "by Envoy's clock no certificate of a peer is valid, so it refuses each new connection",
          }
        : { allowed: 0, because: "" },
    after: async () => ({
      end: said.size === 0 ? "status said nothing" : `status said: ${[...said].join("; ")}`,
      ...(unmet.length === 0 ? {} : { unmet: unmet.join("; ") }),
    }),
  });
}
