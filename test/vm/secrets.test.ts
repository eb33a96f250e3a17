import { randomBytes } from "node:crypto";
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { Authority } from "../controlplane/authority.ts";
import { cleanNamespace, defineWorkload, istioctlBundle, requireRoot, startApp } from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/**
 * Secrets go in by every way that there is, and what comes out is searched for them: everything that the commands print,
 * also where they fail because of the secret itself, the journal, what Envoy and the agent show of themselves, command
 * line and environment of every process, and the files.
 */
let lab: Lab;
let machine: Machine;

interface Secret {
  readonly what: string;
  /** A piece of it that is nowhere else: long enough for chance, and without line breaks. */
  readonly piece: string;
  /** The files that are there to hold it, while the machine has joined. */
  readonly in: readonly string[];
}
const secrets: Secret[] = [];
/** What was said, by whom. */
const heard: { who: string; text: string }[] = [];

/** The proof that the processes were looked at. */
const control = { argument: canary(), variable: canary() };

function canary(): string {
  return `canary${randomBytes(18).toString("hex")}`;
}

/** Of a token what nobody else has: its signature. */
const signature = (token: string): string => token.trim().split(".")[2] ?? "";
/** Of a private key in PEM a line from its middle, which no other key has. */
const keyLine = (pem: string): string => pem.trim().split("\n")[2] ?? "";

/** @param fails the error's code; default: it succeeds */
async function hear(who: string, command: string, fails?: string): Promise<void> {
  const { code, stdout, stderr } = await machine.exec(command, { allowFail: true });
  const said = /^vmmesh: ([A-Z_]+):/m.exec(stderr)?.[1];
  expect([who, code === 0, said, code === 0 ? "" : stderr]).toEqual([
    who,
    fails === undefined,
    fails,
    code === 0 ? "" : stderr,
  ]);
  heard.push({ who, text: `${stdout}\n${stderr}` });
}

/** Every command line and environment that was ever there, until /run/watched.stop. */
const WATCH = `
import glob, os, time
seen = set()
while not os.path.exists("/run/watched.stop"):
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as it: seen.add(it.read())
        except OSError: pass
    time.sleep(0.005)
with open("/run/watched", "wb") as out: out.write(b"\\n".join(seen))
`;

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await lab.removeVm("details");
  machine = await lab.vm("details", { deb: packageFile() });
  await defineWorkload(lab, "details", 9080);
  await startApp(machine, 9080);
  cpSync(await istioctlBundle(lab, "details"), `${machine.root}/root/bundle`, { recursive: true });
  machine.putFile("/opt/watch.py", WATCH);
  await machine.exec("systemd-run -q --unit=watch python3 /opt/watch.py");
  await machine.exec(
    `systemd-run -q -E SECRET=${control.variable} sleep 1000 && systemd-run -q python3 -c 'import time; time.sleep(1000)' ${control.argument}`,
  );
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await lab?.removeVm("details");
});

/** A copy of the good bundle with one file of it replaced. */
function bundleWith(name: string, content: string): string {
  const folder = `/root/b-${name}`;
  cpSync(`${machine.root}/root/bundle`, `${machine.root}${folder}`, { recursive: true });
  writeFileSync(`${machine.root}${folder}/${name}`, content);
  return folder;
}

