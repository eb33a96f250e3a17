import "reflect-metadata";
import { createPrivateKey, X509Certificate } from "node:crypto";
import * as x509 from "@peculiar/x509";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Authority } from "../../test/controlplane/authority.ts";
import { type ControlPlane, startControlPlane } from "../../test/controlplane/server.ts";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { Latest } from "../core/signals.ts";
import { DAY_MS, HOUR_MS, MINUTE_MS } from "../core/time.ts";
import { Conditions } from "../health/conditions.ts";
import type { Clock } from "../platform/host.ts";
import { chooseCredential } from "./credentials.ts";
import { makeCsr, makeKey } from "./csr.ts";
import { type CaTarget, enroll } from "./enroll.ts";
import { type IdentityStatus, type KeepDeps, keepIdentity } from "./keep.ts";
import { renewIn } from "./renew.ts";
import { loadSvid, type Svid, splitPem, storeSvid, svidFrom } from "./svid.ts";
import { checkToken, readToken, tokenExpired } from "./token.ts";

const SPIFFE = "spiffe://cluster.local/ns/default/sa/details";
const NEVER = new AbortController().signal;
const FOLDER = "/var/lib/vmmesh/identity";

function jwt(claims: Readonly<Record<string, unknown>>): string {
  const part = (it: unknown): string => Buffer.from(JSON.stringify(it)).toString("base64url");
  return `${part({ alg: "RS256" })}.${part(claims)}.c2lnbmF0dXJl`;
}

async function signed(authority: Authority, spiffe = SPIFFE): Promise<{ key: string; answer: string[] }> {
  const key = makeKey("ecdsa-p256");
  return { key, answer: [await authority.signRequest(makeCsr(key, spiffe), spiffe, 0), authority.rootPem] };
}

/** The names in a request: critical or not, and as JSON. */
function namesIn(request: x509.Pkcs10CertificateRequest): { critical: boolean; names: unknown } {
  const extension = request.extensions.find(({ type }) => type === "2.5.29.17");
  if (extension === undefined) throw new Error("the request has no subjectAltName");
  const names = new x509.SubjectAlternativeNameExtension(extension.rawData).names.toJSON();
  return { critical: extension.critical, names };
}

describe("a certificate request", () => {
  test.for([
    ["ecdsa-p256", "ec"],
    ["rsa-2048", "rsa"],
  ] as const)("of a key of kind %s is read back by another implementation", async ([kind, type]) => {
    const key = makeKey(kind);
    expect(createPrivateKey(key).asymmetricKeyType).toBe(type);
    const request = new x509.Pkcs10CertificateRequest(makeCsr(key, SPIFFE));
    expect(await request.verify()).toBe(true);
    expect(namesIn(request)).toEqual({ critical: true, names: [{ type: "url", value: SPIFFE }] });
  });

  test("holds a SPIFFE id of any length", async () => {
    for (const length of [1, 127, 128, 255, 256, 2000]) {
      const spiffe = `spiffe://cluster.local/ns/default/sa/${"a".repeat(length)}`;
      const request = new x509.Pkcs10CertificateRequest(makeCsr(makeKey("ecdsa-p256"), spiffe));
      expect(namesIn(request).names).toEqual([{ type: "url", value: spiffe }]);
    }
  });
});

