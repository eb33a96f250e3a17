import { X509Certificate } from "node:crypto";
import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  arrivesAs,
  cleanNamespace,
  defineWorkload,
  istioctlBundle,
  request,
  requireRoot,
  spiffe,
  startApp,
  strictMtls,
} from "../lab/acceptance.ts";
import { Lab, type Machine, waitFor } from "../lab/lab.ts";
import { packageFile } from "./package.ts";

/** A machine that has no token of its own, and one whose every credential has ended. */
const EXEC = "/usr/local/lib/print-token";
let lab: Lab;
let details: Machine;
let reviews: Machine;

const mint = (expiresInSec = 3600): string =>
  lab.signToken({ namespace: "default", serviceAccount: "details", expiresInSec });

/** A program that prints a token of the lab's own signing, and writes down who asked. */
function putProgram(machine: Machine, token: string): void {
  machine.putFile("/usr/local/lib/the-token", token);
  machine.putFile(EXEC, "#!/bin/sh\nid -un >&2\ncat /usr/local/lib/the-token\n", 0o755);
}

async function status(machine: Machine): Promise<{
  code: number;
  text: string;
  identity?: { nextCredential: string };
  conditions: { id: string; next: string }[];
}> {
  const { code, stdout } = await machine.exec("vmmesh status --output json", { allowFail: true });
  return { code, text: stdout, ...(JSON.parse(stdout) as { conditions: { id: string; next: string }[] }) };
}

beforeAll(async () => {
  requireRoot();
  lab = await Lab.open();
  await cleanNamespace(lab);
  await Promise.all(["details", "reviews"].map((name) => lab.removeVm(name)));
  const deb = packageFile();
  details = await lab.vm("details", { deb });
  reviews = await lab.vm("reviews", { deb });
  await strictMtls(lab);
  for (const machine of [details, reviews]) {
    await defineWorkload(lab, machine.name, 9080);
    await startApp(machine, 9080);
    cpSync(await istioctlBundle(lab, machine.name), `${machine.root}/root/bundle`, { recursive: true });
  }
  await reviews.exec("vmmesh join --bundle /root/bundle");
  console.log("versions:", JSON.stringify(await lab.versions()));
}, 300_000);

afterAll(async () => {
  await Promise.all(["details", "reviews"].map((name) => lab?.removeVm(name)));
});

