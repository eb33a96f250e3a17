"""What the proof of the failure policy runs beside vmmesh: who calls, who answers, and who looks at the wire.

wire FILE                  notes each frame of the bridge that carries the marker: interface and time
sink PORT...               answers every request in plaintext: what is reached when Envoy is passed by
outsider HOST PORT         calls without mutual TLS, as somebody outside the mesh
app PORT NAME              an application; notes who calls, unless it is Envoy or itself
caller MESH OPEN           an application's calls, all the time: to the mesh with the marker, and to an open destination
"""

import http.server
import json
import socket
import sys
import threading
import time

MARKER = b"plaintext-7b1f5c0e-marker"


def say(*words):
    sys.stdout.write(" ".join(["%.3f" % time.time(), *words]) + "\n")
    sys.stdout.flush()


def wire():
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    frames.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: nothing is lost in a burst
    say("ready")
    while True:
        frame, address = frames.recvfrom(65536)
        found = frame.count(MARKER)
        if found:
            say(address[0], str(found * len(MARKER)))


class Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512


def sink(*ports):
    class Sink(Quiet):
        def do_GET(self):
            self.answer({"server": "sink"})

    for port in ports:
        threading.Thread(target=Server(("0.0.0.0", int(port)), Sink).serve_forever).start()


def app(port, name):
    class App(Quiet):
        def do_GET(self):
            if not self.client_address[0].startswith("127."):
                say("direct", self.client_address[0])
            self.answer({"server": name, "headers": {k.lower(): v for k, v in self.headers.items()}})

    Server(("0.0.0.0", int(port)), App).serve_forever()


def request(host, port, extra=b"", seconds=0.4):
    """One connection, one request. Returns who answered, or what happened instead."""
    try:
        with socket.create_connection((host, port), seconds) as to:
            to.settimeout(seconds)
            to.sendall(b"GET / HTTP/1.1\r\nhost: polserver\r\nconnection: close\r\n" + extra + b"\r\n")
            data = b""
            while True:
                more = to.recv(65536)
                if not more:
                    break
                data += more
            for name in (b"polserver", b"sink"):
                if b'"server": "' + name in data:
                    return name.decode()
            return "other"
    except socket.timeout:
        return "timeout"
    except OSError as error:
        return "failed-%s" % error.errno


def forever(name, call, pause=0.02):
    def run():
        while True:
            say(name, call())
            time.sleep(pause)

    threading.Thread(target=run).start()


def outsider(host, port):
    forever("outsider", lambda: request(host, int(port)))


def stream(host):
    """One connection as long as it lasts, with the marker in every request."""
    while True:
        try:
            with socket.create_connection((host, 80), 1) as to:
                to.settimeout(1)
                while True:
                    to.sendall(b"GET / HTTP/1.1\r\nhost: polserver\r\nx-marker: " + MARKER + b"\r\n\r\n")
                    if not to.recv(65536):
                        break
                    time.sleep(0.01)
        except OSError:
            time.sleep(0.01)


def caller(mesh, elsewhere):
    host, port = elsewhere.split(":")
    threading.Thread(target=stream, args=(mesh,)).start()
    for _ in range(2):
        forever("mesh", lambda: request(mesh, 80, b"x-marker: " + MARKER + b"\r\n"))
    forever("open", lambda: request(host, int(port)))


{"wire": wire, "sink": sink, "outsider": outsider, "app": app, "caller": caller}[sys.argv[1]](*sys.argv[2:])
