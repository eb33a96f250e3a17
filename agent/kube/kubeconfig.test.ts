import fc from "fast-check";
import { describe, expect, test, vi } from "vitest";
import { stringify } from "yaml";
import { MemoryFiles } from "../../test/fakes/files.ts";
import { describeError, VmmeshError } from "../core/errors.ts";
import type { Command, CommandResult, Host } from "../platform/host.ts";
import { type KubeAccess, type KubeconfigOptions, loadKubeconfig } from "./kubeconfig.ts";

const PEM = "-----BEGIN CERTIFICATE-----\nZm9v\n-----END CERTIFICATE-----\n";
const base64 = (text: string): string => Buffer.from(text).toString("base64");

interface Parts {
  readonly cluster?: Record<string, unknown>;
  readonly user?: Record<string, unknown>;
  readonly context?: Record<string, unknown>;
  readonly current?: string;
}

function config({ cluster, user, context, current = "main" }: Parts = {}): string {
  return stringify({
    apiVersion: "v1",
    kind: "Config",
    "current-context": current,
    contexts: [{ name: "main", context: { cluster: "c", user: "u", namespace: "n", ...context } }],
    clusters: [{ name: "c", cluster: { server: "https://10.0.0.1:6443/", ...cluster } }],
    users: [{ name: "u", user: { token: "t", ...user } }],
  });
}

interface World {
  readonly files?: Readonly<Record<string, string>>;
  readonly options?: Partial<KubeconfigOptions>;
  readonly run?: (command: Command) => CommandResult;
}

async function load({ files, options, run }: World): Promise<KubeAccess> {
  const host: Pick<Host, "files" | "run"> = {
    files: new MemoryFiles(files ?? { "/home/me/.kube/config": config() }),
    run: async (command) => run?.(command) ?? { code: 1, stdout: "", stderr: "not expected" },
  };
  return loadKubeconfig(host, { env: {}, home: "/home/me", uid: 1000, ...options });
}

async function failure(work: Promise<unknown>): Promise<VmmeshError> {
  const thrown = await work.then(
    () => undefined,
    (error: unknown) => error,
  );
  if (thrown instanceof VmmeshError) return thrown;
  throw new Error(`no VmmeshError but ${String(thrown)}`);
}

describe("where a kubeconfig comes from", () => {
  const all = {
    "/given": config({ user: { token: "given" } }),
    "/env": config({ user: { token: "env" } }),
    "/home/me/.kube/config": config({ user: { token: "home" } }),
    "/etc/kubernetes/admin.conf": config({ user: { token: "admin" } }),
  };
  const { "/home/me/.kube/config": _, ...noHome } = all;

  test.for([
    {
      name: "--kubeconfig before all",
      files: all,
      options: { path: "/given", env: { KUBECONFIG: "/env" } },
      want: ["given", "/given (--kubeconfig), context main"],
    },
    {
      name: "then $KUBECONFIG",
      files: all,
      options: { env: { KUBECONFIG: "/env" } },
      want: ["env", "/env ($KUBECONFIG), context main"],
    },
    {
      name: "an empty $KUBECONFIG is none",
      files: all,
      options: { env: { KUBECONFIG: "" } },
      want: ["home", "/home/me/.kube/config (the default place), context main"],
    },
    {
      name: "then kubeadm's",
      files: noHome,
      options: {},
      want: ["admin", "/etc/kubernetes/admin.conf (kubeadm's place), context main"],
    },
  ])("$name", async ({ files, options, want }) => {
    const access = await load({ files, options });
    expect([access.token, access.source]).toEqual(want);
  });

  test("several in $KUBECONFIG are merged: the first to name a thing wins", async () => {
    const files = {
      "/a": config({ user: { token: "first" } }),
      "/b": stringify({
        contexts: [{ name: "other", context: { cluster: "c", user: "u" } }],
        users: [{ name: "u", user: { token: "second" } }],
      }),
    };
    const access = await load({
      files,
      options: { env: { KUBECONFIG: "/missing:/a:/b" }, context: "other" },
    });
    expect(access.token).toBe("first");
  });

  test.for([
    {
      name: "none at all",
      files: {},
      options: {},
      want: "looked for /home/me/.kube/config, /etc/kubernetes/admin.conf",
    },
    { name: "the one that was given", files: all, options: { path: "/other" }, want: "looked for /other" },
    {
      name: "the one of $KUBECONFIG",
      files: all,
      options: { env: { KUBECONFIG: "/x" } },
      want: "looked for /x",
    },
  ])("missing: $name", async ({ files, options, want }) => {
    const error = await failure(load({ files, options }));
    expect([error.code, error.exitCode]).toEqual(["KUBECONFIG_MISSING", 5]);
    expect(error.message).toContain(want);
    expect(error.next).toContain("vmmesh bundle create");
  });
});

