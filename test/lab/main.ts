import { build } from "./build.ts";
import { Lab } from "./lab.ts";
import { say } from "./sh.ts";

const USAGE = `scripts/lab build                       fetch and build what is missing (20 minutes once, cached)
scripts/lab up [--istiod-defaults]      etcd, kube-apiserver, istiod, DNS
scripts/lab vm NAME [--deb F] [--envoy V] [--release R]   boot a systemd machine
scripts/lab exec NAME -- CMD…           run in a machine
scripts/lab kubectl -- … | istioctl -- …
scripts/lab prometheus --target IP:15020 [--target …]   scrapes until the lab is down
scripts/lab status | rm NAME | down
--id ID (or VMMESH_LAB_ID): another lab beside the default one`;

/** As if typed there: its own terminal, as long as it takes. */
const DIRECT = { direct: true, timeoutMs: 0, allowFail: true } as const;

async function main(argv: readonly string[]): Promise<number> {
  const at = argv.indexOf("--");
  const words = at < 0 ? [...argv] : argv.slice(0, at);
  const rest = at < 0 ? [] : argv.slice(at + 1);
  const take = (name: string): string | undefined => {
    const index = words.indexOf(name);
    return index < 0 ? undefined : words.splice(index, 2)[1];
  };
  const id = take("--id") ?? process.env["VMMESH_LAB_ID"] ?? "default";
  if (!/^[a-z0-9]{1,16}$/.test(id)) throw new Error(`--id: ${id} is not 1 to 16 letters and digits`);
  const deb = take("--deb");
  const envoy = take("--envoy");
  const release = take("--release");
  const targets: string[] = [];
  for (let target = take("--target"); target !== undefined; target = take("--target")) targets.push(target);
  const istiodDefaults = words.includes("--istiod-defaults") ? true : undefined;
  const [command, name] = words.filter((word) => !word.startsWith("--"));
  const named = (): string => {
    if (name !== undefined && /^[a-z0-9-]{1,20}$/.test(name)) return name;
    throw new Error(`give the machine's name: letters, digits and dashes\n${USAGE}`);
  };
  switch (command) {
    case "build":
      await build();
      say("everything is built");
      return 0;
    case "up":
      await Lab.open({ id, ...(istiodDefaults === undefined ? {} : { istiodDefaults }) });
      say("the lab is up");
      return 0;
    case "vm": {
      const machine = await (await Lab.open({ id })).vm(named(), {
        ...(deb === undefined ? {} : { deb }),
        ...(envoy === undefined ? {} : { envoy }),
        ...(release === undefined ? {} : { release }),
      });
      process.stdout.write(`${machine.ip}\n`);
      return 0;
    }
    case "exec":
      return (await Lab.attach(id).machine(named()).exec(rest, DIRECT)).code;
    case "kubectl":
      return (await Lab.attach(id).kubectl(rest, DIRECT)).code;
    case "istioctl":
      return (await Lab.attach(id).istioctl(rest, DIRECT)).code;
    case "prometheus": {
      const lab = await Lab.open({ id });
      if (targets.length === 0) throw new Error(`give at least one --target HOST:PORT\n${USAGE}`);
      await lab.prometheus(targets);
      process.stdout.write(
        `ip netns exec ${lab.netns} curl -s 'http://127.0.0.1:9099/api/v1/query?query=up'\n`,
      );
      return 0;
    }
    case "rm":
      await Lab.attach(id).removeVm(named());
      return 0;
    case "status":
      process.stdout.write(`${await Lab.attach(id).status()}\n`);
      return 0;
    case "down":
      await Lab.attach(id).down();
      say("the lab is down");
      return 0;
    default:
      process.stderr.write(`${USAGE}\n`);
      return 2;
  }
}

process.exitCode = await main(process.argv.slice(2)).catch((thrown: unknown) => {
  process.stderr.write(`lab: ${thrown instanceof Error ? thrown.message : String(thrown)}\n`);
  return 1;
});
