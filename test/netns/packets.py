"""Sends first packets of connections and says what became of each, seen from outside: `packets.py MACHINE WORLD CGROUP PROXY EVERYWHERE ONE ADDRESS…`.

One JSON list a line on standard input, one JSON list a line on standard output. A packet is known by its source port, an echo
request by its identifier. CGROUP is a directory of cgroup2 for those that ask for it; PROXY, EVERYWHERE and ONE are ports on
which the machine listens: transparently, on every address, on ADDRESS alone.
"""
import ctypes
import errno
import json
import os
import select
import socket
import struct
import sys
import time

CLONE_NEWNET = 0x40000000
IP_FREEBIND, IPV6_FREEBIND = 15, 78
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
PROTOCOLS = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp"}
ECHO = {1: 8, 58: 128}
libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace):
    with open(f"/run/netns/{namespace}", encoding="ascii") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def tcp_syn(segment):
    return len(segment) > 13 and segment[13] & 0x12 == 0x02


def parse(packet):
    """protocol, source port, destination of an IP packet; None for what is not a first packet."""
    if packet[0] >> 4 == 4:
        protocol, rest = packet[9], packet[(packet[0] & 15) * 4:]
        destination = socket.inet_ntop(socket.AF_INET, packet[16:20])
    else:
        protocol, rest = packet[6], packet[40:]
        destination = f"[{socket.inet_ntop(socket.AF_INET6, packet[24:40])}]"
    return first(protocol, rest, destination)


def first(protocol, rest, destination):
    if protocol not in PROTOCOLS or len(rest) < 8 or (protocol == 6 and not tcp_syn(rest)):
        return None
    if protocol in ECHO:
        return ("icmp", struct.unpack("!H", rest[4:6])[0], f"{destination}:0") if rest[0] == ECHO[protocol] else None
    source, port = struct.unpack("!HH", rest[:4])
    return PROTOCOLS[protocol], source, f"{destination}:{port}"


def refusal(packet):
    """protocol and source port of the packet that this TCP reset or ICMP error answers; None for anything else."""
    four = packet[0] >> 4 == 4
    protocol, rest = (packet[9], packet[(packet[0] & 15) * 4:]) if four else (packet[6], packet[40:])
    if protocol == 6 and len(rest) > 13 and rest[13] & 4:
        return "tcp", struct.unpack("!H", rest[2:4])[0]
    if (protocol, rest[:1]) in ((1, b"\x03"), (58, b"\x01")):
        inner = rest[8:]
        kind, ports = (inner[9], inner[(inner[0] & 15) * 4:]) if four else (inner[6], inner[40:])
        if kind in ECHO and len(ports) >= 6:
            return "icmp", struct.unpack("!H", ports[4:6])[0]
        if kind in PROTOCOLS and len(ports) >= 2:
            return PROTOCOLS[kind], struct.unpack("!H", ports[:2])[0]
    return None


def listen(kind, address, port, transparent):
    six = ":" in address
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if transparent:
        sock.setsockopt(*((socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1) if six else (socket.IPPROTO_IP, IP_TRANSPARENT, 1)))
    sock.bind((address, port))
    if kind == socket.SOCK_STREAM:
        sock.listen(128)
    return sock