describe("what stands in it", () => {
  test("server, names and namespace", async () => {
    expect(
      await load({
        files: {
          "/home/me/.kube/config": config({
            cluster: { "tls-server-name": "kubernetes", "proxy-url": "http://proxy:3128" },
          }),
        },
      }),
    ).toMatchObject({
      server: "https://10.0.0.1:6443",
      user: "u",
      namespace: "n",
      serverName: "kubernetes",
      proxyUrl: "http://proxy:3128",
      verify: true,
      warnings: [],
    });
  });

  test("certificates inline, and in files beside it", async () => {
    const inline = {
      cluster: { "certificate-authority-data": base64(PEM) },
      user: { "client-certificate-data": base64(PEM), "client-key-data": base64(PEM) },
    };
    const beside = {
      cluster: { "certificate-authority": "ca.crt" },
      user: { "client-certificate": "me.crt", "client-key": "/keys/me.key" },
    };
    const files = { "/k/ca.crt": PEM, "/k/me.crt": PEM, "/keys/me.key": PEM };
    for (const parts of [inline, beside]) {
      const access = await load({
        files: { ...files, "/k/config": config(parts) },
        options: { path: "/k/config" },
      });
      expect(access).toMatchObject({ ca: PEM, certificate: { cert: PEM, key: PEM } });
    }
  });

  test("a token from a file, read now", async () => {
    const files = { "/k/config": config({ user: { tokenFile: "token" } }), "/k/token": "abc\n" };
    expect((await load({ files, options: { path: "/k/config" } })).token).toBe("abc");
  });

  test("impersonation is not forgotten: it narrows what is done", async () => {
    const files = { "/c": config({ user: { as: "joiner", "as-groups": ["g"] } }) };
    expect((await load({ files, options: { path: "/c" } })).impersonate).toEqual({
      user: "joiner",
      groups: ["g"],
    });
  });
});

describe("a plugin", () => {
  const exec = {
    apiVersion: "client.authentication.k8s.io/v1",
    command: "./get-token",
    args: ["-x"],
    env: [{ name: "A", value: "b" }],
  };
  const files = { "/k/config": config({ user: { token: undefined, exec } }) };
  const answer = (status: unknown): CommandResult => ({
    code: 0,
    stdout: JSON.stringify({ status }),
    stderr: "",
  });

  test("is run without a shell, beside its file, and told what it needs", async () => {
    const commands: Command[] = [];
    const access = await load({
      files,
      options: { path: "/k/config" },
      run: (command) => {
        commands.push(command);
        return answer({ token: "from-plugin" });
      },
    });
    expect(access).toMatchObject({ token: "from-plugin", warnings: [] });
    expect(commands).toHaveLength(1);
    expect(commands[0]?.argv).toEqual(["/k/./get-token", "-x"]);
    expect(commands[0]?.env?.["A"]).toBe("b");
    expect(JSON.parse(commands[0]?.env?.["KUBERNETES_EXEC_INFO"] ?? "")).toMatchObject({
      kind: "ExecCredential",
      spec: { interactive: false },
    });
  });

  test("as root is warned of", async () => {
    const access = await load({
      files,
      options: { path: "/k/config", uid: 0 },
      run: () => answer({ token: "t" }),
    });
    expect(access.warnings).toEqual([expect.stringContaining("runs `/k/./get-token` as root")]);
  });

  test("may give a certificate", async () => {
    const access = await load({
      files,
      options: { path: "/k/config" },
      run: () => answer({ clientCertificateData: PEM, clientKeyData: "key" }),
    });
    expect(access).toMatchObject({ token: undefined, certificate: { cert: PEM, key: "key" } });
  });

  test.for([
    { name: "fails", result: { code: 3, stdout: "secret", stderr: "no login" }, want: "ended with status 3" },
    { name: "prints nothing", result: { code: 0, stdout: "", stderr: "" }, want: "printed no credential" },
    {
      name: "prints half a certificate",
      result: answer({ clientCertificateData: PEM }),
      want: "printed no credential",
    },
  ])("that $name is named, without what it printed", async ({ result, want }) => {
    const error = await failure(load({ files, options: { path: "/k/config" }, run: () => result }));
    expect(error.message).toContain(want);
    expect(describeError(error)).not.toContain("secret");
  });
});