describe("an identity by a command, to its end and back", () => {
  test("a program that gives no token ends the join in its own words, and leaves nothing", async () => {
    rmSync(`${details.root}/root/bundle/istio-token`);
    details.putFile(EXEC, "#!/bin/sh\necho 'this node is not attested' >&2\nexit 4\n", 0o755);
    const { code, stderr } = await details.exec(
      `vmmesh join --bundle /root/bundle --credential-exec ${EXEC}`,
      {
        allowFail: true,
      },
    );
    expect(code).toBe(3);
    expect(stderr).toContain(`the credential command ${EXEC} gave no token: it ended with status 4`);
    expect(stderr).toContain("this node is not attested");
    expect((await details.exec("ls -d /etc/vmmesh", { allowFail: true })).stdout).toBe("");
  });

  test("without any token in the bundle, the program's is enough; it runs as the agent's user", async () => {
    putProgram(details, mint());
    details.putFile(
      EXEC,
      `${readFileSync(`${details.root}${EXEC}`, "utf8")}id -un > /var/lib/vmmesh/asked-by\n`,
      0o755,
    );
    const env = `${details.root}/root/bundle/cluster.env`;
    // A short life, so that its end comes while we watch.
    writeFileSync(env, `${readFileSync(env, "utf8")}SECRET_TTL='60s'\n`);
    await details.exec(`vmmesh join --bundle /root/bundle --credential-exec ${EXEC}`);
    expect((await details.exec("cat /var/lib/vmmesh/asked-by")).stdout.trim()).toBe("vmmesh");
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
    await arrivesAs(details, "http://reviews/", spiffe("details"));
    expect(await status(details)).toMatchObject({ code: 0, identity: { nextCredential: "certificate" } });
  });

  test("token and certificate both ended is one clear state, and the command that it names heals it", async () => {
    await details.exec("systemctl stop vmmesh-agent");
    putProgram(details, mint(-600));
    details.putFile("/var/lib/vmmesh/token", mint(-600));
    await details.exec("chown vmmesh: /var/lib/vmmesh/token");
    const leaf = new X509Certificate(
      (await details.exec("cat /var/lib/vmmesh/identity/current/chain.pem")).stdout,
    );
    await waitFor(
      "the certificate's end",
      async () => (leaf.validToDate < new Date() ? true : undefined),
      70_000,
    );
    await details.exec("systemctl start vmmesh-agent");
    const ended = await waitFor("the end state", async () => {
      const now = await status(details).catch(() => undefined);
      return now?.conditions.some(({ id }) => id === "identity-not-renewed") ? now : undefined;
    });
    expect(ended.code).toBe(1);
    const condition = ended.conditions.find(({ id }) => id === "identity-not-renewed");
    expect(condition).toMatchObject({
      severity: "error",
      message: expect.stringMatching(/token expired .* mutual TLS fails/) as string,
      next: expect.stringContaining("`vmmesh join --bundle DIR`") as string,
    });
    expect((await request(reviews, "http://details/")).status).not.toBe(200);

    details.putFile("/root/bundle/istio-token", mint());
    const { stdout } = await details.exec("vmmesh join --bundle /root/bundle");
    expect(stdout).toContain(`renewed: this machine is ${spiffe("details")}`);
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
    const { code, conditions } = await status(details);
    expect(code).toBe(0);
    expect(conditions.filter(({ id }) => id.startsWith("identity-"))).toEqual([]);
    // What the operator wished at the first join is still there.
    expect((await details.exec("cat /etc/vmmesh/sidecar.env")).stdout).toContain(EXEC);
    const again = await details.exec("vmmesh join --bundle /root/bundle", { allowFail: true });
    expect(again.stderr).toContain("ALREADY_JOINED");
  });

  test("docs/credentials.md: a right to ask for one account's tokens, and SPIRE's plugin, are enough to join", async () => {
    const page = readFileSync(new URL("../../docs/credentials.md", import.meta.url), "utf8");
    const blocks = [...page.matchAll(/```(\w+)\n(.*?)```/gs)].map(([, kind, text = ""]) => ({ kind, text }));
    const one = (kind: string, words: string): string => {
      const found = blocks.filter((block) => block.kind === kind && block.text.includes(words));
      if (found.length !== 1) throw new Error(`the page has ${found.length} blocks of ${kind} with ${words}`);
      return found[0]?.text ?? "";
    };
    // The page's user is the one that the lab's API server knows by the token that "spire-agent" gives.
    await lab.apply(one("yaml", "serviceaccounts/token").replace("name: vm-details}]", "name: nobody}]"));
    details.putFile("/etc/vmmesh-renew/token", one("sh", "vmmesh token create"), 0o755);
    details.putFile("/etc/vmmesh-renew/spire", one("sh", "spire-agent api fetch jwt"), 0o755);
    details.putFile(
      "/usr/local/bin/spire-agent",
      `#!/bin/sh\ncat <<'END'\n[{"svids":[{"hint":"","spiffe_id":"spiffe://example.org/vm","svid":"nobody-token"}]},{"bundles":{}}]\nEND\n`,
      0o755,
    );
    const config = JSON.parse(lab.kubeconfigText("nobody")) as { users: { user: unknown }[] };
    for (const each of config.users) {
      each.user = {
        exec: {
          apiVersion: "client.authentication.k8s.io/v1",
          command: "/etc/vmmesh-renew/spire",
          interactiveMode: "Never",
        },
      };
    }
    details.putFile("/etc/vmmesh-renew/kubeconfig", JSON.stringify(config));
    await details.exec(
      "install -o root -g vmmesh -m 0640 /etc/vmmesh-renew/kubeconfig /etc/vmmesh-renew/k && mv /etc/vmmesh-renew/k /etc/vmmesh-renew/kubeconfig",
    );
    await details.exec("vmmesh leave --now");
    rmSync(`${details.root}/root/bundle/istio-token`, { force: true });

    await details.exec("vmmesh join --bundle /root/bundle --credential-exec /etc/vmmesh-renew/token");
    await arrivesAs(details, "http://reviews/", spiffe("details"));
    // In the agent's own sandbox, too: without a certificate it has nothing but the program.
    await details.exec(
      "systemctl stop vmmesh-agent; rm -rf /var/lib/vmmesh/identity; systemctl start vmmesh-agent",
    );
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
    // Envoy goes on with the certificate that it has: the request above may be answered before there is a new one.
    await waitFor("a certificate by the program", async () => {
      const { stdout } = await details.exec("journalctl -u vmmesh-agent --no-pager -o json");
      // A field of its own where the journal's addon was built, a word of the line elsewhere.
      return /"VMMESH_BY":"command"|by=command/.test(stdout) ? true : undefined;
    });

    const others = await details.exec(
      "runuser -u vmmesh -- vmmesh token create --kubeconfig /etc/vmmesh-renew/kubeconfig --namespace default --service-account reviews",
      { allowFail: true },
    );
    expect(others).toMatchObject({ code: 5, stdout: "" });
    expect(others.stderr).toContain("KUBE_FORBIDDEN");
    expect(others.stderr).not.toContain("nobody-token");
    await details.exec("vmmesh leave --now");
  });

  test("a one-time bundle: its Secret deleted, istiod refuses the token; a machine that has joined stays", async () => {
    reviews.putFile("/root/.kube/config", lab.kubeconfigText("admin"), 0o600);
    const create = async (): Promise<() => Promise<unknown>> => {
      const { stdout } = await reviews.exec(
        "rm -rf /root/once && vmmesh bundle create --one-time --namespace default --workload-group details --istiod-address 10.99.0.2 -o /root/once --output json",
      );
      rmSync(`${details.root}/root/once`, { recursive: true, force: true });
      cpSync(`${reviews.root}/root/once`, `${details.root}/root/once`, { recursive: true });
      const [kubectl, ...args] = (JSON.parse(stdout) as { revoke: string }).revoke.split(" ");
      expect(kubectl).toBe("kubectl");
      return () => lab.kubectl(args);
    };
    await (await create())();
    const { code, stderr } = await details.exec("vmmesh join --bundle /root/once", { allowFail: true });
    expect({ code, stderr }).toMatchObject({
      code: 4,
      stderr: expect.stringContaining("IDENTITY_REFUSED") as string,
    });

    const revoke = await create();
    await details.exec("vmmesh join --bundle /root/once");
    await revoke();
    await details.exec("systemctl restart vmmesh-agent");
    await arrivesAs(reviews, "http://details/", spiffe("reviews"));
    expect(await status(details)).toMatchObject({ code: 0, identity: { nextCredential: "certificate" } });
  });
});
