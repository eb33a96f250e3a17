import "reflect-metadata";
import { KeyObject } from "node:crypto";
import { createServer as createProxy } from "node:http";
import { type AddressInfo, connect, createServer, type Server } from "node:net";
import * as x509 from "@peculiar/x509";
import { describe, expect, test } from "vitest";
import { FakeKube } from "../../test/fakes/kube-api.ts";
import { causesOf, describeError, VmmeshError } from "../core/errors.ts";
import { KubeClient, type KubeObject } from "./client.ts";
import type { KubeAccess } from "./kubeconfig.ts";

const ACCESS: Omit<KubeAccess, "server"> = {
  source: "a test",
  user: "tester",
  namespace: undefined,
  ca: undefined,
  certificate: undefined,
  token: undefined,
  serverName: undefined,
  proxyUrl: undefined,
  verify: true,
  impersonate: undefined,
  warnings: [],
};

const ACCOUNT: KubeObject = {
  apiVersion: "v1",
  kind: "ServiceAccount",
  metadata: { name: "details", namespace: "default" },
};
const REF = { kind: "ServiceAccount", name: "details", namespace: "default" } as const;
const SPACE: KubeObject = { apiVersion: "v1", kind: "Namespace", metadata: { name: "default" } };

async function failure(
  access: KubeAccess,
  work: (client: KubeClient) => Promise<unknown>,
): Promise<VmmeshError> {
  await using client = new KubeClient(access);
  const thrown = await work(client).then(
    () => undefined,
    (error: unknown) => error,
  );
  if (thrown instanceof VmmeshError) return thrown;
  throw new Error(`no VmmeshError but ${String(thrown)}`);
}

describe("the client", () => {
  test("gets, makes and applies", async () => {
    await using fake = await FakeKube.start({ objects: [SPACE] });
    await using client = new KubeClient({ ...ACCESS, server: fake.url });
    expect(await client.find(REF)).toBeUndefined();
    expect(await client.create(ACCOUNT)).toMatchObject(ACCOUNT);
    expect(await client.create(ACCOUNT)).toBeUndefined();
    const labelled = { ...ACCOUNT, metadata: { ...ACCOUNT.metadata, labels: { a: "b" } } };
    await client.apply(labelled);
    expect(await client.get(REF)).toEqual(labelled);
    expect(await client.list("ServiceAccount", "default")).toEqual([labelled]);
  });

  test("what is missing is named, with the command that makes it", async () => {
    await using fake = await FakeKube.start({ objects: [SPACE] });
    const error = await failure({ ...ACCESS, server: fake.url }, (client) => client.get(REF));
    expect(describeError(error)).toBe(
      [
        "vmmesh: KUBE_NOT_FOUND: there is no ServiceAccount default/details in the cluster",
        "  next:    Make it with `kubectl -n default create serviceaccount details`, or name another with --service-account.",
      ].join("\n"),
    );
  });

  test("a credential that nobody knows", async () => {
    await using fake = await FakeKube.start({ users: { good: "joiner" } });
    const error = await failure({ ...ACCESS, server: fake.url, token: "secret-token" }, (client) =>
      client.get(REF),
    );
    expect(error.code).toBe("KUBE_FORBIDDEN");
    expect(error.message).toContain("does not know the credential of user `tester`");
    expect(describeError(error)).not.toContain("secret-token");
  });

  test("an admission rule that says no keeps its own reason", async () => {
    const status = { kind: "Status", code: 403, reason: "Forbidden", message: "exceeded quota: few" };
    await using server = await answering(403, status);
    const error = await failure({ ...ACCESS, server: server.url }, (client) => client.create(ACCOUNT));
    expect(describeError(error)).toContain("because: exceeded quota: few");
  });

  test("a name cannot climb out of its path", async () => {
    await using fake = await FakeKube.start();
    await using client = new KubeClient({ ...ACCESS, server: fake.url });
    expect(
      await client
        .find({ ...REF, name: "../secrets/x" })
        .catch((error: unknown) => (error as VmmeshError).code),
    ).toBeUndefined();
    expect(fake.seen.map(({ resource }) => resource)).toEqual(["serviceaccounts"]);
  });

  test("acts as the user that the kubeconfig says", async () => {
    await using fake = await FakeKube.start({ objects: [ACCOUNT], users: { t: "admin" } });
    const impersonate = { user: "joiner", groups: ["a", "b"] };
    await using client = new KubeClient({ ...ACCESS, server: fake.url, token: "t", impersonate });
    await client.get(REF);
    expect(fake.seen.map(({ user }) => user)).toEqual(["joiner"]);
  });
});

