import { expect, test } from "vitest";
import { MemoryFiles } from "../../../test/fakes/files.ts";
import { VmmeshError } from "../../core/errors.ts";
import type { Surroundings } from "./evidence.ts";
import { readSurroundings } from "./surroundings.ts";

/** bpftool 7.1.0 of Debian 12 on Linux 6.18, three programs attached under Cilium's names; the cgroup renamed. */
const BPFTOOL = `CgroupPath
ID       AttachType      AttachFlags     Name           
/sys/fs/cgroup/unified/kubepods
    97       cgroup_inet4_connect multi           cil_sock4_conne                
    98       cgroup_inet6_connect multi           cil_sock6_conne                
    99       cgroup_udp4_sendmsg multi           cil_sock4_sendm                
`;
/** systemd 252: one that is off, one that is not installed, one that runs. */
const SYSTEMCTL = `Id=ssh.service
After=-.mount network.target basic.target sysinit.target system.slice auditd.service systemd-journald.socket
ActiveState=inactive
UnitFileState=disabled

Id=kube-proxy.service
After=
ActiveState=inactive
UnitFileState=

Id=systemd-journald.service
After=systemd-journald.socket syslog.socket -.mount
ActiveState=active
UnitFileState=static
`;
/** systemd 252, two runs: lines of PID 1 carry no invocation, a message that is no UTF-8 comes as bytes. */
const JOURNALCTL = `{"__REALTIME_TIMESTAMP":"1795418982194420","_BOOT_ID":"dfc6acbe10634d529c07607a18f0a254","MESSAGE":"Started vmmesh-rules.service - /usr/bin/sh -c echo repaired: one; echo repaired: two; echo other.","__CURSOR":"s=443fb62a56db47aab14902dd189c484c;i=2b"}
{"__REALTIME_TIMESTAMP":"1795418982194801","_SYSTEMD_INVOCATION_ID":"4ef817393de14807845b4c525bff8cf8","_BOOT_ID":"dfc6acbe10634d529c07607a18f0a254","MESSAGE":"repaired: one","__CURSOR":"s=443fb62a56db47aab14902dd189c484c;i=2c"}
{"__REALTIME_TIMESTAMP":"1795418982194801","_SYSTEMD_INVOCATION_ID":"4ef817393de14807845b4c525bff8cf8","_BOOT_ID":"dfc6acbe10634d529c07607a18f0a254","MESSAGE":"repaired: two","__CURSOR":"s=443fb62a56db47aab14902dd189c484c;i=2d"}
{"__REALTIME_TIMESTAMP":"1795418982194801","_SYSTEMD_INVOCATION_ID":"4ef817393de14807845b4c525bff8cf8","_BOOT_ID":"dfc6acbe10634d529c07607a18f0a254","MESSAGE":"other","__CURSOR":"s=443fb62a56db47aab14902dd189c484c;i=2e"}
{"__REALTIME_TIMESTAMP":"1795418982228570","_SYSTEMD_INVOCATION_ID":"b85dbc2fa3874691884de053fcb266fb","_BOOT_ID":"dfc6acbe10634d529c07607a18f0a254","MESSAGE":[114,101,112,97,105,114,101,100,58,32,98,255,100],"__CURSOR":"s=443fb62a56db47aab14902dd189c484c;i=31"}
{"__REALTIME_TIMESTAMP":"1795418982232166","_SYSTEMD_INVOCATION_ID":"b85dbc2fa3874691884de053fcb266fb","_BOOT_ID":"dfc6acbe10634d529c07607a18f0a254","MESSAGE":"repaired: three","__CURSOR":"s=443fb62a56db47aab14902dd189c484c;i=32"}
`;
/** conntrack 1.4.7, and the kernel's own file with a connection that has ended. */
const CONNTRACK = `tcp      6 431999 ESTABLISHED src=127.0.0.1 dst=127.0.0.1 sport=42354 dport=8080 src=127.0.0.1 dst=127.0.0.1 sport=8080 dport=42354 [ASSURED] mark=0 use=1
`;
const NF_CONNTRACK = `ipv4     2 tcp      6 432000 ESTABLISHED src=127.0.0.1 dst=127.0.0.1 sport=48332 dport=8080 src=127.0.0.1 dst=127.0.0.1 sport=8080 dport=48332 [ASSURED] mark=0 zone=0 use=2
ipv4     2 tcp      6 120 TIME_WAIT src=127.0.0.1 dst=127.0.0.1 sport=48316 dport=8080 src=127.0.0.1 dst=127.0.0.1 sport=8080 dport=48316 [ASSURED] mark=0 zone=0 use=2
`;

/** A machine that has these programs and files alone. */
function read(programs: Readonly<Record<string, string>>, files: Readonly<Record<string, string>> = {}) {
  return readSurroundings({
    files: new MemoryFiles(files),
    clock: {
      now: () => new Date(0),
      monotonicMs: () => 0,
      sleep: async () => undefined,
    },
    async run({ argv: [program] }) {
      const stdout = programs[program];
      if (stdout === undefined) throw new VmmeshError("COMMAND_MISSING", `${program} is not installed`);
      return { code: 0, stdout, stderr: "" };
    },
  });
}

const CASES: readonly {
  name: string;
  programs?: Readonly<Record<string, string>>;
  files?: Readonly<Record<string, string>>;
  want: Partial<Surroundings>;
}[] = [
  {
    name: "bpftool: programs on connect(2) of either family, with their cgroup; those on sendmsg are none",
    programs: { bpftool: BPFTOOL },
    want: {
      socketPrograms: [
        "/sys/fs/cgroup/unified/kubepods: 97 cgroup_inet4_connect multi cil_sock4_conne",
        "/sys/fs/cgroup/unified/kubepods: 98 cgroup_inet6_connect multi cil_sock6_conne",
      ],
    },
  },
  {
    name: "bpftool where nothing is attached",
    programs: { bpftool: BPFTOOL.split("\n").slice(0, 2).join("\n") },
    want: { socketPrograms: [] },
  },
  {
    name: "systemctl: a unit that is not installed is neither active nor enabled",
    programs: { systemctl: SYSTEMCTL },
    want: {
      units: [
        {
          id: "ssh.service",
          active: false,
          enabled: false,
          after: expect.arrayContaining(["network.target", "systemd-journald.socket"]),
        },
        { id: "kube-proxy.service", active: false, enabled: false, after: [] },
        {
          id: "systemd-journald.service",
          active: true,
          enabled: false,
          after: ["systemd-journald.socket", "syslog.socket", "-.mount"],
        },
      ],
    },
  },
  {
    name: "journalctl: repairs by run; what systemd says of the unit, and bytes, are none",
    programs: { journalctl: JOURNALCTL },
    want: { repairs: [["one", "two"], ["three"]] },
  },
  {
    name: "conntrack, where the kernel has no file of its own",
    programs: { conntrack: CONNTRACK },
    want: { flows: CONNTRACK.trim().split("\n") },
  },
  {
    name: "the kernel's file, of which only what is established counts",
    programs: { conntrack: "" },
    files: { "/proc/net/nf_conntrack": NF_CONNTRACK },
    want: { flows: NF_CONNTRACK.trim().split("\n").slice(0, 1) },
  },
  {
    name: "none of these programs",
    want: { socketPrograms: [], units: [], repairs: [], flows: [] },
  },
];

test.each(CASES)("$name", async ({ programs = {}, files = {}, want }) => {
  expect(await read(programs, files)).toMatchObject(want);
});
