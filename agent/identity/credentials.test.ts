import "reflect-metadata";
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type ControlPlane, startControlPlane } from "../../test/controlplane/server.ts";
import { MemoryFiles } from "../../test/fakes/files.ts";
import type { VmmeshError } from "../core/errors.ts";
import type { CommandResult, Host } from "../platform/host.ts";
import { linuxHost } from "../platform/linux.ts";
import { tokenOfCommand } from "./command.ts";
import { enrollByAny, nextCredential } from "./credentials.ts";
import type { Svid } from "./svid.ts";

const SPIFFE = "spiffe://cluster.local/ns/default/sa/details";
const NEVER = new AbortController().signal;
const EXEC = "/usr/local/lib/token";

describe("the credential command", () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "vmmesh-"));
  });
  afterAll(() => rmSync(folder, { recursive: true }));
  const ask = (script: string): Promise<string> => {
    const path = join(folder, "token");
    writeFileSync(path, `#!/bin/sh\n${script}\n`);
    chmodSync(path, 0o755);
    return tokenOfCommand(linuxHost(), path, undefined, NEVER);
  };

  test("what it prints is the token, without the spaces around it", async () => {
    expect(await ask("echo; echo ' abc.def.ghi '")).toBe("abc.def.ghi");
  });

  test.for([
    {
      name: "ends with an error",
      script: "echo half; echo 'no\n\tnode\x1b[31m' >&2; exit 3",
      says: "status 3, and said: no node [31m",
    },
    { name: "prints nothing", script: "true", says: "printed nothing" },
    { name: "prints without end", script: "exec yes", says: "more than 65536 bytes" },
    { name: "is ended", script: "kill -9 $$", says: "SIGKILL" },
  ])("one that $name gives no token, and the error says why", async ({ script, says }) => {
    await expect(ask(script)).rejects.toMatchObject({
      code: "COMMAND_FAILED",
      message: expect.stringContaining(says) as string,
      next: expect.stringContaining("runuser -u vmmesh -- ") as string,
    });
  });

  test("one that is not there is named", async () => {
    await expect(tokenOfCommand(linuxHost(), "/no/such", undefined, NEVER)).rejects.toMatchObject({
      code: "COMMAND_MISSING",
      message: "the credential command /no/such gave no token: does not exist",
    });
  });

  test("its token is in no error", async () => {
    const failure = await ask("echo secret-token; exit 1").catch((thrown: VmmeshError) => thrown);
    expect(String((failure as Error).message)).not.toContain("secret-token");
  });
});

describe("credentials in turn", () => {
  let plane: ControlPlane;
  let strict: ControlPlane;
  beforeAll(async () => {
    const options = { address: "127.0.0.1", port: 0, services: [], groups: [] };
    plane = await startControlPlane(options);
    strict = await startControlPlane({ ...options, onlyTokens: true });
  });
  afterAll(async () => {
    await plane.stop();
    await strict.stop();
  });

  const mint = (of: ControlPlane, seconds = 3600): string =>
    of.mintToken({ namespace: "default", serviceAccount: "details", seconds });
  const sources = (file: string | undefined, printed?: string | (() => Promise<CommandResult>)) => {
    const run =
      typeof printed === "function" ? printed : async () => ({ code: 0, stdout: printed ?? "", stderr: "" });
    return {
      host: {
        files: new MemoryFiles(file === undefined ? {} : { "/token": file }),
        clock: linuxHost().clock,
        run,
      },
      tokenFile: "/token",
      credentialExec: printed === undefined ? undefined : EXEC,
    };
  };
  const enrollAt = (of: ControlPlane, from: ReturnType<typeof sources>, held?: Svid) =>
    enrollByAny(
      from,
      {
        spiffe: SPIFFE,
        ca: {
          addresses: ["127.0.0.1"],
          port: of.port,
          serverName: of.serverName,
          rootCert: of.rootCert,
          clusterId: "Kubernetes",
        },
      },
      held,
      NEVER,
    );

  test("the certificate comes first, and no token is asked for", async () => {
    const { svid } = await enrollAt(plane, sources(mint(plane)));
    const asked = sources(undefined, () => Promise.reject(new Error("asked")));
    expect(await enrollAt(plane, asked, svid)).toMatchObject({
      by: "certificate",
      certificateRefused: undefined,
    });
  });

  test("a CA that takes no certificate gets the token, and the refusal is told", async () => {
    const { svid, by } = await enrollAt(strict, sources(mint(strict)));
    expect(by).toBe("token");
    expect(await enrollAt(strict, sources(mint(strict)), svid)).toMatchObject({
      by: "token",
      certificateRefused: { code: "IDENTITY_REFUSED" },
    });
  });

  test.for([
    { name: "there is no token file", file: () => undefined },
    { name: "its token has ended", file: () => mint(plane, -60) },
    { name: "its token is of another mesh", file: () => mint(strict) },
    { name: "it holds no token", file: () => "hello" },
  ])("the command is asked where the token file does not help: $name", async ({ file }) => {
    expect((await enrollAt(plane, sources(file(), mint(plane)))).by).toBe("command");
  });

  test("where all are refused, each is named", async () => {
    await expect(enrollAt(plane, sources(mint(strict), "hello"))).rejects.toMatchObject({
      code: "TOKEN_UNREADABLE",
      message: expect.stringMatching(/by the token file: .* by the credential command: /) as string,
    });
  });

  test("where there is none, the error says so", async () => {
    await expect(enrollAt(plane, sources(undefined))).rejects.toMatchObject({ code: "TOKEN_UNREADABLE" });
  });

  test("a CA that is not there is not asked again with the next credential", async () => {
    let asked = 0;
    const run: Host["run"] = async () => {
      asked += 1;
      return { code: 0, stdout: mint(plane), stderr: "" };
    };
    const gone = { ...plane, port: 1 };
    await expect(
      enrollAt(
        gone,
        sources(mint(plane), () => run({ argv: [EXEC] })),
      ),
    ).rejects.toMatchObject({
      code: "ISTIOD_UNREACHABLE",
    });
    expect(asked).toBe(0);
  });

  test("the status knows which one is next", async () => {
    const { svid } = await enrollAt(plane, sources(mint(plane)));
    const next = (
      file: string | undefined,
      exec: string | undefined,
      held: Svid | undefined,
      refused = false,
    ) => nextCredential(sources(file, exec), held, plane.rootCert, refused);
    expect(await next(undefined, undefined, svid)).toBe("certificate");
    expect(await next(mint(plane), "x", svid, true)).toBe("token");
    expect(await next(mint(plane, -60), "x", svid, true)).toBe("command");
    expect(await next(mint(plane, -60), undefined, svid, true)).toBe("none");
    expect(await next("hello", undefined, undefined)).toBe("none");
  });
});
