import { copyFileSync } from "node:fs";
import { calicoKeeper } from "../../lab/build.ts";
import { type Machine, say, sleep, waitFor } from "../../lab/lab.ts";
import type { Scale } from "../../suite.ts";
import { type ProofRow, row } from "../proof.ts";
import { between, lost, type Said } from "./observer.ts";
import { KUBE_READY } from "./writers.ts";

/**
 * How often Felix looks whether its jumps are first (iptablesRefreshInterval). Its default is 180 s, and 5 s after a write of its
 * own, then 10, 20 …: at 10 s it keeps its place better than on any machine where nobody has set it.
 */
const REFRESH_SECONDS = 10;
/** Felix's default (iptablesPostWriteCheckInterval). */
const AFTER_WRITE_SECONDS = 5;
/** An address for a workload of Calico's: a DNAT in its chain. */
const FLOATING = ["203.0.113.7", "10.65.0.2"] as const;
const SOMEBODY = "OUTPUT 1 -p tcp -j ACCEPT";
const NAME = "order";

/** One look at the rules that stand in a hook, the first first. */
interface Look {
  readonly at: number;
  readonly hooks: ReadonlyMap<string, readonly { readonly target: string; readonly handle: string }[]>;
}

function looks(said: readonly Said[]): Look[] {
  return said.map(({ at, what }) => ({
    at,
    hooks: new Map(
      what.split(";").map((hook) => {
        const [name = "", rules = ""] = hook.split("=");
        return [
          name,
          rules.split(",").flatMap((rule) => {
            const [target = "", handle = ""] = rule.split("#");
            return handle === "" ? [] : [{ target, handle }];
          }),
        ] as const;
      }),
    ),
  }));
}

const targets = (look: Look | undefined): string[] =>
  (look?.hooks.get("nat/OUTPUT") ?? []).map(({ target }) => target);
/** Nothing that ends the hook stands ahead of our jump. */
const oursDecides = (look: Look | undefined): boolean => {
  const all = targets(look);
  const at = all.indexOf("ISTIO_OUTPUT");
  return at >= 0 && !all.slice(0, at).includes("accept");
};
const theirsFirst = (look: Look | undefined): boolean => targets(look)[0] === "cali-OUTPUT";

/**
 * How often a jump to a chain of these was put in anew, in any hook: each time it has a new handle. What is written within a
 * second is one time: a look meets the hooks one after the other.
 */
function rewrites(all: readonly Look[], chains: RegExp): number {
  const times: number[] = [];
  let known: ReadonlySet<string> = new Set();
  for (const [index, { at, hooks }] of all.entries()) {
    const now = new Set(
      [...hooks].flatMap(([hook, rules]) =>
        rules.flatMap(({ target, handle }) => (chains.test(target) ? [`${hook} ${handle}`] : [])),
      ),
    );
    const anew = index > 0 && [...now].some((jump) => !known.has(jump));
    if (anew && at - (times.at(-1) ?? 0) > 1000) times.push(at);
    known = now;
  }
  return times.length;
}

/** The looks from a time on, with the one before them. */
const since = (places: readonly Said[], from: number): Look[] =>
  looks([...places.filter(({ at }) => at < from).slice(-1), ...places.filter(({ at }) => at >= from)]);

/** Where everybody stands for three seconds. */
async function settled(places: readonly Said[]): Promise<void> {
  await waitFor(
    "ours and Calico's jumps to stand",
    async () => {
      const [last] = looks(places.slice(-1));
      return last !== undefined && Date.now() - last.at > 3000 && oursDecides(last) && theirsFirst(last)
        ? true
        : undefined;
    },
    60_000,
  );
}

/** Until it is first for the first time: whether it stays so is what is to be seen. */
async function startCalico(machine: Machine, places: readonly Said[], ...address: string[]): Promise<void> {
  const from = Date.now();
  await machine.exec([
    "systemd-run",
    "-q",
    "--unit=calico",
    "/root/calico",
    `${REFRESH_SECONDS}s`,
    ...address,
  ]);
  await waitFor("Calico's jump to be first", async () =>
    since(places, from).some(theirsFirst) ? true : undefined,
  );
}

