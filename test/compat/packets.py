"""Where packets end up in this network namespace: `packets.py PLAN`, with PLAN = {"listen": [[address, port], …], "dial": [[uid, protocol, address, port], …]} as JSON. Prints one JSON list of outcomes."""
import concurrent.futures
import json
import os
import socket
import sys
import threading

TIMEOUT = 0.4


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listen(address, port):
    """Whoever gets here is told the port that answered."""
    tcp = socket.socket(family(address), socket.SOCK_STREAM)
    udp = socket.socket(family(address), socket.SOCK_DGRAM)
    for sock in (tcp, udp):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT: TPROXY hands over to none other
        sock.bind((address, port))
    tcp.listen(512)

    def accept():
        while True:
            connection, _ = tcp.accept()
            connection.sendall(str(port).encode())
            connection.close()

    def reply():
        while True:
            _, peer = udp.recvfrom(64)
            udp.sendto(str(port).encode(), peer)

    for task in (accept, reply):
        threading.Thread(target=task, daemon=True).start()


def dial(uid, protocol, address, port):
    """In a child of its own, because a user belongs to a process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
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
                return sock.recv(16).decode()
        with socket.create_connection((address, port), TIMEOUT) as sock:
            return sock.recv(16).decode()
    except TimeoutError:
        return "nothing"
    except OSError as error:
        return error.strerror or "error"


plan = json.loads(sys.argv[1])
for place in plan["listen"]:
    listen(*place)
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(lambda it: dial(*it), plan["dial"]))), flush=True)
os._exit(0)