describe("an API server that cannot be used, in words:", () => {
  const making = makeCerts();

  test.for([
    {
      name: "signed by another root",
      cert: "good",
      ca: "other",
      want: "is not signed by the root in the kubeconfig",
    },
    {
      name: "signed by a root that the system does not know",
      cert: "good",
      ca: undefined,
      want: "is not signed by the root in the kubeconfig",
    },
    { name: "expired", cert: "expired", root: "ours", want: "has expired, or this machine's clock is ahead" },
    {
      name: "not valid yet",
      cert: "future",
      ca: "ca",
      want: "not valid yet, so this machine's clock is behind",
    },
    { name: "for another name", cert: "name", root: "ours", want: "its certificate is for other names" },
  ] as const)("its certificate is $name", async ({ cert, root, want }) => {
    const certs = await making;
    await using fake = await FakeKube.start({ tls: certs.leaf(cert) });
    const error = await failure(
      { ...ACCESS, server: fake.url, ca: root === undefined ? undefined : certs.roots[root] },
      (client) => client.get(REF),
    );
    expect(error.code).toBe("KUBE_UNREACHABLE");
    expect(error.message).toContain(want);
  });

  test("tls-server-name and the kubeconfig's root make it right", async () => {
    const certs = await making;
    await using fake = await FakeKube.start({ tls: certs.leaf("name"), objects: [ACCOUNT] });
    await using client = new KubeClient({
      ...ACCESS,
      server: fake.url,
      ca: certs.roots.ours,
      serverName: "kubernetes.example",
    });
    expect(await client.get(REF)).toEqual(ACCOUNT);
  });

  test("through a proxy it is still the API server that is checked", async () => {
    const certs = await making;
    await using fake = await FakeKube.start({ tls: certs.leaf("good"), objects: [ACCOUNT] });
    await using proxy = await tunnel();
    const access = { ...ACCESS, server: fake.url, proxyUrl: proxy.url };
    await using client = new KubeClient({ ...access, ca: certs.roots.ours });
    expect(await client.get(REF)).toEqual(ACCOUNT);
    const error = await failure({ ...access, ca: certs.roots.other }, (wary) => wary.get(REF));
    expect(error.message).toContain("is not signed by the root in the kubeconfig");
    expect(proxy.tunnels()).toBe(2);
  });

  test("it asks for a certificate: that of the kubeconfig lets in, none does not", async () => {
    const certs = await making;
    const tls = { ...certs.leaf("good"), clients: certs.roots.ours };
    await using fake = await FakeKube.start({ tls, objects: [ACCOUNT] });
    const access = { ...ACCESS, server: fake.url, ca: certs.roots.ours };
    await using client = new KubeClient({ ...access, certificate: certs.leaf("name") });
    expect(await client.get(REF)).toEqual(ACCOUNT);
    const error = await failure(access, (bare) => bare.get(REF));
    expect(error.code).toBe("KUBE_UNREACHABLE");
  });

  test("without a check of the certificate, when that was asked for", async () => {
    const certs = await making;
    await using fake = await FakeKube.start({ tls: certs.leaf("expired"), objects: [ACCOUNT] });
    await using client = new KubeClient({ ...ACCESS, server: fake.url, verify: false });
    expect(await client.get(REF)).toEqual(ACCOUNT);
  });

  test("what answers does not speak TLS", async () => {
    await using fake = await FakeKube.start();
    const error = await failure({ ...ACCESS, server: fake.url.replace("http:", "https:") }, (client) =>
      client.get(REF),
    );
    expect(error.message).toContain("what answers there does not speak TLS");
  });

  test("nothing listens", async () => {
    const error = await failure({ ...ACCESS, server: "https://127.0.0.1:1" }, (client) => client.get(REF));
    expect(error.message).toBe(
      "the API server https://127.0.0.1:1 (a test) cannot be used: nothing listens there",
    );
    expect(error.exitCode).toBe(5);
  });

  test("its name has no address", async () => {
    const error = await failure({ ...ACCESS, server: "https://nowhere.invalid" }, (client) =>
      client.get(REF),
    );
    expect(error.message).toMatch(/its name has no address|resolver does not answer/);
  });

  test("it answers more than 64 MiB", async () => {
    await using server = await answering(200, { filler: "x".repeat(64 * 1024 * 1024) });
    const error = await failure({ ...ACCESS, server: server.url }, (client) => client.get(REF));
    expect(error.code).toBe("KUBE_UNREACHABLE");
    expect(causesOf(error)).toContain("its answer is longer than 67108864 bytes");
  });

  test("it hangs up", async () => {
    await using server = await hangingUp();
    const error = await failure({ ...ACCESS, server: server.url }, (client) => client.get(REF));
    expect(error.message).toContain("the connection was cut");
  });
});

