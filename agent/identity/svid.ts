import { createPrivateKey, X509Certificate } from "node:crypto";
import { VmmeshError } from "../core/errors.ts";
import type { Files, Owner } from "../platform/host.ts";

/** A key, its certificate chain, and the roots that came with it: always made, stored and swapped as one. */
export interface Svid {
  /** PKCS#8 PEM. */
  readonly key: string;
  /** Leaf and intermediates, PEM. */
  readonly chain: string;
  /** Trust bundle of the mesh, PEM; several roots during a rotation. */
  readonly roots: string;
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** Hexadecimal. */
  readonly serial: string;
  /** The URI SAN. */
  readonly spiffe: string;
}

const BEGIN = "-----BEGIN CERTIFICATE-----";
const END = "-----END CERTIFICATE-----";

/** The certificates in a text, each from its first line to its last. Not by a regular expression: a thousand beginnings without an end would each be followed to the end of the text. */
export function splitPem(text: string): string[] {
  const found: string[] = [];
  for (let from = text.indexOf(BEGIN); from >= 0; ) {
    const end = text.indexOf(END, from + BEGIN.length);
    if (end < 0) break;
    found.push(text.slice(from, end + END.length));
    from = text.indexOf(BEGIN, end + END.length);
  }
  return found;
}

/**
 * Checks what a CA answered before anything is replaced by it: the leaf holds our key, leads to the returned roots over
 * the returned intermediates, and names the workload that we are.
 *
 * @param answer leaf, intermediates…, root bundle (istio.v1.auth.IstioCertificateResponse.cert_chain)
 * @throws {VmmeshError} CERT_NOT_VALID naming what is wrong
 */
export function svidFrom(key: string, answer: readonly string[], expectedSpiffe: string): Svid {
  const fail = (what: string, cause?: unknown): VmmeshError =>
    new VmmeshError("CERT_NOT_VALID", `the CA's answer cannot be used: ${what}`, {
      cause,
      next: "Look at istiod's log for this request; a CA behind istiod may be configured for another trust domain.",
    });
  if (answer.length < 2) throw fail(`it has ${answer.length} parts, a leaf and the roots are needed`);
  const roots = answer.at(-1) ?? "";
  const chain = answer.slice(0, -1).flatMap(splitPem);
  let certificates: X509Certificate[];
  let anchors: X509Certificate[];
  try {
    certificates = chain.map((pem) => new X509Certificate(pem));
    anchors = splitPem(roots).map((pem) => new X509Certificate(pem));
  } catch (cause) {
    throw fail("a certificate in it is malformed", cause);
  }
  const [leaf] = certificates;
  if (leaf === undefined) throw fail("it holds no certificate");
  if (!leaf.checkPrivateKey(createPrivateKey(key))) throw fail("the certificate is of another key than ours");
  if (!leadsToRoot(certificates, anchors))
    throw fail("the certificate does not lead to the roots that came with it");
  const spiffe = spiffeOf(leaf);
  if (spiffe === undefined) throw fail("the certificate names no SPIFFE id");
  if (spiffe !== expectedSpiffe) {
    throw new VmmeshError(
      "IDENTITY_REFUSED",
      `the CA made us ${spiffe}, but this machine is to be ${expectedSpiffe}`,
      {
        next: "The token is of another service account, namespace or trust domain than the rest of the bundle: make the bundle anew.",
      },
    );
  }
  return {
    key,
    chain: `${chain.join("\n")}\n`,
    roots: `${splitPem(roots).join("\n")}\n`,
    notBefore: leaf.validFromDate,
    notAfter: leaf.validToDate,
    serial: leaf.serialNumber.toLowerCase(),
    spiffe,
  };
}

function leadsToRoot(chain: readonly X509Certificate[], roots: readonly X509Certificate[]): boolean {
  let at = chain[0];
  for (let depth = 0; at !== undefined && depth < 10; depth += 1) {
    const here = at;
    const issuedBy = (issuer: X509Certificate): boolean =>
      here.checkIssued(issuer) && here.verify(issuer.publicKey);
    if (roots.some((root) => issuedBy(root) || root.fingerprint256 === here.fingerprint256)) return true;
    at = chain.find((candidate) => candidate !== here && issuedBy(candidate));
  }
  return false;
}

/** Does the chain lead to one of these roots? An old certificate of a rebuilt mesh does not, and must not be presented. */
export function isOfRoots(svid: Svid, roots: string): boolean {
  try {
    return leadsToRoot(
      splitPem(svid.chain).map((pem) => new X509Certificate(pem)),
      splitPem(roots).map((pem) => new X509Certificate(pem)),
    );
  } catch {
    return false;
  }
}

function spiffeOf(certificate: X509Certificate): string | undefined {
  return /(?:^|, )URI:(spiffe:\/\/[^,\s]+)/.exec(certificate.subjectAltName ?? "")?.[1];
}

/**
 * Writes a folder per serial, then points `current` at it: nobody ever reads a key with another certificate.
 * Folders of older serials are removed.
 */
export async function storeSvid(files: Files, folder: string, svid: Svid, owner?: Owner): Promise<void> {
  const ownership = owner === undefined ? {} : { owner };
  await files.makeDir(folder, { mode: 0o700, ...ownership });
  const own = `${folder}/${svid.serial}`;
  await files.makeDir(own, { mode: 0o700, ...ownership });
  for (const [name, text] of [
    ["key.pem", svid.key],
    ["chain.pem", svid.chain],
    ["roots.pem", svid.roots],
  ] as const) {
    await files.writeAtomic(`${own}/${name}`, text, { mode: 0o600, ...ownership });
  }
  await files.swapLink(`${folder}/current`, svid.serial);
  for (const name of (await files.list(folder)) ?? []) {
    if (name !== "current" && name !== svid.serial) await files.remove(`${folder}/${name}`);
  }
}

/** What `current` points at; undefined if there is nothing, or nothing that can be read: a new certificate heals that. */
export async function loadSvid(
  files: Pick<Files, "readText" | "readLink">,
  folder: string,
): Promise<Svid | undefined> {
  const serial = await files.readLink(`${folder}/current`);
  if (serial === undefined) return undefined;
  const [key, chain, roots] = await Promise.all(
    ["key.pem", "chain.pem", "roots.pem"].map((name) => files.readText(`${folder}/${serial}/${name}`)),
  );
  if (key === undefined || chain === undefined || roots === undefined) return undefined;
  try {
    const leaf = new X509Certificate(chain);
    const spiffe = spiffeOf(leaf);
    // Both may have been put there by hand, and Envoy refuses a pair that does not fit.
    if (spiffe === undefined || !leaf.checkPrivateKey(createPrivateKey(key))) return undefined;
    return { key, chain, roots, notBefore: leaf.validFromDate, notAfter: leaf.validToDate, serial, spiffe };
  } catch {
    return undefined;
  }
}
