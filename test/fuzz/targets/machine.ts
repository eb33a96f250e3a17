import { coversCidr, ipFamily, parseCidr, parseHostPort } from "../../../agent/core/net.ts";
import { parseSpiffe } from "../../../agent/core/spiffe.ts";
import { parseDuration } from "../../../agent/core/time.ts";
import { parseResolvConf } from "../../../agent/dns/resolvConf.ts";
import { parseEnvoyVersion } from "../../../agent/envoy/version.ts";
import { parseFlows, parseNetworkMounts } from "../../../agent/iptables/preview.ts";
import { parseLive } from "../../../agent/iptables/trace/live.ts";
import { parseSpan, spanText } from "../../../agent/iptables/trace/packet.ts";
import { slicePath } from "../../../agent/platform/units.ts";
import type { Target } from "../target.ts";

export const target: Target = {
  about:
    "what the machine says of itself is read whatever it says; addresses are what they are in any spelling",
  covers: /\/agent\//,
  seeds: [
    "# x\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nsearch a.b c.\noptions ndots:5\n",
    'ESTAB 0 0 10.0.0.1:22 10.0.0.2:4 users:(("sshd",pid=1,fd=3)) uid:1000 ino:7\n0 0 [::ffff:10.0.0.1]:22 [::1]:4 ino:0 sk:1\n',
    "srv:/x /mnt nfs4 rw,addr=10.0.0.9 0 0\n//h/s /m\\040n cifs rw 0 0\n",
    "trace id 1 ip nat OUTPUT packet: oif x ip daddr 10.0.0.1 ip ttl 64 tcp dport 80 tcp flags == syn\ntrace id 1 ip nat OUTPUT rule counter packets 1 bytes 2 (verdict drop)\n",
    "envoy  version: 0123/1.40.0/Clean/RELEASE/BoringSSL\n",
    "10.0.0.0/8",
    "::ffff:1.2.3.4/96",
    "[::1]:15012",
    "1h30m5.5s",
    "spiffe://td/ns/a/sa/b",
    "10.0.0.1-10.0.0.9",
    "a-b-c.slice",
  ],
  words: ["nameserver ", "::", "%", "/128", "addr=", "trace id ", "1.2.3.4", "users:((", "uid:"],
  run(bytes) {
    const text = Buffer.from(bytes).toString();
    for (const server of parseResolvConf(text).servers)
      if (ipFamily(server.split("%")[0] ?? "") === undefined) throw new Error(`${server} is no server`);
    for (const { local, remote } of parseFlows(text))
      if (!Number.isInteger(local.port) || !Number.isInteger(remote.port))
        throw new Error("a port is no number");
    parseNetworkMounts(text);
    parseLive(text, text, "tcp", { ends: [] });
    parseEnvoyVersion(text);
    parseSpiffe(text);
    // systemd has no longer names (UNIT_NAME_MAX), and a path grows with the square of its name by what it is.
    slicePath(text.slice(0, 255));
    const span = parseSpan(text);
    if (span !== undefined) spanText(span);
    const cidr = parseCidr(text);
    if (cidr !== undefined && !coversCidr(cidr, cidr)) throw new Error("a prefix is not within itself");
    const place = parseHostPort(text);
    if (place !== undefined && !(place.port >= 1 && place.port <= 65_535)) throw new Error("no port");
    if (Number.isNaN(parseDuration(text) ?? 0)) throw new Error("a duration of no length");
  },
};
