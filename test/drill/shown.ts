import { X509Certificate } from "node:crypto";
import { sleep } from "../lab/lab.ts";
import { PORT, type Span, type Stage, type Target } from "./stage.ts";

/** What somebody who connects to the machine is shown. */
export interface Look {
  /** When, in ms since the epoch. */
  readonly at: number;
  /** Undefined: nobody answered, or without a certificate. */
  readonly certificate: X509Certificate | undefined;
}

const LOOK_MS = 500;
const CERTIFICATE = /-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----/s;

async function shownBy(stage: Stage, { machine }: Target): Promise<Look> {
  const at = Date.now();
  const { stdout } = await stage.lab.exec(
    ["timeout", "2", "openssl", "s_client", "-connect", `${machine.ip}:${PORT}`],
    { allowFail: true, input: "" },
  );
  const [pem] = CERTIFICATE.exec(stdout) ?? [];
  return { at, certificate: pem === undefined ? undefined : new X509Certificate(pem) };
}

const isGood = ({ at, certificate }: Look): boolean =>
  certificate !== undefined && certificate.validToDate.getTime() > at;

/** Connects to a machine twice a second, from outside the mesh, and keeps what it is shown. */
export class Watch implements AsyncDisposable {
  readonly looks: Look[] = [];
  #isOver = false;
  readonly #done: Promise<void>;

  constructor(stage: Stage, target: Target) {
    this.#done = this.#look(stage, target);
  }

  async #look(stage: Stage, target: Target): Promise<void> {
    while (!this.#isOver) {
      this.looks.push(await shownBy(stage, target));
      await sleep(LOOK_MS);
    }
  }

  get serials(): ReadonlySet<string> {
    return new Set(this.looks.flatMap(({ certificate }) => certificate?.serialNumber ?? []));
  }

  /** How often a certificate was shown that had ended. */
  get expired(): number {
    return this.looks.filter((look) => look.certificate !== undefined && !isGood(look)).length;
  }

  /** The times at which no valid certificate was shown, each from the last one that was to the first one again. */
  get without(): readonly Span[] {
    const spans: Span[] = [];
    let goodAt = this.looks[0]?.at ?? 0;
    let isWithout = false;
    for (const look of this.looks) {
      if (isGood(look)) {
        if (isWithout) spans.push([goodAt, look.at]);
        goodAt = look.at;
      }
      isWithout = !isGood(look);
    }
    return isWithout ? [...spans, [goodAt, Date.now()]] : spans;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#isOver = true;
    await this.#done;
  }
}