test("a join that fails because of a secret names what is wrong with it, not the secret", async () => {
  const word = canary();
  const anew = (what: string, piece: string): void => void secrets.push({ what, piece, in: [] });
  anew("the word in what cannot be read", word);

  await hear(
    "a token that is none",
    `vmmesh join --bundle ${bundleWith("istio-token", word)}`,
    "BUNDLE_MALFORMED",
  );
  const expired = lab.signToken({ namespace: "default", serviceAccount: "details", expiresInSec: -3600 });
  anew("the expired token", signature(expired));
  await hear(
    "an expired token",
    `vmmesh join --bundle ${bundleWith("istio-token", expired)}`,
    "TOKEN_EXPIRED",
  );
  const other = lab.signToken({
    namespace: "default",
    serviceAccount: "details",
    audience: "elsewhere",
    expiresInSec: 3600,
  });
  anew("the token for somebody else", signature(other));
  await hear(
    "a token for another audience",
    `vmmesh join --bundle ${bundleWith("istio-token", other)}`,
    "TOKEN_AUDIENCE",
  );

  const { key } = await (await Authority.create("example")).server(["details.example"], []);
  anew("the key in the place of a certificate", keyLine(key));
  await hear(
    "a private key as root",
    `vmmesh join --bundle ${bundleWith("root-cert.pem", key)}`,
    "BUNDLE_MALFORMED",
  );
  machine.putFile("/opt/pair/tls.crt", key);
  machine.putFile("/opt/pair/tls.key", `${key}${word}`);
  await hear("a pair that is none", "vmmesh join --bundle /root/bundle --metrics-tls /opt/pair", "USAGE");

  const config = lab
    .kubeconfigText("joiner")
    .replace(/"(token|client-key-data)": "[^"]*"/, `"token": "${word}"`);
  expect(config).toContain(word);
  machine.putFile("/root/refused", config, 0o600);
  await hear(
    "a kubeconfig that the API server refuses",
    "vmmesh join --namespace default --kubeconfig /root/refused",
    "KUBE_FORBIDDEN",
  );
  machine.putFile("/root/broken", `users: [{name: a, user: {token: "${word}}]\n`, 0o600);
  await hear(
    "a kubeconfig that is no YAML",
    "vmmesh join --namespace default --kubeconfig /root/broken",
    "KUBECONFIG_MALFORMED",
  );

  machine.putFile("/usr/local/lib/print-token", `#!/bin/sh\necho 'not a token: ${word}'\n`, 0o755);
  const empty = bundleWith("mesh.yaml", readFileSync(`${machine.root}/root/bundle/mesh.yaml`, "utf8"));
  await hear(
    "a program that prints no token",
    `rm ${empty}/istio-token; vmmesh join --bundle ${empty} --credential-exec /usr/local/lib/print-token`,
    "TOKEN_UNREADABLE",
  );
  await machine.exec("rm -r /root/b-* /root/refused /root/broken /opt/pair /usr/local/lib/print-token");
}, 120_000);

test("a join, with all that it and the machine show, and a leave", async () => {
  const token = readFileSync(`${machine.root}/root/bundle/istio-token`, "utf8");
  secrets.push({
    what: "the bundle's token",
    piece: signature(token),
    in: ["/root/bundle/istio-token", "/var/lib/vmmesh/token"],
  });
  const { key, cert } = await (await Authority.create("example")).server(["details.example"], []);
  secrets.push({ what: "the key of the metrics port", piece: keyLine(key), in: ["/etc/ssl/vmmesh/tls.key"] });
  machine.putFile("/etc/ssl/vmmesh/tls.crt", cert);
  machine.putFile("/etc/ssl/vmmesh/tls.key", key);

  const join = "vmmesh join --bundle /root/bundle --metrics-tls /etc/ssl/vmmesh --log-level debug";
  await hear("a rehearsal", `${join} --dry-run --output json`);
  machine.putFile(
    "/etc/systemd/system/vmmesh-agent.service.d/debug.conf",
    "[Service]\nEnvironment=VMMESH_LOG_LEVEL=debug\n",
  );
  await hear("the join", `systemctl daemon-reload; ${join}`);
  await waitFor("last-good", async () =>
    (await machine.exec("test -s /var/lib/vmmesh/last-good", { allowFail: true })).code === 0
      ? true
      : undefined,
  );

  await hear("status", "vmmesh status; vmmesh status --output json");
  await hear("audit", "vmmesh iptables audit; vmmesh iptables audit --output json; true");
  const envoy = "curl -sf --unix-socket /run/vmmesh-envoy/admin.sock http://localhost";
  await hear(
    "Envoy's dump",
    `${envoy}/config_dump?include_eds; ${envoy}/certs; cat /run/vmmesh/bootstrap.json`,
  );
  expect(heard.at(-1)?.text).toContain("SecretsConfigDump");
  await hear("the metrics", "curl -skf https://localhost:15020/stats/prometheus");
  await expectInTheirFilesOnly();
  expect(secrets.map(({ what }) => what)).toContain(KEY);

  // The agent's own complaint about a token, which was put where the good one was.
  const bad = lab.signToken({ namespace: "default", serviceAccount: "details", expiresInSec: -3600 });
  secrets.push({ what: "the token that was put there", piece: signature(bad), in: [] });
  machine.putFile("/var/lib/vmmesh/token", bad, 0o600);
  await machine.exec("rm -r /var/lib/vmmesh/identity; systemctl restart --no-block vmmesh-agent");
  await waitFor("the agent to complain", async () =>
    (await machine.exec("vmmesh status", { allowFail: true })).stdout.includes(
      "there is no valid certificate",
    )
      ? true
      : undefined,
  );
  await hear("status without an identity", "vmmesh status; vmmesh status --output json; true");
  await hear("leave", "vmmesh leave");
  await hear("the journal", "journalctl --no-pager -o export");
  expect(heard.at(-1)?.text).toContain("vmmesh-agent.service");
  for (const secret of secrets)
    Object.assign(secret, { in: secret.in.filter((path) => !path.startsWith("/var/")) });
  await expectInTheirFilesOnly();
}, 120_000);

