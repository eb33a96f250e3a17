import { describe, expect, test } from "vitest";
import { MACHINE, WISH as USUAL } from "../../test/fakes/capture.ts";
import { parseListeners } from "./parse.ts";
import type { CaptureWish } from "./plan/wish.ts";
import { planCapture } from "./plan.ts";
import { describePreview, type LiveMachine, parseFlows, parseNetworkMounts, preview } from "./preview.ts";

const WISH: CaptureWish = {
  ...USUAL,
  inbound: { kind: "ports", ports: [9080] },
  outbound: { cidrs: ["*"], excludeCidrs: ["10.7.0.0/16"], excludePorts: [] },
  istiod: ["10.99.0.2:15012"],
};
const PLAN = planCapture(WISH, MACHINE);

/** As `ss -tnpeH state established` of iproute2 6.1 prints it. */
const SS = `0      0            10.0.0.5:22          10.0.0.9:52100 users:(("sshd",pid=812,fd=4)) ino:22873 sk:1 cgroup:/system.slice/ssh.service <->
0      0            10.0.0.5:41000      10.96.0.10:443   users:(("app",pid=900,fd=9)) uid:1000 ino:22899 sk:2 cgroup:/x <->
0      0            10.0.0.5:41002      10.96.0.10:443   users:(("app",pid=900,fd=10)) uid:1000 ino:22900 sk:3 cgroup:/x <->
0      0            10.0.0.5:41004     203.0.113.7:5432  users:(("app",pid=900,fd=11)) uid:1000 ino:22901 sk:4 cgroup:/x <->
0      0            10.0.0.5:880          10.0.0.8:2049  ino:0 sk:5 cgroup:unreachable:1 <->
0      0            10.0.0.5:41010       10.0.0.11:636   users:(("sssd_be",pid=77,fd=20)) ino:22999 sk:6 cgroup:/x <->
0      0            10.0.0.5:41011        10.7.3.4:8080  users:(("app",pid=900,fd=12)) uid:1000 ino:23999 sk:7 cgroup:/x <->
0      0  [::ffff:10.0.0.5]:9080  [::ffff:10.0.0.77]:3333 users:(("java",pid=901,fd=12)) uid:1000 ino:24000 sk:8 cgroup:/x <->
0      0           127.0.0.1:9080        127.0.0.1:3334  users:(("java",pid=901,fd=13)) uid:1000 ino:24001 sk:9 cgroup:/x <->
`;

const LIVE: LiveMachine = {
  flows: parseFlows(SS),
  listeners: parseListeners(
    [
      'LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=811,fd=3))',
      'LISTEN 0 128 *:9080 *:* users:(("java",pid=901,fd=3))',
    ].join("\n"),
  ),
  mounts: parseNetworkMounts(
    "srv:/export /data nfs4 rw,vers=4.2,addr=10.0.0.8 0 0\n//win/share /mnt cifs rw,addr=10.0.0.12 0 0\n",
  ),
  bridges: ["docker0"],
  addresses: ["10.0.0.5", "127.0.0.1"],
};

const lines = (live: LiveMachine) =>
  preview(PLAN, live).effects.map(({ severity, what }) => `${severity} ${what}`);

