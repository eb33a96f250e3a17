"""The processes of the network tests (UID stands for UID[:GID]): `serve UID JSON`, `dial UID ADDRESS PORT`, `ask UID ADDRESS PORT`, `retry UID ADDRESS PORT`, `hold UID ADDRESS PORT`, `loop UID ADDRESS PORT`."""
import contextlib
import ctypes
import json
import os
import select
import socket
import sys
import threading
import time


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
# What istiod has Envoy put on connections in a client's name.
TPROXY_MARK = 0x539


def transparent(sock):
    six = sock.family == socket.AF_INET6
    sock.setsockopt(
        socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP, IPV6_TRANSPARENT if six else IP_TRANSPARENT, 1
    )


def dialled(connection):
    """Where the client wanted to, also when the address was changed on the way (SO_ORIGINAL_DST)."""
    if connection.family == socket.AF_INET:
        raw = connection.getsockopt(socket.IPPROTO_IP, 80, 16)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big")
    raw = connection.getsockopt(socket.IPPROTO_IPV6, 80, 28)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4], "big")


def relay(connection, name):
    """Envoy's inbound listener in TPROXY mode: connects to where the client wanted to, in the client's name."""
    with connection, contextlib.suppress(OSError), socket.socket(connection.family) as upstream:
        transparent(upstream)
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, TPROXY_MARK)
        upstream.bind((connection.getpeername()[0], 0))
        upstream.settimeout(1)
        upstream.connect(dialled(connection))
        connection.sendall(name.encode() + b" " + upstream.recv(4096))


def tell(connection, name):
    """Who the client is, as an application sees it."""
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(f"{name} sees {connection.getpeername()[0]}\n".encode())


def answer(connection, name):
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(name.encode() + b"\n")
        while data := connection.recv(4096):
            connection.sendall(data)


def accept(listener, name, serving):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serving, args=(connection, name), daemon=True).start()


def reply(sock, name):
    while True:
        _, peer = sock.recvfrom(4096)
        sock.sendto(name.encode(), peer)


def beat(address, port):
    """Envoy's TCP health check: a new connection every half second."""
    while True:
        try:
            socket.create_connection((address, port), 0.4).close()
        except OSError:
            pass
        time.sleep(0.5)


def question(address, port):
    """The agent's question to itself, once a second."""
    while True:
        with socket.socket(family(address), socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.5)
            try:
                sock.sendto(b"?", (address, port))
                sock.recvfrom(4096)
            except OSError:
                pass
        time.sleep(1)


def serve(wish):
    kinds = [(answer, it) for it in wish.get("tcp", [])]
    kinds += [(relay, it) for it in wish.get("relay", [])] + [(tell, it) for it in wish.get("tell", [])]
    for serving, (address, port, name) in kinds:
        listener = socket.socket(family(address), socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in address:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if serving is relay:
            transparent(listener)
        listener.bind((address, port))
        listener.listen(512)
        threading.Thread(target=accept, args=(listener, name, serving), daemon=True).start()
    for address, port, name in wish.get("udp", []):
        sock = socket.socket(family(address), socket.SOCK_DGRAM)
        sock.bind((address, port))
        threading.Thread(target=reply, args=(sock, name), daemon=True).start()
    for key, task in (("beat", beat), ("question", question)):
        for address, port in wish.get(key, []):
            threading.Thread(target=task, args=(address, port), daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


def meet(address, port):
    try:
        with socket.create_connection((address, port), 2) as sock:
            return sock.recv(64).decode().strip() or "closed"
    except ConnectionRefusedError:
        return "refused"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return error.strerror


def dial(address, port):
    print(meet(address, port))


def loop(address, port):
    """Connections one after the other until standard input ends; how often each listener was met."""
    print("looping", flush=True)
    met = {}
    while not select.select([sys.stdin], [], [], 0)[0]:
        name = meet(address, port)
        met[name] = met.get(name, 0) + 1
    print(json.dumps(met), flush=True)


def ask(address, port):
    with socket.socket(family(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        try:
            sock.sendto(b"?", (address, port))
            print(sock.recvfrom(64)[0].decode())
        except TimeoutError:
            print("timeout")
        except OSError as error:
            print(error.strerror)


def retry(address, port):
    """One socket, two attempts five seconds apart: how the C library's resolver asks (resolv.conf(5), timeout and attempts)."""
    with socket.socket(family(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        for _ in range(2):
            sock.sendto(b"?", (address, port))
            try:
                print(sock.recvfrom(64)[0].decode())
                return
            except TimeoutError:
                pass
        print("timeout")


def hold(address, port):
    with socket.create_connection((address, port), 2) as sock:
        sock.settimeout(3)
        print(sock.recv(64).decode().strip(), flush=True)
        for line in sys.stdin:
            try:
                sock.sendall(line.encode())
                print(sock.recv(64).decode().strip() or "closed", flush=True)
            except OSError as error:
                print(type(error).__name__, flush=True)


def keep_net_raw():
    """The change of user shall not take the permitted capabilities (prctl(2), PR_SET_KEEPCAPS)."""
    ctypes.CDLL(None).prctl(8, 1, 0, 0, 0)


def only_net_raw():
    """As the unit of Envoy has it: CAP_NET_RAW and nothing else (capset(2), version 3)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    net_raw = 1 << 13
    data = (ctypes.c_uint32 * 6)(net_raw, net_raw, 0, 0, 0, 0)
    if ctypes.CDLL(None).capset(header, data) != 0:
        raise OSError("capset")


if sys.argv[1] == "serve" and (comm := json.loads(sys.argv[3]).get("comm")):
    # Before the change of user, which makes /proc/self root's.
    with open("/proc/self/comm", "w", encoding="ascii") as own_name:
        own_name.write(comm)
if sys.argv[1] == "serve" and json.loads(sys.argv[3]).get("relay"):
    keep_net_raw()
uid, _, gid = sys.argv[2].partition(":")
os.setgid(int(gid or uid))
os.setgroups([])
os.setuid(int(uid))
if sys.argv[1] == "serve" and json.loads(sys.argv[3]).get("relay"):
    only_net_raw()
if sys.argv[1] == "serve":
    serve(json.loads(sys.argv[3]))
else:
    {"dial": dial, "ask": ask, "hold": hold, "loop": loop, "retry": retry}[sys.argv[1]](sys.argv[3], int(sys.argv[4]))
