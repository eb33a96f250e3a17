import { X509Certificate } from "node:crypto";
import { writeFileSync } from "node:fs";
import { istiodEnvOf } from "../../lab/controlplane.ts";
import { waitFor } from "../../lab/lab.ts";
import { shortCertificates } from "../credentials.ts";
import type { Fault } from "../fault.ts";
import { underLoad } from "../measure.ts";
import { Watch } from "../shown.ts";
import type { Stage, Target } from "../stage.ts";

const SECRET = ["get", "secret", "istio-ca-secret", "-n", "istio-system", "-o", "json"];

export const fault: Fault = {
  name: "root-rotated",
  about: "the mesh goes over to another root, and back; both are trusted meanwhile",
  async run(stage) {
    // Whoever calls has to learn of the new root, too.
    const all: Target[] = [
      ...stage.targets,
      { side: "vmmesh", machine: stage.client, url: stage.vmmesh.url },
    ];
    const before = istiodEnvOf(stage.lab.id);
    const folders = await makeAuthorities(stage);
    await using _short = await shortCertificates(stage, all);
    await using end = new AsyncDisposableStack();
    const watches = all.map((target) => end.use(new Watch(stage, target)));
    /** istiod signs by an authority of its own; resolves when each machine has a certificate of it. */
    const signsBy = async (env: Readonly<Record<string, string>>, issuer: string): Promise<void> => {
      await stage.lab.restartIstiod({ ...before, ...env });
      await shownAnew(watches, issuer);
    };
    end.defer(() => stage.lab.restartIstiod(before));
    return await underLoad(
      stage,
      "root-rotated",
      stage.targets,
      async () => {
        const both = { ROOT_CA_DIR: folders.oldAndBoth };
        await signsBy(both, folders.old);
        await signsBy({ ROOT_CA_DIR: folders.newAndBoth }, NEW);
        await signsBy(both, folders.old);
        return `certificates of "${NEW}" were shown by each of ${all.length} machines, and before and after it such of "${folders.old}"`;
      },
      { wellWithinMs: 120_000 },
    );
  },
};

const NEW = "O=drill.local";

/** Each of `watches` has seen a certificate of this issuer that it had not seen before. */
async function shownAnew(watches: readonly Watch[], issuer: string): Promise<void> {
  const before = watches.map(({ serials }) => serials);
  await waitFor(
    `certificates of ${issuer}`,
    async () =>
      watches.every(({ looks }, index) => {
        const last = looks.at(-1)?.certificate;
        return last?.issuer === issuer && before[index]?.has(last.serialNumber) === false;
      }) || undefined,
    120_000,
  );
}

/** Folders as istiod reads them at ROOT_CA_DIR: who signs, and which roots are given out. */
async function makeAuthorities({
  lab,
}: Stage): Promise<{ readonly old: string; readonly oldAndBoth: string; readonly newAndBoth: string }> {
  const { data } = JSON.parse((await lab.kubectl(SECRET)).stdout) as { data: Record<string, string> };
  const decoded = (name: string): string => Buffer.from(data[name] ?? "", "base64").toString();
  const made = lab.folder("root-new");
  await lab.exec([
    ...["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", `/${NEW}`],
    ...["-addext", "keyUsage=critical,keyCertSign,cRLSign"],
    ...["-keyout", `${made}/ca-key.pem`, "-out", `${made}/ca-cert.pem`],
  ]);
  const { stdout: newCert } = await lab.exec(["cat", `${made}/ca-cert.pem`]);
  const { stdout: newKey } = await lab.exec(["cat", `${made}/ca-key.pem`]);
  const oldCert = decoded("ca-cert.pem");
  const roots = `${oldCert}\n${newCert}`;
  const put = (name: string, cert: string, key: string): string => {
    const folder = lab.folder(name);
    const files = { "ca-cert.pem": cert, "ca-key.pem": key, "cert-chain.pem": cert, "root-cert.pem": roots };
    for (const [file, text] of Object.entries(files))
      writeFileSync(`${folder}/${file}`, text, { mode: 0o600 });
    return folder;
  };
  return {
    old: new X509Certificate(oldCert).subject,
    oldAndBoth: put("root-old-and-both", oldCert, decoded("ca-key.pem")),
    newAndBoth: put("root-new-and-both", newCert, newKey),
  };
}