describe("a malformed one is refused by file and line:", () => {
  test.for([
    { name: "broken YAML", text: "a: 1\nb: [\n", want: /^\/c, line \d+: / },
    { name: "an alias of nothing", text: "users: *x\n", want: "/c: Unresolved alias" },
    { name: "a list", text: "- a\n", want: "/c, line 1: there is no map" },
    { name: "no current context", text: config({ current: "" }), want: "/c: there is no `current-context`" },
    {
      name: "a context that is missing",
      text: config({ current: "x" }),
      want: "/c: there is no context named `x`",
    },
    {
      name: "a cluster that is missing",
      text: config({ context: { cluster: "x" } }),
      want: "there is no cluster named `x`",
    },
    {
      name: "a user that is missing",
      text: config({ context: { user: "x" } }),
      want: "there is no user named `x`",
    },
    {
      name: "no server",
      text: config({ cluster: { server: "" } }),
      want: "/c, line 11: `server` of cluster `c` is missing",
    },
    {
      name: "a server without TLS",
      text: config({ cluster: { server: "http://10.0.0.1:8080" } }),
      want: "would cross the network unencrypted",
    },
    {
      name: "no check of the server",
      text: config({ cluster: { "insecure-skip-tls-verify": true } }),
      want: "whoever answers would be given your credential",
    },
    {
      name: "a SOCKS proxy",
      text: config({ cluster: { "proxy-url": "socks5://x" } }),
      want: "only http and https proxies",
    },
    {
      name: "a root that is no PEM",
      text: config({ cluster: { "certificate-authority-data": "eA==" } }),
      want: "is not a PEM text in base64",
    },
    {
      name: "a root file that is missing",
      text: config({ cluster: { "certificate-authority": "/no" } }),
      want: "names /no, which does not exist",
    },
    {
      name: "a certificate without key",
      text: config({ user: { "client-certificate-data": base64(PEM) } }),
      want: "has no counterpart",
    },
    {
      name: "a form of login that is gone",
      text: config({ user: { "auth-provider": { name: "gcp" } } }),
      want: "gave up in 1.26",
    },
    {
      name: "a plugin without command",
      text: config({ user: { exec: {} } }),
      want: "`exec.command` of user `u` is missing",
    },
  ])("$name", async ({ text, want }) => {
    const error = await failure(load({ files: { "/c": text }, options: { path: "/c" } }));
    expect(error.code).toBe("KUBECONFIG_MALFORMED");
    expect(error.message).toMatch(want);
    expect(error.next).toMatch(/\.$/);
  });

  // Fuzzing met it: the YAML library warned on stderr of a map used as a key, and printed the map, token and all.
  test("nothing of a broken file is printed", async () => {
    const printed = vi.spyOn(process, "emitWarning").mockImplementation(() => undefined);
    await failure(load({ files: { "/c": "? {token: secret}\n: 1\n" }, options: { path: "/c" } }));
    expect(printed).not.toHaveBeenCalled();
    printed.mockRestore();
  });

  test("what is asked for is allowed, and said", async () => {
    const files = { "/c": config({ cluster: { "insecure-skip-tls-verify": true } }) };
    const access = await load({ files, options: { path: "/c", insecure: true } });
    expect(access.verify).toBe(false);
    expect(access.warnings).toEqual(["the API server's certificate is not checked, as you asked"]);
  });

  test("no text makes it fall over with an error of another kind", async () => {
    const good = config();
    await fc.assert(
      fc.asyncProperty(fc.nat(good.length), fc.string({ maxLength: 20 }), async (at, noise) => {
        const text = good.slice(0, at) + noise + good.slice(at + noise.length);
        await load({ files: { "/c": text }, options: { path: "/c" } }).catch((error: unknown) => {
          expect(error).toBeInstanceOf(VmmeshError);
        });
      }),
    );
  });
});