describe("what the CA answers", () => {
  let authority: Authority;
  beforeAll(async () => {
    authority = await Authority.create("cluster.local");
  });

  test("becomes key, chain and roots as one", async () => {
    const { key, answer } = await signed(authority);
    const svid = svidFrom(key, answer, SPIFFE);
    expect(svid.spiffe).toBe(SPIFFE);
    expect(splitPem(svid.chain)).toHaveLength(1);
    expect(splitPem(svid.roots)).toHaveLength(1);
    expect(svid.serial).toBe(new X509Certificate(svid.chain).serialNumber.toLowerCase());
  });

  test("is refused if it is of another key: Envoy would be given a pair that does not fit", async () => {
    const { answer } = await signed(authority);
    expect(() => svidFrom(makeKey("ecdsa-p256"), answer, SPIFFE)).toThrow(
      expect.objectContaining({ code: "CERT_NOT_VALID" }),
    );
  });

  test("is refused if it names somebody else", async () => {
    const { key, answer } = await signed(authority, "spiffe://cluster.local/ns/default/sa/reviews");
    expect(() => svidFrom(key, answer, SPIFFE)).toThrow(
      expect.objectContaining({ code: "IDENTITY_REFUSED" }),
    );
  });

  test("is refused if it does not lead to the roots that came with it", async () => {
    const { key, answer } = await signed(authority);
    const other = await Authority.create("cluster.local");
    expect(() => svidFrom(key, [answer[0] ?? "", other.rootPem], SPIFFE)).toThrow(
      expect.objectContaining({ code: "CERT_NOT_VALID" }),
    );
  });

  test.for([
    { name: "nothing", answer: [] },
    {
      name: "a leaf without roots",
      answer: ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"],
    },
    { name: "words", answer: ["no", "certificates"] },
    { name: "damaged PEM", answer: ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "x"] },
  ])("is refused if it is $name", ({ answer }) => {
    expect(() => svidFrom(makeKey("ecdsa-p256"), answer, SPIFFE)).toThrow(
      expect.objectContaining({ code: "CERT_NOT_VALID" }),
    );
  });

  test("survives the disk, and only the newest stays there", async () => {
    const files = new MemoryFiles();
    const [first, second] = await Promise.all(
      [signed(authority), signed(authority)].map(async (it) => {
        const { key, answer } = await it;
        return svidFrom(key, answer, SPIFFE);
      }),
    );
    if (first === undefined || second === undefined) throw new Error("no certificates");
    await storeSvid(files, FOLDER, first);
    await storeSvid(files, FOLDER, second);
    expect(await loadSvid(files, FOLDER)).toEqual(second);
    expect((await files.list(FOLDER))?.toSorted()).toEqual(["current", second.serial].toSorted());
    const modes = [...files.nodes].filter(([path]) => path.endsWith(".pem")).map(([, { mode }]) => mode);
    expect(modes).toEqual([0o600, 0o600, 0o600]);
  });

  test("a damaged or missing file is no certificate: the next one heals it", async () => {
    const { key, answer } = await signed(authority);
    const svid = svidFrom(key, answer, SPIFFE);
    for (const name of ["key.pem", "chain.pem", "roots.pem"]) {
      const files = new MemoryFiles();
      await storeSvid(files, FOLDER, svid);
      await files.remove(`${FOLDER}/${svid.serial}/${name}`);
      expect(await loadSvid(files, FOLDER)).toBeUndefined();
    }
    expect(await loadSvid(new MemoryFiles(), FOLDER)).toBeUndefined();
  });
});