/** How often each puts its jumps in anew while nobody else writes. */
async function duel(places: readonly Said[], seconds: number): Promise<{ ours: number; theirs: number }> {
  const from = Date.now();
  await sleep(seconds * 1000);
  const seen = since(places, from);
  return { ours: rewrites(seen, /^ISTIO_/), theirs: rewrites(seen, /^cali-/) };
}

/** Milliseconds from somebody's rule ahead of both until each is back in its place. */
async function displaced(
  machine: Machine,
  places: readonly Said[],
): Promise<{ ours: number; theirs: number }> {
  const from = Date.now();
  await machine.exec(`iptables-nft -t nat -I ${SOMEBODY}`);
  const back = await waitFor(
    "ours and Calico's jumps to be back",
    async () => {
      const seen = since(places, from).slice(1);
      const away = seen.find((look) => targets(look)[0] === "accept");
      const ours = seen.find((look) => away !== undefined && look.at > away.at && oursDecides(look));
      const theirs = seen.find((look) => away !== undefined && look.at > away.at && theirsFirst(look));
      return away === undefined || ours === undefined || theirs === undefined
        ? undefined
        : { ours: ours.at - away.at, theirs: theirs.at - away.at };
    },
    60_000,
  );
  await machine.exec(`iptables-nft -t nat -D ${SOMEBODY.replace("OUTPUT 1", "OUTPUT")}`);
  return back;
}

const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;

/** Calico's Felix in insert mode, which wants its jumps first and looks now and then whether they are. */
export async function besideCalico(
  machine: Machine,
  scale: Scale,
  places: readonly Said[],
  calls: readonly Said[],
): Promise<ProofRow[]> {
  const full = scale === "full";
  copyFileSync(await calicoKeeper(), `${machine.root}/root/calico`);
  await machine.exec(`systemctl restart kube-proxy; ${KUBE_READY}`);
  const began = Date.now();
  await startCalico(machine, places);
  await settled(places);
  const seconds = full ? 60 : 12;
  const quiet = await duel(places, seconds);
  const ours: number[] = [];
  const theirs: number[] = [];
  for (let round = 0; round < (full ? 10 : 1); round += 1) {
    // Wherever Felix stands between two looks.
    if (full) await sleep(Math.random() * REFRESH_SECONDS * 1000);
    const back = await displaced(machine, places);
    ours.push(back.ours);
    theirs.push(back.theirs);
    say(`ahead of ours and Calico's: ours back in ${back.ours} ms, Calico's in ${back.theirs} ms`);
  }
  await machine.exec("systemctl stop calico");
  const rows = [
    row(
      NAME,
      `beside Calico's Felix in insert mode, ${seconds} s: our jumps put in anew`,
      quiet.ours,
      "times",
      "= 0",
    ),
    row(NAME, "the same: Calico's put in anew, a duel if both are", quiet.theirs, "times", "= 0"),
    row(
      NAME,
      `a rule put ahead of both: until it is behind ours, median of ${ours.length}`,
      median(ours),
      "ms",
      full ? "< 100" : "< 1000",
    ),
    row(
      NAME,
      `the same, until Calico's jump is first again (it looks every ${REFRESH_SECONDS} s here, every 180 s by default)`,
      median(theirs),
      "ms",
      "",
      "peer",
    ),
  ];
  if (full) {
    await startCalico(machine, places, ...FLOATING);
    const both = await duel(places, seconds);
    await machine.exec("systemctl stop calico");
    rows.push(
      row(
        NAME,
        `Calico with a floating address, which diverts, ${seconds} s: our jumps put in anew, at most once for each look of Felix's after a write`,
        both.ours,
        "times",
        `<= ${seconds / AFTER_WRITE_SECONDS + 1}`,
      ),
      row(NAME, "the same: Calico's put in anew", both.theirs, "times", "", "peer"),
    );
  }
  const seen = between(calls, began, Date.now());
  return [
    ...rows,
    row(
      NAME,
      `requests past Envoy beside Calico, of ${seen.length}`,
      seen.filter(({ what }) => what === "past").length,
      "requests",
      "= 0",
    ),
    row(NAME, "the same: requests lost", seen.filter(lost).length, "requests", full ? "= 0" : "<= 5"),
  ];
}
