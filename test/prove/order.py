"""Three observers of the proof `order`. `jump`: is ISTIO_OUTPUT first in nat OUTPUT, asked of the kernel again and again from
outside vmmesh; a line for each change. `calls ADDRESS`: a new connection and request every 25 ms as an ordinary user; a line
for each: `envoy` (its mark is in the headers that arrived), `past` (it arrived without), or what went wrong. `places`: the
rules of the hooks that Calico's Felix and vmmesh share as CHAIN=TARGET#HANDLE,…;…, whenever they changed: who puts a rule in
anew gives it a new handle."""
import os, re, socket, subprocess, sys, time

def say(*words):
    print(*words, flush=True)

def jump():
    last = None
    while True:
        out = subprocess.run(["iptables-nft", "-t", "nat", "-S", "OUTPUT"], capture_output=True, text=True).stdout
        rules = [line for line in out.splitlines() if line.startswith("-A")]
        now = "first" if rules and rules[0].endswith("-j ISTIO_OUTPUT") else "displaced"
        if now != last:
            # Whose jump is in front says whose doing it was, if it is anybody's.
            say(int(time.time() * 1000), now, rules[0].split()[-1] if rules else "nothing")
            last = now
        time.sleep(0.004)

HOOKS = ("nat OUTPUT", "nat PREROUTING", "raw OUTPUT", "raw PREROUTING")
TARGET = re.compile(r"\b(?:jump (\S+)|goto (\S+)|(accept|drop|return|xt target))\b.* # handle (\d+)$")

def places():
    last = None
    while True:
        hooks = []
        for hook in HOOKS:
            # nft 1.0.6 finds no second table when it is asked for several chains at once.
            asked = ["nft", "-a", "list", "chain", "ip", *hook.split()]
            lines = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
            rules = [TARGET.search(line) for line in lines]
            hooks.append(hook.replace(" ", "/") + "=" + ",".join(
                (it[1] or it[2] or it[3]).replace(" ", "-") + "#" + it[4] for it in rules if it))
        now = ";".join(hooks)
        if now != last:
            say(int(time.time() * 1000), now)
            last = now
        time.sleep(0.004)

def call(address):
    try:
        with socket.create_connection((address, 80), 3) as it:
            it.settimeout(3)
            it.sendall(b"GET / HTTP/1.1\r\nHost: order-target\r\nConnection: close\r\n\r\n")
            text = b""
            while part := it.recv(65536):
                text += part
    except OSError as problem:
        return type(problem).__name__
    if not text.startswith(b"HTTP/1.1 200"):
        return "status-" + text[9:12].decode()
    return "envoy" if b"x-envoy-" in text or b"x-request-id" in text.split(b"\r\n\r\n", 1)[1] else "past"

def calls(address):
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    while True:
        began = time.time()
        what = call(address)
        say(int(began * 1000), what)
        time.sleep(max(0, began + 0.025 - time.time()))

{"jump": jump, "calls": calls, "places": places}[sys.argv[1]](*sys.argv[2:])
