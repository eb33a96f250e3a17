"""Where packets end up in this network namespace: `packets.py PLAN`, with PLAN = {"listen": [[address, port], …], "dial": [[uid, protocol, address, port], …], "outside": namespace, "inbound": [[protocol, address, port], …]} as JSON; what is inbound is dialled from the namespace outside. Prints one JSON list of outcomes, `PORT from CLIENT` of who answered."""
import concurrent.futures
import ctypes
import json
import os
import socket
import sys
import threading

TIMEOUT = 0.4
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
ISTIO_MARK = 1337


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def transparent(sock):
    """TPROXY hands over to none other, and none other may speak for a client."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def pass_on(connection, client):
    """What Envoy does with what TPROXY gave it: to where it was sent, in the client's name, with Istio's mark."""
    with socket.socket(connection.family, socket.SOCK_STREAM) as sock:
        transparent(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ISTIO_MARK)
        sock.settimeout(TIMEOUT / 2)
        try:
            sock.bind((client, 0))
            sock.connect(connection.getsockname()[:2])
            return sock.recv(64).decode()
        except OSError as error:
            return "nothing" if isinstance(error, TimeoutError) else error.strerror or "error"


def listen(address, port):
    """Whoever gets here is told the port that answered, and who it takes the caller for."""
    tcp = socket.socket(family(address), socket.SOCK_STREAM)
    udp = socket.socket(family(address), socket.SOCK_DGRAM)
    for sock in (tcp, udp):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        transparent(sock)
        sock.bind((address, port))
    tcp.listen(512)

    def answer(connection, client):
        with connection:
            said = f"{port} from {client}"
            # TPROXY leaves the address that was called on the socket, REDIRECT does not.
            if connection.getsockname()[1] != port:
                said += f", {pass_on(connection, client)}"
            connection.sendall(said.encode())

    def accept():
        while True:
            connection, peer = tcp.accept()
            threading.Thread(target=answer, args=(connection, peer[0]), daemon=True).start()

    def reply():
        while True:
            _, peer = udp.recvfrom(64)
            udp.sendto(f"{port} from {peer[0]}".encode(), peer)

    for task in (accept, reply):
        threading.Thread(target=task, daemon=True).start()


def dial(uid, protocol, address, port, namespace=None):
    """In a child of its own, because user and namespace belong to a process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if namespace is not None:
            with open(f"/run/netns/{namespace}") as file:
                if libc.setns(file.fileno(), 0) != 0:
                    os._exit(1)
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        os.write(writer, outcome(protocol, address, port).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def outcome(protocol, address, port):
    try:
        if protocol == "udp":
            with socket.socket(family(address), socket.SOCK_DGRAM) as sock:
                sock.settimeout(TIMEOUT)
                sock.connect((address, port))
                sock.send(b"?")
                return sock.recv(128).decode()
        with socket.create_connection((address, port), TIMEOUT) as sock:
            return sock.recv(128).decode()
    except TimeoutError:
        return "nothing"
    except OSError as error:
        return error.strerror or "error"


libc = ctypes.CDLL(None)
plan = json.loads(sys.argv[1])
dials = [*plan["dial"], *([0, *it, plan["outside"]] for it in plan["inbound"])]
for place in plan["listen"]:
    listen(*place)
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(lambda it: dial(*it), dials))), flush=True)
os._exit(0)