describe("a token before it is used", () => {
  const now = new Date("2026-11-23T12:00:00Z");
  const seconds = (ms: number): number => (now.getTime() + ms) / 1000;
  test.for([
    { name: "for istio-ca, alive", claims: { aud: ["istio-ca"], exp: seconds(HOUR_MS) }, want: undefined },
    { name: "one audience as a text", claims: { aud: "istio-ca", exp: seconds(HOUR_MS) }, want: undefined },
    {
      name: "for the API server",
      claims: { aud: ["https://kubernetes.default.svc"] },
      want: "TOKEN_AUDIENCE",
    },
    { name: "for nobody", claims: {}, want: "TOKEN_AUDIENCE" },
    {
      name: "issued an hour from now: our clock is behind",
      claims: { aud: "istio-ca", iat: seconds(HOUR_MS) },
      want: "CLOCK_OFF",
    },
    {
      name: "issued a minute from now: clocks differ",
      claims: { aud: "istio-ca", iat: seconds(MINUTE_MS) },
      want: undefined,
    },
  ])("$name", ({ claims, want }) => {
    const check = (): void => checkToken(readToken(jwt(claims)), now);
    if (want === undefined) expect(check).not.toThrow();
    else expect(check).toThrow(expect.objectContaining({ code: want }));
  });

  test("its end is its end", () => {
    expect(tokenExpired(readToken(jwt({ exp: seconds(0) })), now)).toBe(true);
    expect(tokenExpired(readToken(jwt({ exp: seconds(1000) })), now)).toBe(false);
    expect(tokenExpired(readToken(jwt({})), now)).toBe(false);
    expect(readToken(jwt({ exp: 1e15 })).expiresAt, "no date can be that late").toBeUndefined();
  });

  test("whatever is in the file, the answer is facts or TOKEN_UNREADABLE", () => {
    const oneOf = (token: string): void => {
      try {
        readToken(token);
      } catch (thrown) {
        expect(thrown).toMatchObject({ code: "TOKEN_UNREADABLE" });
      }
    };
    for (const odd of [
      "",
      "a.b.c",
      jwt({}).slice(0, 30),
      "e30",
      `x.${Buffer.from("null").toString("base64url")}.y`,
    ])
      oneOf(odd);
    fc.assert(fc.property(fc.string(), oneOf));
    fc.assert(
      fc.property(fc.jsonValue(), (claims) =>
        oneOf(`x.${Buffer.from(JSON.stringify(claims)).toString("base64url")}.y`),
      ),
    );
  });
});

describe("renewIn", () => {
  // As istiod signs it: two minutes back.
  const day = { notBefore: new Date("2026-11-21T23:58:00Z"), notAfter: new Date("2026-11-23T00:00:00Z") };
  test.for([
    {
      name: "fresh, no jitter: half the lifetime",
      now: "2026-11-22T00:00:00Z",
      random: 0,
      want: 12 * HOUR_MS,
    },
    {
      name: "fresh, most jitter: a tenth earlier",
      now: "2026-11-22T00:00:00Z",
      random: 0.999_999,
      want: 9.6 * HOUR_MS,
    },
    { name: "just past half: at once", now: "2026-11-22T12:00:01Z", random: 0, want: 0 },
    { name: "expired while the machine was off: at once", now: "2026-12-24T00:00:00Z", random: 0, want: 0 },
    {
      name: "our clock is behind the CA's: waits longer, does not fail",
      now: "2026-11-21T23:00:00Z",
      random: 0,
      want: 13 * HOUR_MS,
    },
  ])("$name", ({ now, random, want }) => {
    expect(renewIn(day, new Date(now), () => random)).toBeCloseTo(want, -3);
  });
  // The first build took the backdated date for the beginning and renewed 60-second certificates without a pause.
  test("a certificate of one minute, backdated by two, is renewed after half a minute", () => {
    const signed = new Date("2026-11-22T00:00:00Z");
    const minute = {
      notBefore: new Date(signed.getTime() - 120_000),
      notAfter: new Date(signed.getTime() + 60_000),
    };
    expect(renewIn(minute, signed, () => 0)).toBe(30_000);
  });
  test("a certificate of one minute of a CA that does not backdate, too", () => {
    const signed = new Date("2026-11-22T00:00:00Z");
    expect(
      renewIn({ notBefore: signed, notAfter: new Date(signed.getTime() + 60_000) }, signed, () => 0),
    ).toBe(30_000);
  });
  test("a certificate that ends before it begins is none", () => {
    const { notBefore, notAfter } = day;
    expect(() => renewIn({ notBefore: notAfter, notAfter: notBefore }, notBefore, () => 0)).toThrow(
      "ends before",
    );
  });
});