const KEY = "the workload's key";

/**
 * A certificate that came by a token is renewed within a minute, to see that it can be: from then on another key is the
 * workload's, and the former one is to be nowhere.
 * @returns the file of the present one; "" if there is none
 */
async function noteWorkloadKey(): Promise<string> {
  const at = "/var/lib/vmmesh/identity/current/key.pem";
  const own = await machine.exec(`cat ${at} && readlink -f ${at}`, { allowFail: true });
  if (own.code !== 0) return "";
  const [piece, path] = [keyLine(own.stdout), own.stdout.trim().split("\n").at(-1) ?? ""];
  if (secrets.some((secret) => secret.piece === piece)) return path;
  for (const former of secrets.filter(({ what }) => what === KEY)) Object.assign(former, { in: [] });
  secrets.push({ what: KEY, piece, in: [path] });
  return path;
}

/** By `grep`, in every folder that a program of ours, systemd or Envoy might write to. */
async function expectInTheirFilesOnly(): Promise<void> {
  const seen: [what: string, found: string[]][] = [];
  // Once more if a key was renewed in the middle of it.
  for (
    let key = await noteWorkloadKey(), before = "?";
    key !== before;
    before = key, key = await noteWorkloadKey()
  ) {
    seen.length = 0;
    for (const { what, piece } of secrets) {
      const { stdout } = await machine.exec(
        "grep -rlaF -D skip -f - /etc /var /run /tmp /root /home /opt /dev/shm /usr/local /usr/lib/vmmesh",
        { allowFail: true, input: `${piece}\n` },
      );
      seen.push([what, stdout.trim().split("\n").filter(Boolean).sort()]);
    }
  }
  expect(seen).toEqual(secrets.map(({ what, in: files }) => [what, [...files].sort()]));
}

test("nobody has said a secret", () => {
  for (const { what, piece } of secrets) {
    expect(piece.length).toBeGreaterThan(30);
    expect([what, heard.filter(({ text }) => text.includes(piece)).map(({ who }) => who)]).toEqual([
      what,
      [],
    ]);
  }
});

test("no process had one in its arguments or its environment", async () => {
  await machine.exec("touch /run/watched.stop; while systemctl -q is-active watch; do sleep 0.1; done");
  const watched = machine.getFile("/run/watched");
  for (const piece of Object.values(control)) expect(watched).toContain(piece);
  expect(watched).toMatch(/agentd\.mjs/);
  expect(watched).toMatch(/join\0--bundle/);
  expect(secrets.filter(({ piece }) => watched.includes(piece)).map(({ what }) => what)).toEqual([]);
});
