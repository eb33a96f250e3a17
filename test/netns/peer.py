"""The processes of the network tests: `serve UID JSON`, `dial UID ADDRESS PORT`, `ask UID ADDRESS PORT`, `retry UID ADDRESS PORT`, `hold UID ADDRESS PORT`."""
import contextlib
import json
import os
import socket
import sys
import threading
import time


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def answer(connection, name):
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(name.encode() + b"\n")
        while data := connection.recv(4096):
            connection.sendall(data)


def accept(listener, name):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, name), daemon=True).start()


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
    for address, port, name in wish.get("tcp", []):
        listener = socket.socket(family(address), socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in address:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(512)
        threading.Thread(target=accept, args=(listener, name), daemon=True).start()
    for address, port, name in wish.get("udp", []):
        sock = socket.socket(family(address), socket.SOCK_DGRAM)
        sock.bind((address, port))
        threading.Thread(target=reply, args=(sock, name), daemon=True).start()
    for key, task in (("beat", beat), ("question", question)):
        for address, port in wish.get(key, []):
            threading.Thread(target=task, args=(address, port), daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


def dial(address, port):
    try:
        with socket.create_connection((address, port), 2) as sock:
            print(sock.recv(64).decode().strip() or "closed")
    except ConnectionRefusedError:
        print("refused")
    except ConnectionResetError:
        print("reset")
    except TimeoutError:
        print("timeout")
    except OSError as error:
        print(error.strerror)


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


if sys.argv[1] == "serve" and (comm := json.loads(sys.argv[3]).get("comm")):
    # Before the change of user, which makes /proc/self root's.
    with open("/proc/self/comm", "w", encoding="ascii") as own_name:
        own_name.write(comm)
os.setgid(int(sys.argv[2]))
os.setgroups([])
os.setuid(int(sys.argv[2]))
if sys.argv[1] == "serve":
    serve(json.loads(sys.argv[3]))
else:
    {"dial": dial, "ask": ask, "hold": hold, "retry": retry}[sys.argv[1]](sys.argv[3], int(sys.argv[4]))