describe("what the rules would do to what lives on the machine", () => {
  test("the kernel's own socket has no user, root's has 0, and a mapped address is an IPv4 one", () => {
    const [ssh, , , , nfs, , , mapped] = parseFlows(SS);
    expect(ssh).toMatchObject({ uid: 0, process: "sshd" });
    expect(nfs).toMatchObject({ uid: undefined, process: "", remote: { port: 2049 } });
    expect(mapped).toMatchObject({ local: { address: "10.0.0.5", port: 9080 } });
  });

  test("flows that change, flows that break, and neither for what is left alone", () => {
    expect(lines(LIVE)).toEqual([
      "changes 10.96.0.10:443, called by app (uid 1000), 2 connections",
      "changes 203.0.113.7:5432, called by app (uid 1000)",
      "breaks 10.0.0.8:2049, called by the kernel",
      "breaks 10.0.0.11:636, called by sssd_be (uid 0)",
      "breaks /mnt is mounted from 10.0.0.12 (cifs)",
      "changes port 9080, called by 10.0.0.77",
    ]);
  });

  test("who is left out by group or by unit is in no line, whoever else calls the same place", () => {
    const [, one, two, database] = LIVE.flows;
    if (one === undefined || two === undefined || database === undefined) throw new Error("no flows");
    const live = {
      ...LIVE,
      mounts: [],
      flows: [
        { ...one, gid: 50 },
        { ...two, gid: 51, cgroup: "system.slice/app.service" },
        { ...database, cgroup: "system.slice/app.service/worker" },
      ],
    };
    const outbound = (senders: CaptureWish["senders"]) =>
      preview(
        planCapture({ ...WISH, ...(senders === undefined ? {} : { senders }) }, MACHINE),
        live,
      ).effects.map(({ what }) => what);
    const nobody = { uids: [], gids: [] };
    const app = { unit: "app.service", path: "system.slice/app.service" };
    const [mesh, other] = [
      "10.96.0.10:443, called by app (uid 1000)",
      "203.0.113.7:5432, called by app (uid 1000)",
    ];
    const both = `${mesh}, 2 connections`;
    expect(outbound(undefined)).toEqual([both, other]);
    expect(outbound({ only: nobody, never: { uids: [], gids: [50] } })).toEqual([mesh, other]);
    expect(outbound({ only: nobody, never: { ...nobody, units: [app] } })).toEqual([mesh]);
    expect(outbound({ only: { ...nobody, units: [app] }, never: nobody })).toEqual([mesh, other]);
    expect(outbound({ only: { uids: [], gids: [51] }, never: nobody })).toEqual([mesh]);
  });

  test("what fails closed and what goes direct without Envoy is told apart", () => {
    const [mesh, other] = preview(PLAN, LIVE).effects;
    expect(mesh?.why).toContain("are refused");
    expect(other?.why).toContain("go direct");
  });

  test("every line but a taken port says which option leaves it out, and with it the line is gone", () => {
    const { effects } = preview(PLAN, LIVE);
    const cidrs = effects.flatMap(
      ({ exclude }) => /^--exclude-outbound-cidr (\S+)$/.exec(exclude)?.[1] ?? [],
    );
    expect(cidrs).toHaveLength(5);
    const excluded = planCapture(
      {
        ...WISH,
        inbound: { kind: "ports", ports: [] },
        outbound: { ...WISH.outbound, excludeCidrs: [...WISH.outbound.excludeCidrs, ...cidrs] },
      },
      MACHINE,
    );
    expect(preview(excluded, LIVE).effects).toEqual([]);
  });

  test("a port of ours that somebody else holds breaks, once for both families", () => {
    const listeners = parseListeners(
      ["0.0.0.0:15001", "[::]:15001"]
        .map((at) => `LISTEN 0 128 ${at} 0.0.0.0:* users:(("haproxy",pid=5,fd=3))`)
        .join("\n"),
    );
    expect(lines({ ...LIVE, flows: [], mounts: [], listeners })).toEqual([
      "breaks port 15001 is taken by haproxy",
    ]);
  });

  test("a port that Docker publishes breaks when it is captured", () => {
    const listeners = parseListeners(
      'LISTEN 0 128 0.0.0.0:9080 0.0.0.0:* users:(("docker-proxy",pid=5,fd=3))',
    );
    expect(lines({ ...LIVE, flows: [], mounts: [], listeners })).toEqual([
      "breaks port 9080 is published by Docker",
    ]);
  });

  test("what TPROXY takes changes like what a redirect takes", () => {
    const plan = planCapture({ ...WISH, interception: { mode: "TPROXY", routeTable: 133 } }, MACHINE);
    expect(preview(plan, LIVE)).toEqual(preview(PLAN, LIVE));
  });

  test("the screen counts both kinds and names the bridges", () => {
    const text = describePreview(preview(PLAN, LIVE));
    expect(text).toContain("9 connections; 3 kinds of them would change, 3 would break");
    expect(text).toContain("docker0");
  });
});