test("the certificate is presented while it lives and is of the mesh's roots, else the token", async () => {
  const [mesh, rebuilt] = await Promise.all([
    Authority.create("cluster.local"),
    Authority.create("cluster.local"),
  ]);
  const { key, answer } = await signed(mesh);
  const svid = svidFrom(key, answer, SPIFFE);
  const now = new Date();
  const kind = (
    held: Svid | undefined,
    token: string | undefined,
    roots: string,
    at: Date,
  ): string | undefined => chooseCredential(held, token, roots, at)?.kind;
  expect(kind(svid, "t", mesh.rootPem, now)).toBe("certificate");
  expect(kind(svid, "t", rebuilt.rootPem + mesh.rootPem, now)).toBe("certificate");
  expect(kind(svid, "t", rebuilt.rootPem, now)).toBe("token");
  expect(kind(svid, undefined, rebuilt.rootPem, now)).toBeUndefined();
  expect(kind(svid, "t", mesh.rootPem, new Date(now.getTime() + 2 * DAY_MS))).toBe("token");
  expect(kind(svid, "t", mesh.rootPem, new Date(now.getTime() - DAY_MS))).toBe("token");
  expect(kind(undefined, undefined, mesh.rootPem, now)).toBeUndefined();
});

describe("with a control plane", () => {
  let plane: ControlPlane;
  let ca: CaTarget;
  const token = (): string => plane.mintToken({ namespace: "default", serviceAccount: "details" });
  beforeAll(async () => {
    plane = await startControlPlane({ address: "127.0.0.1", port: 0, services: [], groups: [] });
    ca = {
      addresses: ["127.0.0.1"],
      port: plane.port,
      serverName: plane.serverName,
      rootCert: plane.rootCert,
      clusterId: "Kubernetes",
    };
  });
  afterAll(() => plane.stop());

  const real: Clock = {
    now: () => new Date(),
    monotonicMs: () => performance.now(),
    sleep: () => Promise.resolve(),
  };
  const shifted = (ms: number): Clock => ({ ...real, now: () => new Date(Date.now() + ms) });
  const byToken = (text: string): Parameters<typeof enroll>[1] => ({
    ca,
    spiffe: SPIFFE,
    credential: { kind: "token", token: text },
  });

  test("a token gets a certificate, and that one the next", async () => {
    const first = await enroll({ clock: real }, byToken(`${token()}\n`), NEVER);
    const next = await enroll(
      { clock: real },
      { ca, spiffe: SPIFFE, credential: { kind: "certificate", svid: first } },
      NEVER,
    );
    expect(next.spiffe).toBe(SPIFFE);
    expect(next.serial).not.toBe(first.serial);
  });

  test("an address that does not answer is passed over", async () => {
    const options = byToken(token());
    const two = { ...options, ca: { ...ca, addresses: ["127.0.0.3", "127.0.0.1"] } };
    expect((await enroll({ clock: real }, two, NEVER)).spiffe).toBe(SPIFFE);
  });

  test.for([
    { name: "a forged token", code: "IDENTITY_REFUSED", options: () => byToken(jwt({ aud: ["istio-ca"] })) },
    { name: "no JWT at all", code: "TOKEN_UNREADABLE", options: () => byToken("hello") },
    {
      name: "a token of another service account",
      code: "IDENTITY_REFUSED",
      options: () => byToken(plane.mintToken({ namespace: "default", serviceAccount: "reviews" })),
    },
    {
      name: "a server name that is not istiod's",
      code: "ISTIOD_UNTRUSTED",
      options: () => ({ ...byToken(token()), ca: { ...ca, serverName: "istiod.elsewhere.svc" } }),
    },
    {
      name: "nobody at that port",
      code: "ISTIOD_UNREACHABLE",
      options: () => ({ ...byToken(token()), ca: { ...ca, port: 1 } }),
    },
    {
      name: "no address",
      code: "ISTIOD_UNREACHABLE",
      options: () => ({ ...byToken(token()), ca: { ...ca, addresses: [] } }),
    },
  ])("$name: $code", async ({ code, options }) => {
    await expect(enroll({ clock: real }, options(), NEVER)).rejects.toMatchObject({ code });
  });

  test.for([
    { name: "an hour behind", ms: -HOUR_MS, words: "behind" },
    { name: "an hour ahead", ms: HOUR_MS, words: "ahead" },
  ])("our clock is $name: CLOCK_OFF says so", async ({ ms, words }) => {
    // Without iat in the token only the certificate tells.
    const svid = await enroll({ clock: real }, byToken(token()), NEVER);
    const options = { ca, spiffe: SPIFFE, credential: { kind: "certificate" as const, svid } };
    await expect(enroll({ clock: shifted(ms) }, options, NEVER)).rejects.toMatchObject({
      code: "CLOCK_OFF",
      message: expect.stringContaining(words),
    });
  });

  /** keepIdentity on a clock that jumps to the end of every sleep, until `enough`. */
  async function keep(
    more: Partial<KeepDeps>,
    enough: (seen: { renewed: Svid[]; statuses: IdentityStatus[]; attempts: number }) => boolean,
  ): Promise<{ renewed: Svid[]; statuses: IdentityStatus[]; conditions: string[]; files: MemoryFiles }> {
    const files = new MemoryFiles({ "/token": token() });
    const stop = new AbortController();
    const seen = { renewed: [] as Svid[], statuses: [] as IdentityStatus[], attempts: 0 };
    const conditions = new Conditions(real.now);
    const look = (): void => {
      if (enough(seen)) stop.abort();
    };
    await keepIdentity(
      {
        host: {
          files,
          clock: { ...real, sleep: () => new Promise((resolve) => setImmediate(resolve)) },
          random: (bytes) => new Uint8Array(bytes),
          run: () => Promise.reject(new Error("nothing is run")),
        },
        ca: async () => {
          seen.attempts += 1;
          return ca;
        },
        spiffe: SPIFFE,
        folder: FOLDER,
        tokenFile: "/token",
        credentialExec: undefined,
        conditions,
        onFailed: () => undefined,
        onRenewed: (svid) => {
          seen.renewed.push(svid);
          look();
        },
        onStatus: (status) => {
          seen.statuses.push(status);
          look();
        },
        ...more,
      },
      new Latest<Svid>(),
      stop.signal,
    );
    return { ...seen, conditions: conditions.list().map(({ id }) => id), files };
  }

  test("the first certificate is stored and proven by a second, and the status says when the next one is due", async () => {
    const { renewed, statuses, conditions, files } = await keep({}, ({ statuses: it }) => it.length > 0);
    expect(renewed).toHaveLength(2);
    expect((await loadSvid(files, FOLDER))?.serial).toBe(renewed[1]?.serial);
    expect(conditions).toEqual([]);
    const halfMs = (statuses[0]?.nextRenewal?.getTime() ?? 0) - Date.now();
    expect(halfMs / HOUR_MS).toBeGreaterThan(9);
    expect(halfMs / HOUR_MS).toBeLessThan(12.1);
    expect(statuses[0]).toMatchObject({
      spiffe: SPIFFE,
      nextCredential: "certificate",
      lastError: undefined,
    });
  });

  test("a failure raises a condition with the reason, and success clears it", async () => {
    let down = true;
    const ids: string[][] = [];
    const conditions = new Conditions(real.now, () => ids.push(conditions.list().map(({ id }) => id)));
    const { statuses } = await keep(
      {
        conditions,
        ca: async () => {
          const port = down ? 1 : ca.port;
          down = false;
          return { ...ca, port };
        },
      },
      ({ renewed }) => renewed.length > 0,
    );
    expect(statuses[0]?.lastError).toContain("does not answer");
    expect(ids).toEqual([["identity-not-renewed"], []]);
  });
});

test("beginnings of certificates without an end are passed over in one walk", () => {
  const begin = "-----BEGIN CERTIFICATE-----\n";
  const whole = `${begin}AA==\n-----END CERTIFICATE-----`;
  expect(splitPem(`x\n${whole}\ny${whole}${begin}`)).toEqual([whole, whole]);
  const startedMs = performance.now();
  // 14 MB: each beginning was followed to the end of the text.
  expect(splitPem(begin.repeat(500_000))).toEqual([]);
  expect(performance.now() - startedMs).toBeLessThan(2000);
});