class Observer:
    def __init__(self, machine, world, cgroup, listening, addresses):
        self.namespaces = {"machine": machine, "world": world}
        self.cgroup = cgroup
        with open("/proc/self/cgroup", encoding="ascii") as file:
            own = next(line[3:].strip() for line in file if line.startswith("0::"))
        self.home = cgroup[: cgroup.index("/vmmesh-proof")] + own
        enter(machine)
        proxy, everywhere, one = listening
        self.listeners = [
            listen(kind, address, port, port == proxy)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
            for address, port in [(any_one, port) for any_one in ("0.0.0.0", "::") for port in (proxy, everywhere)]
            + [(address, one) for address in addresses]
        ]
        # Raw sockets are served after INPUT: what they see was delivered.
        self.inside = []
        for protocol in PROTOCOLS:
            if protocol != 58:
                self.inside.append((socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol), protocol))
            if protocol != 1:
                six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, protocol)
                six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                self.inside.append((six, protocol))
        # Refusals, before the machine's own checks of addresses can lose them again.
        self.refusals = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
        self.refused = set()
        enter(world)
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
        self.wire.bind(("eth0", 0x0003))
        for sock in [self.wire, self.refusals, *(each for each, _ in self.inside)]:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE

    def drain(self, met):
        for sock, protocol in self.inside:
            while True:
                try:
                    data, extra, _, _ = sock.recvmsg(2048, 256)
                except BlockingIOError:
                    break
                if sock.family == socket.AF_INET:
                    found = parse(data)
                else:
                    found = None
                    to = next(d[:16] for _, kind, d in extra if kind == socket.IPV6_PKTINFO)
                    found = first(protocol, data, f"[{socket.inet_ntop(socket.AF_INET6, to)}]")
                if found:
                    met.setdefault(found[:2], f"machine {found[2]}")
        while True:
            try:
                data, (_, kind, *_) = self.refusals.recvfrom(2048)
            except BlockingIOError:
                break
            if kind in (0x0800, 0x86DD) and (found := refusal(data)):
                self.refused.add(found)
        while True:
            try:
                data, (_, kind, direction, *_) = self.wire.recvfrom(2048)
            except BlockingIOError:
                break
            # 4 is PACKET_OUTGOING: what this side sent itself.
            if direction != 4 and kind in (0x0800, 0x86DD) and (found := parse(data)):
                met.setdefault(found[:2], f"world {found[2]}")

    def join(self, directory):
        with open(f"{directory}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(os.getpid()))

    def make(self, packet):
        """A socket belongs to the user and to the cgroup in which it was made."""
        family = socket.AF_INET6 if ":" in packet["to"] else socket.AF_INET
        kind = socket.SOCK_STREAM if packet["protocol"] == "tcp" else socket.SOCK_DGRAM
        echo = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
        enter(self.namespaces[packet["at"]])
        os.seteuid(packet["uid"])
        try:
            return socket.socket(family, kind, echo if packet["protocol"] == "icmp" else 0)
        finally:
            os.seteuid(0)

    def send(self, sock, packet):
        family, kind = sock.family, sock.type & 0xF
        enter(self.namespaces[packet["at"]])
        sock.setblocking(False)
        if packet["at"] == "world":
            # Out by the wire, although this side answers for every address itself.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        try:
            sock.bind((packet.get("from", ""), packet["fromPort"]))
            code = sock.connect_ex((packet["to"], packet["port"]))
            if kind == socket.SOCK_DGRAM and code == 0:
                # The kernel fills in identifier and checksum of an echo request.
                sock.send(bytes([ECHO[1 if family == socket.AF_INET else 58], *[0] * 15]) if packet["protocol"] == "icmp" else b"?")
        except OSError as error:
            code = error.errno
        return code

    def run(self, packets):
        met, open_sockets, results = {}, {}, []
        self.refused.clear()
        made = {}
        # Moving between cgroups takes its time, so all of one are made together.
        for directory in (self.cgroup, self.home):
            self.join(directory)
            inside = directory == self.cgroup
            made.update({p["fromPort"]: self.make(p) for p in packets if p["inCgroup"] == inside})
        for packet in packets:
            sock = made[packet["fromPort"]]
            open_sockets[packet["fromPort"]] = sock, self.send(sock, packet)
            self.drain(met)
        # Everything is on this machine: what has not come after a quarter of a second is not coming.
        end = time.monotonic() + 0.25
        while (left := end - time.monotonic()) > 0:
            select.select([self.wire, *(each for each, _ in self.inside)], [], [], left)
            self.drain(met)
        for packet in packets:
            sock, code = open_sockets[packet["fromPort"]]
            # A datagram that is refused in OUTPUT is reported twice: by send() as EPERM, then by the ICMP error.
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or (0 if code == errno.EINPROGRESS else code)
            what = met.get((packet["protocol"], packet["fromPort"]))
            refused = (packet["protocol"], packet["fromPort"]) in self.refused or code in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES)
            results.append({"met": what or ("refused" if refused else "nothing"), "errno": errno.errorcode.get(code, "")})
            sock.close()
        return results


observer = Observer(*sys.argv[1:4], [int(port) for port in sys.argv[4:7]], sys.argv[7:])
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(observer.run(json.loads(line))), flush=True)