interface Running extends AsyncDisposable {
  readonly url: string;
}

async function listening(server: Server): Promise<Running> {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    async [Symbol.asyncDispose]() {
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

const hangingUp = (): Promise<Running> => listening(createServer((socket) => socket.destroy()));

function answering(status: number, body: unknown): Promise<Running> {
  const text = JSON.stringify(body);
  const head = `HTTP/1.1 ${status} X\r\ncontent-length: ${text.length}\r\nconnection: close\r\n\r\n`;
  return listening(createServer((socket) => socket.once("data", () => socket.end(head + text))));
}

/** An HTTP proxy that knows CONNECT alone. */
async function tunnel(): Promise<Running & { tunnels(): number }> {
  let count = 0;
  const proxy = createProxy();
  proxy.on("connect", (request, socket, head) => {
    count += 1;
    const [host = "", port = ""] = (request.url ?? "").split(":");
    const upstream = connect(Number(port), host, () => {
      socket.write("HTTP/1.1 200 OK\r\n\r\n");
      upstream.write(head);
      upstream.pipe(socket).pipe(upstream);
    });
  });
  return { ...(await listening(proxy)), tunnels: () => count };
}

/** A root, certificates from it that are good, expired, not valid yet and for another name; and a root of somebody else. */
async function makeCerts(): Promise<{
  roots: Record<"ours" | "other", string>;
  leaf(name: Leaf): { cert: string; key: string };
}> {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const newKeys = () => crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  const root = async (name: string) => {
    const keys = await newKeys();
    const extensions = [new x509.BasicConstraintsExtension(true, 1, true)];
    return {
      keys,
      certificate: await x509.X509CertificateGenerator.createSelfSigned({ name, keys, extensions, ...VALID }),
    };
  };
  const [ours, other] = await Promise.all([root("CN=ours"), root("CN=other")]);
  const leaves = new Map<Leaf, { cert: string; key: string }>();
  for (const [name, { san, ...validity }] of Object.entries(LEAVES) as [Leaf, (typeof LEAVES)[Leaf]][]) {
    const keys = await newKeys();
    const certificate = await x509.X509CertificateGenerator.create({
      subject: `CN=${name}`,
      issuer: ours.certificate.subject,
      signingKey: ours.keys.privateKey,
      publicKey: keys.publicKey,
      extensions: [new x509.SubjectAlternativeNameExtension([san])],
      ...validity,
    });
    const key = KeyObject.from(keys.privateKey).export({ type: "pkcs8", format: "pem" }).toString();
    leaves.set(name, { cert: certificate.toString("pem"), key });
  }
  return {
    roots: { ours: ours.certificate.toString("pem"), other: other.certificate.toString("pem") },
    leaf: (name) => leaves.get(name) ?? { cert: "", key: "" },
  };
}

const VALID = { notBefore: new Date("2026-01-01"), notAfter: new Date("2046-01-01") };
const LOCAL = { type: "ip", value: "127.0.0.1" } as const;
const LEAVES = {
  good: { san: LOCAL, ...VALID },
  expired: { san: LOCAL, notBefore: new Date("2020-01-01"), notAfter: new Date("2020-01-02") },
  future: { san: LOCAL, notBefore: new Date("2045-01-01"), notAfter: new Date("2046-01-01") },
  name: { san: { type: "dns", value: "kubernetes.example" } as const, ...VALID },
};
type Leaf = keyof typeof LEAVES;
