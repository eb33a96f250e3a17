import { VmmeshError } from "../../../agent/core/errors.ts";
import { loadKubeconfig } from "../../../agent/kube/kubeconfig.ts";
import { MemoryFiles } from "../../fakes/files.ts";
import type { Target } from "../target.ts";

const CA = Buffer.from("-----BEGIN CERTIFICATE-----\n").toString("base64");
const context = "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u, namespace: n}}]\n";

/** The file, and any that it names; a plugin prints the same text. */
class OneFile extends MemoryFiles {
  readonly #text: string;

  constructor(text: string) {
    super();
    this.#text = text;
  }

  override readText(): Promise<string> {
    return Promise.resolve(this.#text);
  }
}

export const target: Target = {
  about:
    "a kubeconfig is refused by name, or leads to a server over a connection that shows nobody its credential",
  covers: /\/agent\/(kube|mesh)\//,
  seeds: [
    `${context}clusters: [{name: k, cluster: {server: "https://10.0.0.1:6443", certificate-authority-data: ${CA}}}]\nusers: [{name: u, user: {token: t, as: me, as-groups: [a]}}]\n`,
    `${context}clusters:\n- name: k\n  cluster:\n    server: http://localhost:80/p/\n    proxy-url: http://p\n    tls-server-name: x\nusers:\n- name: u\n  user:\n    exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, args: [a], env: [{name: A, value: b}], provideClusterInfo: true}\n`,
    `${context}clusters: [{name: k, cluster: {server: "https://h", insecure-skip-tls-verify: true}}]\nusers: [{name: u, user: {client-certificate: a, client-key: b, tokenFile: /k}}]\n`,
    `{"status":{"token":"t"},"current-context":"c"}`,
  ],
  words: ["exec:", "auth-provider:", "tokenFile:", "toString", "__proto__", "null", "[]", "{}", "http://"],
  async run(bytes) {
    const text = Buffer.from(bytes).toString();
    const host = { files: new OneFile(text), run: async () => ({ code: 0, stdout: text, stderr: "" }) };
    try {
      const access = await loadKubeconfig(host, { path: "/k", env: {}, home: "/root", uid: 0 });
      const { protocol, hostname } = new URL(access.server);
      const loopback = ["localhost", "127.0.0.1", "[::1]"].includes(hostname);
      if (!access.verify || (protocol !== "https:" && !loopback))
        throw new Error(`it would speak to ${access.server}`);
    } catch (thrown) {
      if (!(thrown instanceof VmmeshError && thrown.code === "KUBECONFIG_MALFORMED")) throw thrown;
    }
  },
};
